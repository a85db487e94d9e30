"""Every test that torch, optax and pytorch_optimizer have of an optimizer: where ours are asked the same, or why not.

A row is the name of one of their tests, and where it is held here, `<file>::<test>`, or the reason why it is not.
`tests/test_peers.py` sees that what is named is there, and that no test of theirs is left out.
"""

from __future__ import annotations

GPU = "it is about GPUs or several of them, and the tests run without one"
MEMORY = "it takes 8 GiB of memory and more"
COMPLEX = "complex parameters are refused by name; their parts can be stepped"
OWN = "it is about transformations, functions or tables of their own, with nothing of ours in it"
ALGORITHM = "it is about an algorithm that is none of ours"
NAMES = "it is about finding classes by their names"

INFO, SUITE = "torch/test_torch_optimizer_info.py::", "torch/test_torch_optimizer_suite.py::"
BASE, API = "torch/test_torch_optimizer_base.py::", "torch/test_torch_api.py::"
STATES = "torch/test_torch_optimizer_states.py::"
SCHEDULES, PEER = "torch/test_torch_schedules.py::", "torch/test_torch_pytorch_optimizer.py::"
ERRORS, TENSORS = "torch/test_torch_errors.py::", "torch/test_torch_tensors.py::"
HOOKS = f"{BASE}test_hooks_of_state_dicts_do_what_they_do_to_torchs_own"
STEP_HOOKS = f"{BASE}test_step_hooks_see_what_they_see_of_torchs_own"
IMPLEMENTATIONS = f"{SUITE}test_an_implementation_equals_the_definition_whatever_has_a_gradient"
NUMBER = f"{PEER}test_a_number_below_zero_is_refused_before_parameters_are_looked_at"
COMPILED = "torch/test_torch_compile.py::test_a_step_in_code_that_is_compiled"
WRAPPERS = f"{PEER}test_the_packages_wrappers_train_with_it"

# torch 2.13: test/test_optim.py (TestOptimRenewed), and the small files of test/optim
TORCH = {
    "test_optim_infos_do_not_specify_global_cliquey_kwargs": OWN,
    "test_errors": f"{INFO}test_error_inputs",
    "test_forloop_goes_right_direction": f"{SUITE}test_the_loss_goes_the_right_way",
    "test_forloop_goes_right_direction_multigpu": GPU,
    "test_param_group_with_lrscheduler_goes_right_direction": (
        f"{SUITE}test_so_it_does_with_a_learning_rate_for_each_group"
    ),
    "test_tensor_lr": f"{SUITE}test_a_tensor_learning_rate_equals_a_number",
    "test_rosenbrock_sparse": f"{SUITE}test_rosenbrock_by_sparse_gradients",
    "test_complex": COMPLEX,
    "test_complex_2d": COMPLEX,
    "test_foreach_matches_forloop": IMPLEMENTATIONS,
    "test_mixed_device_dtype": f"{TENSORS}test_precisions_mix_in_one_group",
    "test_set_default_dtype_works_with_foreach": f"{SUITE}test_the_default_dtype_changes_nothing",
    "test_foreach_large_tensor": MEMORY,
    "test_peak_memory_foreach": "test_memory_measured.py::test_a_step_takes_no_more_than_is_planned",
    "test_fused_matches_forloop": "torch/test_torch_implementations.py::test_dtypes",
    "test_fused_error_on_params_on_meta": f"{SUITE}test_parameters_are_stepped_once_they_have_memory",
    "test_fused_large_tensor": MEMORY,
    "test_fused_does_not_step_if_foundinf": f"{SCHEDULES}test_gradient_scaler",
    "test_cpu_load_state_dict": GPU,
    "test_param_groups_weight_decay": f"{SUITE}test_weight_decay_can_be_left_out_of_a_group",
    "test_param_groups_lr": f"{SUITE}test_a_learning_rate_of_almost_nothing_moves_nothing",
    "test_step_is_noop_when_params_have_no_grad": f"{SUITE}test_without_a_gradient_a_step_does_nothing",
    "test_step_is_noop_for_zero_grads": f"{SUITE}test_a_gradient_of_zero_moves_nothing",
    "test_optimizer_can_be_printed": f"{API}test_is_a_torch_optimizer_that_prints_its_groups",
    "test_state_dict_deterministic": f"{STATES}test_a_loaded_state_continues_and_is_the_same",
    "test_can_load_older_state_dict": f"{STATES}test_a_state_from_before_later_options_is_loaded",
    "test_can_load_from_to_named_state_dict": f"{STATES}test_a_loaded_state_continues_and_is_the_same",
    "test_save_load_equality_with_weights_only": f"{STATES}test_a_state_goes_through_a_file_without_code",
    "test_load_nontensor_step": (
        "its counters were numbers once, and are taken so still; ours never were, and are refused by name, as "
        "test_a_counter_that_is_no_tensor_is_refused says"
    ),
    "test_state_dict_with_cuda_params": GPU,
    "test_state_dict_pre_hook": HOOKS,
    "test_state_dict_post_hook": HOOKS,
    "test_state_dict_pre_post_hook": HOOKS,
    "test_load_state_dict_pre_hook_and_prepend": HOOKS,
    "test_load_state_dict_post_hook": HOOKS,
    "test_load_state_dict_pre_post_hook": HOOKS,
    "test_step_post_hook": STEP_HOOKS,
    "test_step_pre_hook": STEP_HOOKS,
    "test_step_all_hooks": STEP_HOOKS,
    "test_deepcopy_copies_all_public_attrs": f"{STATES}test_a_copy_equals_its_original_in_every_attribute",
    "test_second_order_optims_return_consistent_types": "no optimizer of ours asks the closure twice",
    "test_fused_cpu_matches_cuda": GPU,
    "test_defaults_changed_to_foreach": "torch/test_torch_implementations.py::test_the_best_of_each_device",
    "test_non_empty_state": f"{INFO}test_state",
    "CompiledOptimizerParityTests.test_correctness": COMPILED,
    "TestDifferentiableOptimizer": "steps are not differentiable in torch: `differentiable=True` is refused by name",
    "TestSWAUtils": f"{SCHEDULES}test_averages_of_weights",
    "TestLRScheduler": f"{SCHEDULES}test_a_scheduler_gives_each_step_its_learning_rate",
    "TestLRScheduler, of cycles": f"{SCHEDULES}test_a_cycle_moves_the_momentum_of_every_optimizer_that_has_one",
    "test_reduce_lr_tensor": f"{BASE}test_plateaus_move_tensors_and_numbers_alike",
    "test_scheduler_tensor_aliasing": (
        f"{BASE}test_a_schedule_starts_from_the_first_learning_rate_whatever_becomes_of_the_tensor"
    ),
    "test_load_state_dict_clones_tensor_state": f"{BASE}test_a_saved_dict_is_the_optimizers_own_until_it_is_loaded",
    "test_state_dict_preserves_alias_structure": OWN,
    "test_zeroptimizer": f"{BASE}test_torchs_zero_redundancy_optimizer_takes_it",
    "test_apply_optimizer_in_backward": f"{BASE}test_torch_can_step_it_in_the_backward_pass",
    "test_parallel_optimizers_and_groups": "torch/test_torch_groups.py::test_a_group_steps_as_an_optimizer_of_its_own",
    "test_duplicate_params_in_one_param_group": (
        f"{SUITE}test_a_parameter_twice_in_a_group_is_warned_of_and_stepped_twice"
    ),
    "test_empty_and_invalid_params": f"{BASE}test_parameters_are_refused_as_torch_does",
    "test_add_param_group": f"{BASE}test_a_group_that_is_added_is_refused_as_torch_does",
}

