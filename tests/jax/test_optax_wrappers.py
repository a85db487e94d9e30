"""optax's wrappers and combinators around ours, and ours in a chain written by hand."""

from itertools import product

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from factories import (
    RECOMMENDED,
    described,
    every_factory,
    gradients,
    jitted,
    jitted_update,
    parameters,
    representative,
    representative_descending,
    run,
)
from sweeps import only, sweep

import fusedbun_jax
from fusedbun_jax import fusedbun

LABELS = {"layer": {"bias": "plain", "kernel": "ours"}}
MASK = jax.tree.map(lambda label: label == "ours", LABELS)


def ours_only(tree):
    return {"layer": {name: x for name, x in tree["layer"].items() if MASK["layer"][name]}}


@representative
def test_multi_steps_equals_a_step_with_the_mean_gradient(factory):
    params = factory.parameters()
    tx = optax.MultiSteps(factory(), 2)
    first, second = gradients(params, 0), gradients(params, 1)
    step = jitted(tx.gradient_transformation())
    halfway, state = step(params, tx.init(params), first)
    chex.assert_trees_all_equal(halfway, params)
    got, state = step(halfway, state, second)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    expected, inner = jitted(factory())(params, factory().init(params), mean)
    chex.assert_trees_all_close((got, state.inner_opt_state), (expected, inner), rtol=1e-5)


@every_factory
def test_wrappers_keep_types_and_take_extra_arguments(factory):
    params = factory.parameters()
    for wrapped in (
        optax.MultiSteps(factory(), 2).gradient_transformation(),
        optax.apply_if_finite(factory(), 3),
        optax.masked(factory(), MASK),
        optax.partition({"ours": factory(), "plain": optax.sgd(0.5)}, LABELS),
        optax.chain(optax.clip(1.0), factory(), optax.scale(0.5)),
        optax.named_chain(("ours", factory()), ("scale", optax.scale(0.5))),
        optax.flatten(optax.chain(optax.identity(), optax.scale(0.5))),
        factory.injected(),
    ):
        tx = optax.with_extra_args_support(wrapped)
        state = tx.init(params)
        updates, after = jax.eval_shape(lambda g, s, p, tx=tx: tx.update(g, s, p, value=1.0), params, state, params)
        assert described((updates, after)) == described((params, state))


@representative
def test_apply_if_finite_leaves_out_a_step(factory):
    tx, start = optax.apply_if_finite(factory(), max_consecutive_errors=3), factory.parameters()
    step = jitted(tx)
    params, state = step(start, tx.init(start), gradients(start, 0))
    for errors, bad in enumerate((jnp.nan, jnp.inf), start=1):
        broken = gradients(params, 1)
        broken["layer"]["kernel"] = broken["layer"]["kernel"].at[1, 2].set(bad)
        after, skipped = step(params, state, broken)
        chex.assert_trees_all_equal((after, skipped.inner_state), (params, state.inner_state))
        assert skipped.total_notfinite == errors
        params, state = after, skipped
    got, state = step(params, state, gradients(params, 1))
    expected, inner = run(factory(), start, 2)
    chex.assert_trees_all_close((got, state.inner_state), (expected, inner), rtol=1e-5)


@representative
def test_masked_leaves_are_passed_by(factory):
    tx, params = optax.masked(factory(), MASK), factory.parameters()
    grads, state = gradients(params), tx.init(params)
    updates, state = jitted_update(tx)(grads, state, params)
    np.testing.assert_array_equal(updates["layer"]["bias"], grads["layer"]["bias"])
    alone = factory()
    expected = jitted_update(alone)(ours_only(grads), alone.init(ours_only(params)), ours_only(params))
    chex.assert_trees_all_close(ours_only(updates), expected[0], rtol=1e-6)
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(expected[1]))


@representative
def test_partition_gives_each_leaf_its_own(factory):
    tx, params = optax.partition({"ours": factory(), "plain": optax.sgd(0.5)}, LABELS), factory.parameters()
    got, state = params, tx.init(params)
    expected, alone = ours_only(params), factory().init(ours_only(params))
    for i in range(2):
        got, state = jitted(tx)(got, state, gradients(params, i))
        expected, alone = jitted(factory())(expected, alone, ours_only(gradients(params, i)))
    bias = params["layer"]["bias"] - 0.5 * sum(gradients(params, i)["layer"]["bias"] for i in range(2))
    np.testing.assert_allclose(got["layer"]["bias"], bias, rtol=1e-5)
    chex.assert_trees_all_close(ours_only(got), expected, rtol=1e-5)


