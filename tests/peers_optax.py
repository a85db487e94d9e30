"""What optax's own tests ask, of the release that is installed: the rows of `peers.py` for each of its files.

A file of which no test is about an optimizer, or all are about one thing, has one row.
"""

from __future__ import annotations

from peers import ALGORITHM, OWN

ALIAS, AROUND = "jax/test_optax_alias.py::", "jax/test_optax_around.py::"
MASKS, UTILS = "jax/test_optax_masks.py::", "jax/test_optax_state_utils.py::"
NUMBERS, WRAPPERS = "jax/test_optax_hyperparameters.py::", "jax/test_optax_wrappers.py::"
DTYPES, SHARDING = "jax/test_optax_dtypes.py::", "jax/test_optax_sharding.py::"
EXTRA = f"{ALIAS}test_extra_arguments_are_accepted"
INJECTED = f"{NUMBERS}test_injected_constants_equal_those_given_by_hand"
STABLE = f"{AROUND}test_branches_of_one_step_have_the_same_types"
DTYPE = f"{DTYPES}test_updates_have_the_parameters_dtype_and_state_is_computed_in"
FROZEN = f"{MASKS}test_frozen_leaves_get_no_update"
MASKED = f"{MASKS}test_masked_leaves_are_passed_by_whatever_the_mask_is"
EMPTY = f"{MASKS}test_containers_without_leaves"
MISMATCH = f"{MASKS}test_a_mask_of_another_tree_is_an_error"
IN_A_CHAIN = f"{AROUND}test_what_stands_before_and_behind_it_is_told_what_it_is_told"
SOME_STEPS = f"{MASKS}test_steps_that_are_left_out"
RATE = f"{UTILS}test_an_injected_rate_is_found_and_set_in_compiled_code"
DESCENT = f"{AROUND}test_a_bowl_is_descended_with_a_wrapper_around"

COMBINED = {
    "test_chain": f"{WRAPPERS}test_transformations_before_and_after_it",
    "test_extra_args": f"{WRAPPERS}test_wrappers_keep_types_and_take_extra_arguments",
    "test_extra_args_chaining": f"{WRAPPERS}test_wrappers_keep_types_and_take_extra_arguments",
    "test_extra_args_positional_params": EXTRA,
    "test_partition": f"{MASKS}test_labels_may_be_a_prefix_or_a_function",
    "test_empty": EMPTY,
    "test_labels_mismatch": MISMATCH,
    "test_named_chain": f"{WRAPPERS}test_ours_stand_in_a_named_chain",
}

