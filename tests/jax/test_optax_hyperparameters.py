"""Hyper-parameters that change: schedules, inject_hyperparams, and those that cannot change."""

import inspect

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from factories import (
    FACTORIES,
    RECOMMENDED,
    described,
    every_factory,
    fusedbun_factories,
    gradients,
    parameters,
    run,
    static_args,
    stepper,
)

from fusedbun_jax import fusedbun

SCHEDULES = {  # of numbers that float32 has, for optax computes schedules in it
    "learning_rate": lambda count: 0.125 - count / 32,
    "beta_decay": lambda count: 0.5 + count / 8,
    "momentum_beta": lambda count: count / 4,
    "Lambda": lambda count: 0.25 - count / 16,
    "eps": lambda count: (4 - count) / 1024,
}


def by_hand(make, params, schedules, steps, state):
    """Each step by an optimizer that is made for it, with the schedule's numbers."""
    for i in range(steps):
        tx = make(**{name: float(schedule(i)) for name, schedule in schedules.items()})
        params, state = jax.jit(stepper(tx))(params, state, gradients(params, i))
    return params, state


@every_factory
def test_a_scheduled_learning_rate_equals_constants_step_by_step(factory, x64):
    schedule, params = SCHEDULES["learning_rate"], parameters(jnp.float64)
    expected, _ = by_hand(factory, params, {"learning_rate": schedule}, 3, factory().init(params))
    chex.assert_trees_all_close(run(factory(schedule), params, 3)[0], expected, rtol=1e-12)


@every_factory
def test_a_learning_rate_may_be_an_array(factory):
    expected = run(factory(0.125), parameters(), 1)
    chex.assert_trees_all_close(run(factory(jnp.float32(0.125)), parameters(), 1), expected, rtol=1e-6)


@every_factory
def test_injected_constants_equal_those_given_by_hand(factory, x64):
    params = parameters(jnp.float64)
    got, state = run(factory.injected(0.1), params, 3)
    expected, inner = run(factory(0.1), params, 3)
    chex.assert_trees_all_close((got, state.inner_state), (expected, inner), rtol=1e-12)
    assert optax.tree.get(state, "learning_rate") == 0.1


def check_schedules(factory, schedules):
    params = parameters(jnp.float64)
    tx = factory.injected(**schedules)
    start = tx.init(params).inner_state
    # A momentum of 0 given by hand has no state; any other number, however small, has.
    made = {n: (lambda i, s=s: max(float(s(i)), 1e-30)) if n == "momentum_beta" else s for n, s in schedules.items()}
    expected = by_hand(factory, params, made, 3, start)
    got, state = run(tx, params, 3)
    chex.assert_trees_all_close((got, state.inner_state), expected, rtol=1e-12)


@fusedbun_factories
def test_scheduled_numbers_equal_those_given_by_hand(factory, x64):
    check_schedules(factory, SCHEDULES)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "learning_rate"])
def test_one_scheduled_number_equals_those_given_by_hand(name, x64):
    check_schedules(FACTORIES["recommended"], {"learning_rate": SCHEDULES["learning_rate"], name: SCHEDULES[name]})


@fusedbun_factories
def test_injected_numbers_can_be_set_between_steps(factory):
    params, tx = parameters(), factory.injected(0.1)
    _, state = run(tx, params, 1)
    state = optax.tree.set(state, learning_rate=jnp.float32(0.0))
    after, _ = run(tx, params, range(1, 2), state)
    chex.assert_trees_all_equal(after, params)


@every_factory
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_injection_compiles_once_and_keeps_types(factory, dtype):
    tx, params = factory.injected(SCHEDULES["learning_rate"]), parameters(dtype)
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(stepper(tx), n=1))
    state = tx.init(params)
    before = described((params, state))
    for i in range(2):
        params, state = step(params, state, gradients(params, i))
    assert described((params, state)) == before


def test_injected_numbers_keep_float32_for_parameters_of_16_bits():
    static = static_args(fusedbun)
    make = optax.inject_hyperparams(fusedbun, static_args=static, hyperparam_dtype=jnp.float32)
    params = parameters(jnp.bfloat16)
    got, state = run(make(0.1, beta_decay=0.999, **RECOMMENDED), params, 3)
    expected, inner = run(fusedbun(0.1, beta_decay=0.999, **RECOMMENDED), params, 3)
    chex.assert_trees_all_close(state.inner_state, inner, rtol=1e-4)
    chex.assert_trees_all_close(jax.tree.map(jnp.float32, got), jax.tree.map(jnp.float32, expected), rtol=2**-8)
    assert "hyperparam_dtype=jnp.float32" in fusedbun.__doc__


def traceable(make, name, value):
    """Whether an optimizer can be made and used where this argument is traced."""
    params = parameters()

    def updates(value):
        settings = {"centralize": True, name: value}
        tx = make(0.1, **settings)
        return tx.update(gradients(params), tx.init(params), params)[0]

    try:
        jax.eval_shape(updates, value)
    except TypeError as error:
        if not (name in str(error) and "static_args" in str(error)):
            raise
        return False
    return True


@pytest.mark.parametrize("make", {f.make for f in FACTORIES.values() if f.settings}, ids=lambda make: make.__name__)
def test_the_documentation_names_exactly_the_structural_arguments(make):
    numbers = {"clip_rms": 1.0}  # the default, None, cannot be traced
    defaults = {n: p.default for n, p in inspect.signature(make).parameters.items() if n != "learning_rate"}
    structural = tuple(n for n, value in defaults.items() if not traceable(make, n, numbers.get(n, value)))
    assert static_args(make) == structural


@pytest.mark.parametrize("name", static_args(fusedbun))
def test_a_structural_argument_cannot_be_scheduled(name):
    value = jnp.asarray(0 if name == "channel_axis" else False)
    others = tuple(n for n in static_args(fusedbun) if n != name)
    make = optax.inject_hyperparams(fusedbun, static_args=others)
    with pytest.raises(TypeError, match=rf"{name} must be .*static_args"):
        make(0.1, **{"centralize": True, name: lambda count: value}).init(parameters())


def test_a_momentum_that_passes_through_zero_keeps_its_state():
    tx = FACTORIES["recommended"].injected(0.1, momentum_beta=lambda count: jnp.where(count == 1, 0.0, 0.9))
    params, state = parameters(), tx.init(parameters())
    for i in range(3):
        before = described(state)
        params, state = run(tx, params, range(i, i + 1), state)
        assert described(state) == before
    chex.assert_tree_all_finite(params)
