"""Precision: updates in the parameters' dtype, state in float32 or float64, and one rounding."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from factories import (
    FACTORIES,
    described,
    every_factory,
    gradients,
    jitted,
    parameters,
    representative_descending,
    run,
    shared,
    stepper,
    sweep_of_descending,
)
from sweeps import only, sweep

from fusedbun_jax import fusedbun, momentum, round_to_params

DTYPES = ["bfloat16", "float16", "float32", "float64"]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def dtypes(tree):
    return {x.dtype.name for x in jax.tree.leaves(tree)}


@every_factory
@every_dtype
def test_updates_have_the_parameters_dtype_and_state_is_computed_in(factory, dtype, x64):
    tx, params = factory(), factory.parameters(dtype)
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert dtypes(updates) == {dtype}
    assert {d for d in dtypes(state) if "float" in d} <= {"float64" if dtype == "float64" else "float32"}
    assert described(after) == described(state)


@every_factory
def test_the_gradients_dtype_changes_no_type(factory, x64):
    tx, params = factory(), factory.parameters("float32")
    state = jax.eval_shape(tx.init, params)
    for gradient in DTYPES:
        grads = factory.parameters(gradient)
        assert described(jax.eval_shape(tx.update, grads, state, params)) == described((params, state))


@every_factory
@pytest.mark.parametrize("injected", [False, True], ids=["plain", "injected"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_no_type_is_promoted_implicitly(factory, dtype, injected, x64):
    params = factory.parameters(dtype)
    with jax.numpy_dtype_promotion("strict"):
        tx = (factory.injected if injected else factory)(0.1)
        state = jax.eval_shape(tx.init, params)
        after = jax.eval_shape(stepper(tx), params, state, params)
    assert described(after) == described((params, state))


@pytest.mark.parametrize("number", [np.float64, np.float32, np.asarray, jnp.float64], ids=["f64", "f32", "0-d", "jax"])
@sweep("dtype", ["float32", "bfloat16"], short=only("bfloat16"))
def test_the_type_of_a_hyperparameter_reaches_neither_state_nor_updates(number, dtype, x64):
    numbers = {"learning_rate": 0.125, "momentum_beta": 0.5, "beta_decay": 0.75, "Lambda": 0.25, "clip_rms": 0.5}
    params = parameters(dtype)
    got = run(fusedbun(**{name: number(value) for name, value in numbers.items()}), params, 2)
    expected = run(shared(fusedbun, **numbers), params, 2)
    assert described(got) == described(expected)
    chex.assert_trees_all_close(got[1][:5], expected[1][:5], rtol=1e-6)


def test_a_zero_of_numpys_has_no_momentum_either():
    state = fusedbun(0.1, momentum_beta=np.float64(0)).init(parameters())
    assert optax.tree.get_all_with_path(state, "moment") == []
    run(fusedbun(0.1, momentum_beta=np.float64(0)), parameters(), 1)


@sweep_of_descending
def test_a_step_is_rounded_once(factory):
    check_that_a_step_is_rounded_once(factory, "bfloat16")


@representative_descending
def test_a_step_of_float16_is_rounded_once(factory):
    check_that_a_step_is_rounded_once(factory, "float16")


def check_that_a_step_is_rounded_once(factory, dtype):
    """`p + u` in the parameters' dtype is the float32 result rounded, where a step stays within a factor of two."""
    rate = factory.learning_rate / 16
    narrow = {"kernel": parameters(dtype)["layer"]["kernel"]}
    wide = jax.tree.map(jnp.float32, narrow)
    grads = jax.tree.map(jnp.float32, gradients(narrow))
    tx = factory(rate)
    got, _ = jitted(tx)(narrow, tx.init(narrow), grads)
    exact, _ = jitted(tx)(wide, tx.init(wide), grads)
    p, q = wide["kernel"], exact["kernel"]
    near = (q / p > 0.51) & (q / p < 1.96)
    assert near.sum() > 6
    assert (q != p).all()
    np.testing.assert_array_equal(got["kernel"][near], q.astype(dtype)[near])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_of_many_numbers(dtype):
    rng = np.random.default_rng(0)
    p = jnp.asarray(rng.standard_normal(4096) * rng.choice([1e-7, 1e-3, 1.0, 1e3], 4096), dtype)
    p = p.at[:100].set(0.0)  # float16 has numbers down to 6e-8
    u = jnp.where(p == 0, 3e-6, p.astype(jnp.float32)) * jnp.asarray(rng.uniform(-0.45, 0.9, 4096), jnp.float32)
    want = (p.astype(jnp.float32) + u).astype(dtype)

    def both(u, p):
        return p + round_to_params().update(u, optax.EmptyState(), p)[0]

    np.testing.assert_array_equal(jax.jit(both)(u, p), want)
    np.testing.assert_array_equal(both(u, p), want)
    odd = jnp.asarray([jnp.nan, jnp.inf, -jnp.inf, 1.0], jnp.float32)
    one = jnp.ones(4, dtype)
    np.testing.assert_array_equal(jax.jit(both)(odd, one).astype(jnp.float32), one.astype(jnp.float32) + odd)


