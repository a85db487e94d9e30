"""What optax's tests of `tree.map_params`, `tree.get` and `tree.set` ask of a state, however it is laid out."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from factories import (
    every_factory,
    gradients,
    jitted,
    jitted_update,
    over,
    run,
    sweep_of_descending,
    sweep_of_factories,
)
from test_optax_masks import MASKS, parameters

few = over(["recommended", "sm3-momentum", "mup_adamw"], ["sm3-momentum"])


def scheduled(factory):
    return factory() if factory.ternary else factory(optax.linear_schedule(0.1, 0.0, 10))


def inside(factory):
    """In all that optax puts around an optimizer."""
    return {
        "alone": scheduled(factory),
        "masked": optax.masked(factory(), MASKS["of leaves"]),
        "partition": optax.partition({0: factory(), 1: optax.adam(0.1)}, {"a": 0, "b": [1, 0], "c": 0}),
        "inject_hyperparams": factory.injected(),
        "MultiSteps": optax.MultiSteps(factory(), 2).gradient_transformation(),
        "apply_if_finite": optax.apply_if_finite(factory(), 2),
        "chain": optax.chain(optax.clip(1.0), factory(), optax.scale_by_schedule(lambda step: 1.0)),
        "named_chain": optax.named_chain(("ours", factory()), ("scale", optax.scale(0.5))),
    }


@every_factory
def test_what_is_of_parameters_and_what_is_not_make_up_the_state(factory):
    params = parameters(factory)
    for name, tx in inside(factory).items():
        state = tx.init(params)
        same = optax.tree.map_params(tx, lambda x: x, state)
        chex.assert_trees_all_equal(same, state)
        of_params = optax.tree.map_params(tx, lambda x: 1, state, transform_non_params=lambda x: None)
        others = optax.tree.map_params(tx, lambda x: None, state)
        assert set(jax.tree.leaves(of_params)) <= {1}
        arrays = [len(jax.tree.leaves(tree)) for tree in (of_params, others, state)]
        assert arrays[0] + arrays[1] == arrays[2], name
        assert (arrays[0] > 0) == any(x.ndim for x in jax.tree.leaves(state)), name


@sweep_of_factories
def test_hyperparameters_are_not_of_parameters(factory):
    """They stay where all that is of parameters is made one larger."""
    tx, params = factory.injected(), parameters(factory)
    state = tx.init(params)
    larger = optax.tree.map_params(tx, lambda x: x + jnp.ones((), x.dtype), state)
    chex.assert_trees_all_equal(larger.hyperparams, state.hyperparams)
    inner = [jax.tree.leaves(s.inner_state) for s in (larger, state)]
    assert all((x == y + 1).all() for x, y in zip(*inner, strict=True) if y.ndim)


def until_ten(step):
    return jnp.where(step < 10, 0.1, 0.0)


@sweep_of_descending
def test_the_count_of_a_schedule_is_found_and_set(factory):
    """By its name, also in compiled code; the next step has the learning rate of the step that was set."""
    params = factory.parameters()
    tx = factory(until_ten, **factory.undecayed)
    state = tx.init(params)
    assert optax.tree.get(state, "count") == 0
    _, state = run(tx, params, 2)
    assert optax.tree.get(state, "count") == 2
    end = jax.jit(lambda state, count: optax.tree.set(state, count=count))(state, jnp.int32(10))
    assert jax.jit(lambda state: optax.tree.get(state, "count"))(end) == 10
    assert jax.tree.structure(end) == jax.tree.structure(state)
    updates, _ = jitted_update(tx)(gradients(params), end, params)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    updates, _ = jitted_update(tx)(gradients(params), state, params)
    assert any(u.any() for u in jax.tree.leaves(updates))


@every_factory
def test_what_is_not_there_is_not_found(factory):
    state = scheduled(factory).init(parameters(factory))
    assert optax.tree.get(state, "ema") is None
    assert optax.tree.get(state, "ema", default=7.0) == 7.0
    assert optax.tree.get_all_with_path(state, "ema") == []
    with pytest.raises(KeyError):
        optax.tree.set(state, ema=1.0)


@few
def test_what_is_there_twice_is_found_twice(factory):
    """And set in both, or in the one that a filter picks by the name of its state."""
    tx, params = optax.chain(scheduled(factory), scheduled(factory)), factory.parameters()
    state = tx.init(params)
    with pytest.raises(KeyError, match="multiple values for 'count'"):
        optax.tree.get(state, "count")
    both = optax.tree.set(state, count=jnp.int32(5))
    assert [count.item() for _, count in optax.tree.get_all_with_path(both, "count")] == [5, 5]

    def is_of_the_first(path, _):
        return path[0].idx == 0

    assert optax.tree.get(state, "count", filtering=is_of_the_first) == 0
    first = optax.tree.set(state, is_of_the_first, count=jnp.int32(3))
    assert [count.item() for _, count in optax.tree.get_all_with_path(first, "count")] == [3, 0]
    with_noise = optax.chain(optax.transforms.add_noise(1.0, 0.9, key=0), scheduled(factory)).init(params)
    counts = optax.tree.get_all_with_path(with_noise, "count")
    assert len(counts) == 2
    assert optax.tree.get(with_noise, "AddNoiseState").count == 0
    assert optax.tree.get(with_noise, "count", filtering=lambda path, _: path[0].idx == 1) == 0


@few
def test_an_injected_rate_is_found_and_set_in_compiled_code(factory):
    params, tx = factory.parameters(), factory.injected(optax.exponential_decay(0.1, 1, 0.5))
    state = tx.init(params)

    def is_number(_, value):
        return isinstance(value, jax.Array)

    find = jax.jit(lambda state: optax.tree.get(state, "learning_rate", filtering=is_number))
    for step in range(3):
        params, state = jitted(tx)(params, state, gradients(params, step))
        assert find(state) == pytest.approx(0.1 * 0.5**step, rel=1e-6)
    fixed = factory.injected(0.1)
    state = jax.jit(lambda state, rate: optax.tree.set(state, learning_rate=rate))(fixed.init(params), 0.0)
    assert optax.tree.get(state, "learning_rate") == 0.0
    _, state = jitted(fixed)(params, state, gradients(params))
    assert optax.tree.get(state, "learning_rate") == 0.0