@representative_descending
def test_transformations_before_and_after_it(factory):
    params = parameters()
    grads = gradients(params)
    tx = optax.chain(
        optax.clip_by_global_norm(0.5), optax.identity(), factory(), optax.add_decayed_weights(-0.25), optax.scale(0.5)
    )
    got, _ = jitted_update(tx)(grads, tx.init(params), params)
    clipped = jax.tree.map(lambda g: 0.5 * g / optax.tree.norm(grads), grads)
    alone, _ = jitted_update(factory())(clipped, factory().init(params), params)
    chex.assert_trees_all_close(got, jax.tree.map(lambda u, p: 0.5 * (u - 0.25 * p), alone, params), rtol=2e-5)


def by_hand(learning_rate):
    return optax.chain(
        fusedbun_jax.centralize(0),
        fusedbun_jax.sparse_mask(1e-8),
        fusedbun_jax.sm3_accumulate(0.8, "mean", "product"),
        fusedbun_jax.rms_scale(1e-8),
        fusedbun_jax.clip_rms(0.7),
        fusedbun_jax.momentum(0.9, nesterov=True),
        fusedbun_jax.decay(0.01),
        optax.scale_by_learning_rate(learning_rate),
    )


@sweep(
    ("dtype", "scheduled"),
    [*product(("float32", "float64", "bfloat16"), (False, True))],
    short=only(("float64", True), ("bfloat16", False)),
)
def test_a_chain_written_by_hand_equals_the_factory(dtype, scheduled, x64):
    learning_rate = optax.linear_schedule(0.1, 0.0, 5) if scheduled else 0.1
    params = jax.tree.map(lambda p: p + 3 * jnp.sign(p), parameters(dtype))  # no step leaves a factor of two
    expected, state = run(fusedbun(learning_rate, clip_rms=0.7, **RECOMMENDED), params, 4)
    got, by_hand_state = run(by_hand(learning_rate), params, 4)
    chex.assert_trees_all_equal(got, expected)
    assert any(jnp.any(x != y) for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(params), strict=True))
    chex.assert_trees_all_equal(by_hand_state[:7], tuple(state)[:7])


def test_a_chain_written_by_hand_equals_the_factory_eagerly():
    params = parameters()
    grads = gradients(params)
    make = fusedbun(0.1, clip_rms=0.7, **RECOMMENDED)
    expected, _ = make.update(grads, make.init(params), params)
    chex.assert_trees_all_equal(by_hand(0.1).update(grads, by_hand(0.1).init(params), params)[0], expected)


def test_ours_stand_in_a_chain_of_optax():
    """clip → momentum → decay of the kernels only → learning rate."""
    mask = {"layer": {"bias": False, "kernel": True}}
    tx = optax.chain(
        optax.clip(0.5),
        fusedbun_jax.momentum(0.5),
        optax.masked(fusedbun_jax.decay(0.1), mask),
        optax.scale_by_learning_rate(0.25),
    )
    params = parameters()
    grads = gradients(params)
    got, _ = tx.update(grads, tx.init(params), params)
    for name, g in grads["layer"].items():
        decayed = 0.1 * params["layer"][name] if mask["layer"][name] else 0.0
        np.testing.assert_allclose(got["layer"][name], -0.25 * (jnp.clip(g, -0.5, 0.5) + decayed), rtol=1e-5)


def test_ours_stand_in_a_named_chain():
    tx = optax.named_chain(("second moment", fusedbun_jax.sm3_accumulate(0.9)), ("scale", fusedbun_jax.rms_scale()))
    params = parameters()
    updates, state = tx.update(gradients(params), tx.init(params))
    assert set(state) == {"second moment", "scale"}
    plain = optax.chain(fusedbun_jax.sm3_accumulate(0.9), fusedbun_jax.rms_scale())
    chex.assert_trees_all_equal(updates, plain.update(gradients(params), plain.init(params))[0])
