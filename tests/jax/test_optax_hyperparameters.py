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
    constants,
    described,
    every_factory,
    fusedbun_factories,
    gradients,
    jitted,
    parameters,
    run,
    stepper,
    sweep_of_descending,
    sweep_of_factories,
)

from fusedbun_jax import fusedbun

SCHEDULES = {  # of numbers that float32 has, for optax computes schedules in it
    "learning_rate": lambda count: 0.125 - count / 32,
    "beta_decay": lambda count: 0.5 + count / 8,
    "momentum_beta": lambda count: count / 4,
    "Lambda": lambda count: 0.25 - count / 16,
    "eps": lambda count: (4 - count) / 1024,
    "momentum": lambda count: 0.5 + count / 8,
    "b1": lambda count: count / 4,
    "b2": lambda count: 0.5 + count / 8,
    "clip": lambda count: 0.5 + count / 8,
    "beta": lambda count: count / 4,
    "dampening": lambda count: 0.5 - count / 8,
    "weight_decay": lambda count: (4 - count) / 4096,
}
NOT_SCHEDULED = {"clip_rms"}  # None, which cannot be replaced by a number


def numbers(make):
    """The arguments of a factory that may change from step to step."""
    return [n for n in inspect.signature(make).parameters if n not in (*constants(make), *NOT_SCHEDULED)]


@sweep_of_descending
def test_a_scheduled_learning_rate_equals_constants_step_by_step(factory, x64):
    schedule, params = SCHEDULES["learning_rate"], parameters(jnp.float64)
    expected, state = params, factory().init(params)
    for i in range(2):
        expected, state = jitted(factory(schedule(i)))(expected, state, gradients(params, i))
    chex.assert_trees_all_close(run(factory(schedule), params, 2)[0], expected, rtol=1e-12)


@sweep_of_descending
def test_a_learning_rate_may_be_an_array(factory):
    expected = run(factory(), parameters(), 1)
    got = run(factory(jnp.float32(factory.learning_rate)), parameters(), 1)
    chex.assert_trees_all_close(got, expected, rtol=1e-6)


@sweep_of_factories
def test_injected_constants_equal_those_given_by_hand(factory, x64):
    params = factory.parameters(jnp.float64)
    tx = factory.injected()
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(stepper(tx), n=1))
    got, state = params, tx.init(params)
    for i in range(3):
        before = described((got, state))
        got, state = step(got, state, gradients(params, i))
        assert described((got, state)) == before
    expected, inner = run(factory(), params, 3)
    chex.assert_trees_all_close(got, expected, rtol=1e-12)
    chex.assert_trees_all_close(state.inner_state, inner, rtol=1e-12)
    assert factory.ternary or optax.tree.get(state, "learning_rate") == factory.learning_rate


@sweep_of_factories
def test_scheduled_numbers_equal_those_given_by_hand(factory, x64):
    """All of an optimizer's numbers change with every step."""
    schedules = {name: SCHEDULES[name] for name in numbers(factory.make)}
    params = factory.parameters(jnp.float64)
    tx = factory.injected(**schedules)
    start = tx.init(params)

    @jax.jit
    def by_hand(given, params, state, grads):
        return stepper(factory.make(**{**factory.settings, **given}))(params, state, grads)

    expected, inner = params, start.inner_state
    got, state = params, start
    for i in range(3):
        given = {name: schedule(i) for name, schedule in schedules.items()}
        expected, inner = by_hand(given, expected, inner, gradients(params, i))
        got, state = jitted(tx)(got, state, gradients(params, i))
        chex.assert_trees_all_close((got, state.inner_state), (expected, inner), rtol=1e-12)


@fusedbun_factories
def test_traced_numbers_equal_known_ones(factory, x64):
    given = {n: SCHEDULES[n](1) for n in numbers(factory.make)}
    params = parameters(jnp.float64)
    expected = run(factory(**given), params, 2)

    @jax.jit
    def step(given, params, state, grads):
        return stepper(factory.make(**{**factory.settings, **given}))(params, state, grads)

    got, state = params, factory(**given).init(params)
    for i in range(2):
        got, state = step(given, got, state, gradients(params, i))
    chex.assert_trees_all_close((got, state), expected, rtol=1e-12)


