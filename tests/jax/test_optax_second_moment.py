"""Between an accumulator and rms_scale: the second moment cannot be changed by accident, and errors say what to do."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from factories import gradients, parameters

import fusedbun
import fusedbun_jax
from fusedbun.transforms import SM3Accumulate
from fusedbun_jax import clip_rms, decay, from_chain, momentum, rms_scale, sm3_accumulate

FOREIGN = {
    "scale": optax.scale(2.0),
    "scale_by_schedule": optax.scale_by_schedule(lambda count: 0.1),
    "scale_by_learning_rate": optax.scale_by_learning_rate(0.1),
    "clip": optax.clip(1.0),
    "clip_by_block_rms": optax.clip_by_block_rms(1.0),
    "clip_by_global_norm": optax.clip_by_global_norm(1.0),
    "adaptive_grad_clip": optax.adaptive_grad_clip(0.1),
    "normalize_by_update_norm": optax.normalize_by_update_norm(),
    "moment": optax.trace(0.9),
    "ema": optax.ema(0.9),
    "add_noise": optax.add_noise(0.1, 0.5, 0),
    "add_decayed_weights": optax.add_decayed_weights(0.1),
    "centralize": optax.centralize(),
    "zero_nans": optax.zero_nans(),
    "set_to_zero": optax.set_to_zero(),
    "keep_params_nonnegative": optax.keep_params_nonnegative(),
    "apply_every": optax.apply_every(2),
    "scale_by_adam": optax.scale_by_adam(),
    "scale_by_rms": optax.scale_by_rms(),
    "scale_by_lion": optax.scale_by_lion(),
    "scale_by_sign": optax.scale_by_sign(),
    "scale_by_sm3": optax.scale_by_sm3(),
    "scale_by_novograd": optax.scale_by_novograd(),
    "scale_by_factored_rms": optax.scale_by_factored_rms(),
    "scale_by_trust_ratio": optax.scale_by_trust_ratio(),
    "scale_by_param_block_norm": optax.scale_by_param_block_norm(),
    "masked": optax.masked(optax.scale(2.0), True),
    "flatten": optax.flatten(optax.identity()),
    "apply_if_finite": optax.apply_if_finite(optax.identity(), 3),
    "MultiSteps": optax.MultiSteps(optax.identity(), 2).gradient_transformation(),
    "stateless": optax.stateless(lambda updates, params: jax.tree.map(lambda u: 2 * u, updates)),
    "numpy": optax.stateless(lambda updates, params: jax.tree.map(np.abs, updates)),
    "asarray": optax.stateless(lambda updates, params: jax.tree.map(jnp.asarray, updates)),
    "jitted": optax.stateless(lambda updates, params: jax.jit(lambda x: x)(updates)),
}
ADVICE = "put rms_scale directly after the accumulator"


def updates_of(*transformations, params=None):
    tx = optax.chain(*transformations)
    params = parameters() if params is None else params
    return tx.update(gradients(params), tx.init(params), params)[0]


@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_foreign_transformation_in_between_is_refused(foreign):
    with pytest.raises((TypeError, ValueError), match=ADVICE):
        updates_of(sm3_accumulate(0.9), foreign, rms_scale())


@pytest.mark.parametrize("foreign", ["scale", "clip", "scale_by_adam"])
def test_it_is_refused_under_jit_too(foreign):
    tx, params = optax.chain(sm3_accumulate(0.9), FOREIGN[foreign], rms_scale()), parameters()
    with pytest.raises((TypeError, ValueError), match=ADVICE):
        jax.jit(tx.update)(gradients(params), tx.init(params), params)


HARMLESS = {
    "identity": optax.identity(),
    "nothing masked": optax.masked(optax.identity(), True),
    "with_extra_args": optax.with_extra_args_support(optax.identity()),
}


@pytest.mark.parametrize("harmless", HARMLESS.values(), ids=HARMLESS.keys())
def test_what_touches_no_leaf_is_harmless(harmless):
    adjacent = updates_of(sm3_accumulate(0.9), rms_scale())
    chex.assert_trees_all_equal(updates_of(sm3_accumulate(0.9), harmless, rms_scale()), adjacent)


def test_the_pair_may_stand_anywhere_in_a_chain():
    params, grads = parameters(), gradients(parameters())
    got = updates_of(optax.scale(2.0), sm3_accumulate(0.0), rms_scale(0.0), optax.scale(0.5))
    expected = updates_of(sm3_accumulate(0.0), rms_scale(0.0))  # the first step is the sign
    chex.assert_trees_all_close(jax.tree.map(lambda u: 2 * u, got), expected, rtol=1e-6)
    chex.assert_trees_all_close(expected, jax.tree.map(jnp.sign, grads), rtol=1e-6)
    chex.assert_trees_all_equal_shapes(got, params)


def test_both_may_be_masked_alike():
    mask = {"layer": {"bias": False, "kernel": True}}
    got = updates_of(optax.masked(sm3_accumulate(0.9), mask), optax.masked(rms_scale(), mask))
    expected = updates_of(sm3_accumulate(0.9), rms_scale())
    expected["layer"]["bias"] = gradients(parameters())["layer"]["bias"]
    chex.assert_trees_all_equal(got, expected)


def test_both_may_have_injected_numbers():
    inject = optax.inject_hyperparams
    got = updates_of(inject(sm3_accumulate)(beta=0.9), inject(rms_scale)(eps=1e-8, eps_root=0.0))
    chex.assert_trees_all_close(got, updates_of(sm3_accumulate(0.9), rms_scale()), rtol=1e-6)


@pytest.mark.parametrize("ours", [momentum(0.9), decay(0.1), clip_rms(1.0)], ids=["momentum", "decay", "clip_rms"])
def test_another_of_ours_in_between_drops_it(ours):
    with pytest.raises(ValueError, match=r"rms_scale: there is no second moment .* directly before it"):
        updates_of(sm3_accumulate(0.9), ours, rms_scale())
    chex.assert_trees_all_equal(updates_of(sm3_accumulate(0.9), ours), updates_of(ours))


def test_rms_scale_alone_is_an_error():
    with pytest.raises(ValueError, match="put an accumulator such as sm3_accumulate directly before it"):
        updates_of(rms_scale())


@pytest.mark.parametrize("last", [True, False], ids=["alone", "then the learning rate"])
def test_an_accumulator_at_the_end_of_an_optax_chain_is_refused(last):
    params = parameters()
    chain = [sm3_accumulate(0.9)] if last else [sm3_accumulate(0.9), optax.scale_by_learning_rate(0.1)]
    with pytest.raises((TypeError, ValueError), match="where no rms_scale is wanted"):
        optax.apply_updates(params, updates_of(*chain))


def test_an_accumulator_at_the_end_of_a_jitted_update_is_refused():
    tx, params = sm3_accumulate(0.9), parameters()
    with pytest.raises((TypeError, ValueError), match=ADVICE):
        jax.jit(tx.update)(gradients(params), tx.init(params), params)


@pytest.mark.parametrize("learning_rate", [0.1, lambda count: 0.1], ids=["constant", "scheduled"])
def test_an_accumulator_at_the_end_of_one_of_our_chains_drops_its_second_moment(learning_rate):
    params = parameters()
    tx = from_chain(fusedbun.chain(SM3Accumulate(0.9)), learning_rate)
    updates, state = tx.update(gradients(params), tx.init(params), params)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda g: -0.1 * g, gradients(params)), rtol=1e-6)
    assert jnp.all(state.sm3_accumulate.axis0["layer"]["kernel"] > 0)


def test_our_own_chain_refuses_at_once():
    with pytest.raises(ValueError, match=r"rms_scale reads the second moment .* but that is momentum"):
        fusedbun_jax.chain(SM3Accumulate(0.9), fusedbun.transforms.Momentum(), fusedbun.transforms.RMSScale())