OPTAX: dict[str, str | dict[str, str]] = {
    "_src/alias_test.py": {
        "test_optimization": f"{ALIAS}test_finds_the_valley_of_rosenbrock",
        "test_optimizers_accept_extra_args": EXTRA,
        "test_optimizers_can_be_wrapped_in_inject_hyperparams": INJECTED,
        "test_explicit_dtype": "jax/test_optax_codes.py::test_the_bytes_of_the_state",
        "test_preserve_dtype": DTYPE,
        "test_state_shape_dtype_shard_stability": STABLE,
        "test_gradient_accumulation": f"{AROUND}test_parameters_move_at_every_third_step",
        **dict.fromkeys(
            (
                "test_plain_preconditioning",
                "test_preconditioning_by_lbfgs_on_vectors",
                "test_preconditioning_by_lbfgs_on_trees",
                "test_against_plain_implementation",
                "test_handling_pytrees",
                "test_multiclass_logreg",
                "test_binary_logreg",
                "test_against_scipy",
                "test_minimize_bad_initialization",
                "test_steep_objective",
                "test_lbfgs_complex",
                "test_lbfgs_complex_rosenbrock",
            ),
            ALGORITHM,
        ),
    },
    "contrib/_common_test.py": {
        "test_optimizers_accept_extra_args": f"{ALIAS}test_is_compiled_once",
        "test_optimizers": f"{ALIAS}test_reaches_the_bottom_of_a_parabola",
        "test_optimizers_can_be_wrapped_in_inject_hyperparams": INJECTED,
        "test_preserve_dtype": DTYPE,
        "test_gradient_accumulation": f"{AROUND}test_accumulated_steps_have_the_types_of_others",
        "test_state_shape_dtype_shard_stability": STABLE,
        "test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such": (
            f"{NUMBERS}test_a_scheduled_learning_rate_equals_constants_step_by_step"
        ),
    },
    "_src/sharding_test.py": {
        "test_init_with_abstract_input": f"{ALIAS}test_eval_shape_foretells_init_and_update",
        "test_state_sharding_type_init_match_update": (
            f"{SHARDING}test_types_on_explicit_axes_are_the_same_before_and_after_a_step_and_under_jit"
        ),
        "test_state_sharding_type_preserved_with_jit": (
            f"{SHARDING}test_types_on_explicit_axes_are_the_same_before_and_after_a_step_and_under_jit"
        ),
        "test_microbatch_with_explicit_sharding": OWN,
    },
    "_src/float64_test.py": {"test_mixed_dtype_input_outputs": STABLE},
    "_src/transform_test.py": {
        "test_scalers": f"{ALIAS}test_state_and_updates_keep_their_types",
        "test_apply_every": OWN,
        "test_scale": OWN,
        "test_centralize": "jax/test_optax_formula.py::test_steps_equal_the_formulas",
        "test_scale_by_optimistic_gradient": ALGORITHM,
        "test_lion_modes_variants": ALGORITHM,
        "test_lion_invalid_mode_raises": ALGORITHM,
        "test_scale_by_polyak_l1_norm": ALGORITHM,
        "test_rms_match_adam": OWN,
    },
    "_src/base_test.py": {
        "test_typing": EXTRA,
        "test_isinstance": EXTRA,
        "test_extra_args_with_callback": f"{WRAPPERS}test_wrappers_keep_types_and_take_extra_arguments",
        **dict.fromkeys(
            (
                "test_set_to_zero_returns_tree_of_correct_zero_arrays",
                "test_set_to_zero_is_stateless",
                "test_stateless",
                "test_stateless_no_params",
                "test_init_returns_emptystate",
                "test_stateless_with_tree_map",
                "test_stateless_with_tree_map_no_params",
            ),
            OWN,
        ),
    },
    "_src/combine_test.py": COMBINED,
    "transforms/_combining_test.py": COMBINED,
    "transforms/_accumulation_test.py": {
        "test_ema": OWN,
        "test_ema_debias": OWN,
        "test_skip_not_finite": f"{AROUND}test_a_gradient_that_is_not_finite_is_not_accumulated",
        "test_skip_large_updates": OWN,
        "test_multi_steps": f"{AROUND}test_parameters_move_at_every_third_step",
        "test_multi_steps_every_k_schedule": f"{AROUND}test_how_many_steps_are_accumulated_may_follow_a_schedule",
        "test_multi_steps_scan_dtype_stability": f"{AROUND}test_accumulated_steps_have_the_types_of_others",
        "test_multi_steps_zero_nans": IN_A_CHAIN,
        "test_multi_steps_computes_mean": f"{WRAPPERS}test_multi_steps_equals_a_step_with_the_mean_gradient",
        "test_multi_steps_skip_not_finite": f"{AROUND}test_a_gradient_that_is_not_finite_is_not_accumulated",
        "test_multi_steps_mixed_precision": f"{AROUND}test_accumulated_steps_have_the_types_of_others",
    },
    "transforms/_adding_test.py": {
        "test_add_decayed_weights": OWN,
        "test_add_noise_has_correct_variance_scaling": OWN,
        "test_none_argument": "jax/test_optax_trees.py::test_the_kind_of_tree_makes_no_difference",
    },
    "transforms/_clipping_test.py": OWN,
    "transforms/_conditionality_test.py": {
        "test_apply_if_finite": f"{MASKS}test_too_many_steps_with_nan_are_let_through",
        "test_apply_if_finite_pmap": "jax.pmap is shard_map now: `test_optax_shardings.py` has that",
        "test_stateless_inner": SOME_STEPS,
        "test_statefull_inner": SOME_STEPS,
        "test_stateless_inner_with_extra_args": f"{MASKS}test_steps_are_left_out_by_what_update_is_told",
    },
    "transforms/_constraining_test.py": {
        "test_keep_params_nonnegative": IN_A_CHAIN,
        "test_zero_nans": IN_A_CHAIN,
        "test_none_arguments": "jax/test_optax_trees.py::test_the_kind_of_tree_makes_no_difference",
    },
    "transforms/_freezing_test.py": {
        "test_freeze_updates": FROZEN,
        "test_nested_freeze_all": FROZEN,
        "test_nested_freeze_none": FROZEN,
        "test_scalar_bool_broadcast": FROZEN,
        "test_bad_structure_raises": OWN,
        "test_partial_prefix_mask_behavior": FROZEN,
        "test_selective_transform_effect": FROZEN,
        "test_nested_train_all": FROZEN,
        "test_scalar_freeze_all": FROZEN,
        "test_selective_bad_structure": MISMATCH,
    },
    "transforms/_layouts_test.py": {"test_flatten": f"{AROUND}test_one_vector_of_all_parameters"},
    "transforms/_masking_test.py": {
        "test_tree_map_params": f"{UTILS}test_what_is_of_parameters_and_what_is_not_make_up_the_state",
        "test_masked": MASKED,
        "test_prefix_mask": MASKED,
        "test_update_requires_params": MASKED,
        "test_empty": EMPTY,
        "test_tree_mismatch_fails": MISMATCH,
        "test_mask_fn": MASKED,
        "test_nested_mask": f"{MASKS}test_masks_inside_masks",
        "test_masked_state_structure": f"{WRAPPERS}test_masked_leaves_are_passed_by",
        "test_mask_compatible_callable_pytree": f"{MASKS}test_parameters_that_can_be_called",
    },
    "transforms/_monitoring_test.py": {"test_snapshot": IN_A_CHAIN, "test_monitor": OWN},
    "tree_utils/_state_utils_test.py": {
        "test_dict_based_optimizers": f"{UTILS}test_what_is_of_parameters_and_what_is_not_make_up_the_state",
        "test_adam": "jax/test_optax_boxes.py::test_a_rule_over_specs_makes_the_shardings_of_the_state",
        "test_inject_hparams": f"{UTILS}test_hyperparameters_are_not_of_parameters",
        "test_map_params_to_none": f"{UTILS}test_what_is_of_parameters_and_what_is_not_make_up_the_state",
        "test_map_non_params_to_none": f"{UTILS}test_what_is_of_parameters_and_what_is_not_make_up_the_state",
        "test_tree_get_all_with_path": f"{UTILS}test_what_is_there_twice_is_found_twice",
        "test_tree_get": f"{UTILS}test_the_count_of_a_schedule_is_found_and_set",
        "test_tree_set": f"{UTILS}test_the_count_of_a_schedule_is_found_and_set",
    },
    "schedules/_inject_test.py": {
        "test_updates": f"{NUMBERS}test_scheduled_numbers_equal_those_given_by_hand",
        "test_hyperparams_state": RATE,
        "test_constant_hyperparams": INJECTED,
        "test_overriding_hyperparam": f"{NUMBERS}test_injected_numbers_can_be_set_between_steps",
        "test_static_args": f"{NUMBERS}test_the_documentation_names_exactly_the_structural_arguments",
        "test_numeric_static_args": f"{NUMBERS}test_the_documentation_names_exactly_the_structural_arguments",
        "test_prng_key_not_hyperparameter": "no factory of ours takes a key",
        "test_hyperparam_dtypes": f"{NUMBERS}test_injected_numbers_keep_float32_for_parameters_of_16_bits",
        "test_hyperparam_default_dtype": f"{NUMBERS}test_injection_keeps_the_types_of_16_bits",
        "test_static_args_error": OWN,
        "test_inject_hyperparams_starts_with_step_count_zero": RATE,
        "test_wrap_stateless_schedule": OWN,
        "test_inject_stateful_hyperparams": OWN,
    },
    "_src/lookahead_test.py": {
        "test_lookahead": f"{AROUND}test_lookahead_pulls_to_the_slow_weights",
        "test_lookahead_state_reset": f"{AROUND}test_lookahead_keeps_or_resets_the_state",
        "test_lookahead_edge_cases": OWN,
    },
    "contrib/_mechanic_test.py": {"test_mechanized": DESCENT},
    "contrib/_sam_test.py": {"test_optimization": DESCENT},
    "contrib/_reduce_on_plateau_test.py": {
        "test_learning_rate_reduced_after_cooldown_period_is_over": DESCENT,
        "test_learning_rate_is_not_reduced": OWN,
        "test_learning_rate_not_reduced_during_cooldown": OWN,
        "test_learning_rate_not_reduced_after_end_scale_is_reached": OWN,
    },
    "contrib/_schedule_free_test.py": {
        "test_learning_rate_zero": OWN,
        "test_schedule_free_adamw": f"{AROUND}test_schedule_free_weights_descend",
        "test_scalar_preservance": OWN,
        "test_buffer_donation": f"{AROUND}test_schedule_free_buffers_may_be_donated",
        "test_explicit_dtype": OWN,
    },
    "contrib/_complex_valued_test.py": {
        "test_split_real_and_imaginary": f"{AROUND}test_complex_parameters_are_two_real_ones"
    },
    "contrib/_privacy_test.py": {
        "test_no_privacy": f"{AROUND}test_gradients_of_examples_may_be_aggregated_before_it",
        "test_clipping_norm": f"{AROUND}test_gradients_of_examples_may_be_aggregated_before_it",
        "test_noise_multiplier": OWN,
        "test_aggregated_updates_as_input_fails": OWN,
    },
    "contrib/_galore_test.py": ALGORITHM,
    "contrib/_muon_test.py": ALGORITHM,
    "_src/factorized_test.py": ALGORITHM,
    "_src/linesearch_test.py": DESCENT,
    **dict.fromkeys(
        (
            "_src/linear_algebra_test.py",
            "_src/numerics_test.py",
            "_src/update_test.py",
            "_src/utils_test.py",
            "assignment/_hungarian_algorithm_test.py",
            "experimental/_aggregating_test.py",
            "losses/_classification_test.py",
            "losses/_fenchel_young_test.py",
            "losses/_ranking_test.py",
            "losses/_regression_test.py",
            "losses/_segmentation_test.py",
            "losses/_self_supervised_test.py",
            "losses/_smoothing_test.py",
            "microbatching/_microbatching_test.py",
            "optax_test.py",
            "perturbations/_make_pert_test.py",
            "projections/_projections_test.py",
            "schedules/_join_test.py",
            "schedules/_schedule_test.py",
            "tree_utils/_casting_test.py",
            "tree_utils/_random_test.py",
            "tree_utils/_tree_math_test.py",
        ),
        OWN,
    ),
}