# pytorch_optimizer 4.1: tests/*.py and tests/optimizers/test_sm3.py, test_sign_sgd.py
PYTORCH_OPTIMIZER = {
    "test_optimizers.py::test_training[float32]": f"{PEER}test_two_clusters_are_told_apart",
    "test_optimizers.py::test_training[bfloat16]": f"{PEER}test_two_clusters_are_told_apart",
    "test_optimizers.py::test_training[complex64]": COMPLEX,
    "test_optimizers.py::test_training[foreach]": IMPLEMENTATIONS,
    "test_optimizers.py::test_tensor_lr": f"{PEER}test_so_they_are_with_a_tensor_for_the_learning_rate",
    "test_optimizers.py::test_init_group": "ours have no such method: state comes with a parameter's first gradient",
    "test_optimizers.py::test_closure": f"{SUITE}test_without_a_gradient_a_step_does_nothing",
    "test_optimizer_parameters.py::test_learning_rate": NUMBER,
    "test_optimizer_parameters.py::test_epsilon": NUMBER,
    "test_optimizer_parameters.py::test_weight_decay": NUMBER,
    "test_optimizer_parameters.py::test_momentum": NUMBER,
    "test_optimizer_parameters.py::test_beta": NUMBER,
    "test_optimizer_parameters.py::test_betas": NUMBER,
    "test_optimizer_parameters.py::test_wd_ratio": ALGORITHM,
    "test_optimizer_parameters.py::test_update_frequency": ALGORITHM,
    "test_optimizer_parameters.py::test_norm": ALGORITHM,
    "test_optimizer_parameters.py::test_nus": ALGORITHM,
    "test_optimizer_parameters.py::test_size_of_parameter": (
        f"{TENSORS}test_an_empty_parameter_is_no_trouble_to_the_others"
    ),
    "test_gradients.py::test_no_gradients": f"{PEER}test_groups_of_which_some_parameters_have_no_gradient",
    "test_gradients.py::test_sparse_not_supported": f"{INFO}test_a_sparse_gradient",
    "test_gradients.py::test_sparse": f"{PEER}test_sparse_rows_of_sm3_equal_dense_vectors_that_are_zero_elsewhere",
    "test_gradients.py::test_zero_epsilon": (
        f"{PEER}test_an_epsilon_of_zero_makes_no_nan_of_rows_that_have_a_gradient"
    ),
    "test_gradients.py::test_madgrad_unsupported_sparse_options": ALGORITHM,
    "test_gradients.py::test_complex_not_supported": f"{ERRORS}test_a_parameter_that_is_no_real_number",
    "test_optimizer_variants.py::test_maximize": f"{API}test_maximize_climbs_as_negated_gradients_descend",
    "test_optimizer_variants.py::test_initialized_momentum_matches_negated_objective": (
        f"{API}test_maximize_climbs_as_negated_gradients_descend"
    ),
    "test_optimizer_variants.py::test_sgdsai_warmup_preserves_gradient": f"{API}test_gradients_are_only_read",
    "test_optimizer_variants.py::test_adanorm_optimizer": ALGORITHM,
    "test_optimizer_variants.py::test_adanorm_variant": ALGORITHM,
    "test_optimizer_variants.py::test_adamd_variant": ALGORITHM,
    "test_optimizer_variants.py::test_cautious_variant": ALGORITHM,
    "test_optimizer_variants.py::test_stable_adamw_variant": ALGORITHM,
    "test_create_optimizer.py::test_create_optimizer_basic": f"{PEER}test_groups_that_the_package_makes_for_a_decay",
    "test_create_optimizer.py::test_create_optimizer_with_lookahead": WRAPPERS,
    "test_create_optimizer.py::test_create_optimizer_with_orthograd": WRAPPERS,
    "test_create_optimizer.py::test_create_compiled_optimizer": COMPILED,
    "test_create_optimizer.py::test_external_optimizers_require_import": OWN,
    "test_load_optimizers.py::test_load_optimizers_valid": NAMES,
    "test_load_optimizers.py::test_load_optimizers_invalid": NAMES,
    "test_base.py::test_validate": f"{ERRORS}test_fusedbun_refuses_it_as_argument_in_a_group_and_between_steps",
    "test_base.py::test_hessian_methods": ALGORITHM,
    "test_base.py::test_maximize_gradient": f"{API}test_gradients_are_only_read",
    "test_base.py::test_can_use_foreach": OWN,
    "test_wrapper_optimizers.py::test_lookahead": WRAPPERS,
    "test_wrapper_optimizers.py::test_sam_optimizer": WRAPPERS,
    "test_wrapper_optimizers.py::test_sam_optimizer_with_closure": WRAPPERS,
    "test_wrapper_optimizers.py::test_looksam_optimizer": WRAPPERS,
    "test_wrapper_optimizers.py::test_looksam_optimizer_with_closure": WRAPPERS,
    "test_wrapper_optimizers.py::test_wsam_optimizer": WRAPPERS,
    "test_wrapper_optimizers.py::test_wsam_optimizer_with_closure": WRAPPERS,
    "test_wrapper_optimizers.py::test_friendlysam_optimizer": WRAPPERS,
    "test_wrapper_optimizers.py::test_gsam_optimizer": "the package leaves it out itself",
    "test_wrapper_optimizers.py::test_bsam_optimizer": ALGORITHM,
    "test_wrapper_optimizers.py::test_schedulefree_wrapper": WRAPPERS,
    "test_wrapper_optimizers.py::test_pc_grad_optimizers": WRAPPERS,
    "test_wrapper_optimizers.py::test_trac_optimizer": WRAPPERS,
    "test_wrapper_optimizers.py::test_trac_optimizer_erf_imag": OWN,
    "test_wrapper_optimizers.py::test_load_wrapper_optimizer": (
        f"{PEER}test_a_wrapped_run_continues_from_its_saved_state"
    ),
    "test_optimizers.py::test_safe_f16_optimizers": WRAPPERS,
    "test_lr_schedulers.py": f"{PEER}test_the_packages_schedules_give_each_step_its_learning_rate",
    "test_sm3.py::test_max_reduce_except_dim": OWN,
    "test_sm3.py::test_hybrid_sparse_update": f"{PEER}test_sm3_steps_the_rows_of_a_sparse_gradient",
    "test_sm3.py::test_sm3_make_sparse": OWN,
    "test_sm3.py::test_sm3_rank0": f"{TENSORS}test_every_number_of_axes_is_stepped",
    "test_sign_sgd.py::test_sign_sgd_preserves_momentum_buffer": "our SignSGD has no momentum, and no state",
    "test_sign_sgd.py::test_sign_sgd_weight_decay": "ours decays by the sign of a weight",
    "test_sign_sgd.py::test_sign_based_foreach_parity": IMPLEMENTATIONS,
    "test_loss_functions.py": OWN,
    "test_utils.py": OWN,
    "test_lr_scheduler_parameters.py": OWN,
    "the other files of tests/optimizers": ALGORITHM,
}