def test_small_steps_are_not_lost_in_the_smallest_numbers_of_float16():
    params = jnp.zeros(3, jnp.float16)
    tx = fusedbun(1e-5, momentum_beta=0.0)
    after, _ = run(tx, params, 0)
    for _ in range(3):
        after, _ = jax.jit(stepper(tx))(after, tx.init(params), jnp.ones(3, jnp.float16))
    np.testing.assert_allclose(after.astype(jnp.float32), -3e-5, rtol=5e-3)


def test_a_lifted_transformation_hands_on_float32():
    params = parameters("bfloat16")
    tx = momentum(0.9)
    updates, _ = tx.update(gradients(params), tx.init(params), params)
    assert dtypes(updates) == {"float32"}


def test_the_way_through_steps_of_16_bits_is_differentiable():
    """The derivative of the rounding is that of a plain cast."""

    def end(rate, dtype):
        tx, params = fusedbun(rate), parameters(dtype)["layer"]["kernel"]
        step, state = stepper(tx), tx.init(params)
        for i in range(2):
            params, state = step(params, state, gradients(params, i).astype(dtype))
        return jnp.sum(params.astype(jnp.float32) ** 2)

    slopes = [float(jax.jit(jax.grad(end), static_argnums=1)(0.1, dtype)) for dtype in ("bfloat16", "float32")]
    assert slopes[0] == pytest.approx(slopes[1], rel=0.02)
    u, p = jnp.linspace(-1.0, 1.0, 8), jnp.ones(8, jnp.bfloat16)
    tangents = jnp.linspace(1.0, 2.0, 8), jnp.full(8, 7, jnp.bfloat16)
    _, slope = jax.jvp(lambda u, p: round_to_params().update(u, optax.EmptyState(), p)[0], (u, p), tangents)
    np.testing.assert_array_equal(slope, tangents[0].astype(jnp.bfloat16))


def test_the_bytes_of_the_state():
    """The same on every leaf, whatever the parameters' dtype: float32, int8 votes, and one int32 count.

    A leaf has a number for each of four axes, where it has no accumulator along that.
    """
    params = {"kernel": jnp.zeros((30, 40), jnp.bfloat16), "bias": jnp.zeros(40, jnp.bfloat16), "0-d": jnp.bfloat16(0)}
    numbers, accumulators = 1241, 30 + 40 + 40 + 1 + 2 + 3 + 3
    expected = {
        "sm3": 4 * accumulators,
        "sm3-momentum": 4 * (accumulators + numbers),
        "scaled_optum": 0,
        "decoupled_lionw": 4 * numbers,
        "mup_adam": 4 * 3 * numbers,
        "mup_adamw": 4 * 2 * numbers,
        "mup_sgd": 4 * numbers,
        "ternary_vote": numbers,
        "fusedbun": 4 * (accumulators + numbers),
    }
    for name, size in expected.items():
        state = FACTORIES[name]().init(params)
        assert sum(x.nbytes for x in jax.tree.leaves(state)) == size + 4, name