@sweep_of_descending
def test_injected_numbers_can_be_set_between_steps(factory):
    params, tx = parameters(), factory.injected(0.1)
    state = optax.tree.set(tx.init(params), learning_rate=jnp.float32(0.0))
    after, _ = run(tx, params, 1, state)
    chex.assert_trees_all_equal(after, params)


@every_factory
def test_injection_keeps_the_types_of_16_bits(factory):
    tx, params = factory.injected(), factory.parameters(jnp.bfloat16)
    state = jax.eval_shape(tx.init, params)
    assert described(jax.eval_shape(stepper(tx), params, state, params)) == described((params, state))


def test_injected_numbers_keep_float32_for_parameters_of_16_bits():
    make = optax.inject_hyperparams(fusedbun, hyperparam_dtype=jnp.float32)
    params = parameters(jnp.bfloat16)
    got, state = run(make(0.1, beta_decay=0.999, **RECOMMENDED), params, 3)
    expected, inner = run(fusedbun(0.1, beta_decay=0.999, **RECOMMENDED), params, 3)
    chex.assert_trees_all_close(state.inner_state, inner, rtol=1e-4)
    chex.assert_trees_all_close(jax.tree.map(jnp.float32, got), jax.tree.map(jnp.float32, expected), rtol=2**-8)
    assert "hyperparam_dtype=jnp.float32" in fusedbun.__doc__


def traceable(factory, name, value):
    """Whether an optimizer can be made and used where this argument is traced."""
    params = parameters()

    def updates(value):
        needed = {} if factory.ternary else {"learning_rate": 0.1}
        if factory.make is fusedbun:
            needed["centralize"] = True  # asks for the channel axis
        tx = factory.make(**{**needed, **factory.settings, name: value})
        return tx.update(gradients(params), tx.init(params), params)[0]

    try:
        jax.eval_shape(updates, value)
    except TypeError as error:
        if not (name in str(error) and ("before a step is traced" in str(error) or "must be a" in str(error))):
            raise
        return False
    return True


@every_factory
def test_the_documentation_names_exactly_the_structural_arguments(factory):
    known = {"clip_rms": 1.0}  # the default, None, cannot be traced
    # a tuple, a tree and names are no arrays
    never_traced = {"betas", "mask", "mup", "readout_constraint", "statistic", "momentum_dtype", "second_moment_dtype"}
    never_traced |= {"initial_learning_rate", "seed"}  # constants
    structural = []
    for name, parameter in inspect.signature(factory.make).parameters.items():
        value = known.get(name, 0.1 if name == "learning_rate" else parameter.default)
        if name in never_traced or not traceable(factory, name, value):
            structural.append(name)
    assert constants(factory.make) == tuple(structural)


@pytest.mark.parametrize("name", constants(fusedbun))
def test_a_structural_argument_cannot_be_scheduled(name):
    value = jnp.asarray(0 if name in ("channel_axis", "seed") else False)
    make = optax.inject_hyperparams(fusedbun)
    if name != "seed":  # which may be an array
        with pytest.raises(TypeError, match=rf"{name} must be .* it chooses code or state"):
            make(0.1, **{"centralize": True, name: value}).init(parameters())
    if name not in ("channel_axis", "stacked"):  # which may be rules
        with pytest.raises(TypeError, match=rf"{name} must be .*function"):
            make(0.1, **{name: lambda count: value}).init(parameters())


def test_a_momentum_that_passes_through_zero_keeps_its_state():
    tx = FACTORIES["recommended"].injected(0.1, momentum_beta=lambda count: jnp.where(count == 1, 0.0, 0.9))
    params, state = parameters(), tx.init(parameters())
    for i in range(3):
        before = described(state)
        params, state = run(tx, params, range(i, i + 1), state)
        assert described(state) == before
    chex.assert_tree_all_finite(params)
