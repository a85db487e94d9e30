"""Parameters in trees of any kind, with leaves of any rank and size."""

from dataclasses import dataclass
from typing import Any, NamedTuple

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
    representative,
    representative_descending,
    run,
    sweep_of_descending,
    sweep_of_factories,
)
from flax.core import FrozenDict

from fusedbun_jax import fusedbun


class Pair(NamedTuple):
    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclass
class Layer:
    kernel: Any
    bias: Any


def kernel():
    return jnp.asarray(np.random.default_rng(1).standard_normal((3, 4)), jnp.float32)


def bias():
    return jnp.asarray(np.random.default_rng(2).standard_normal(4), jnp.float32)


TREES = {
    "dict": lambda: {"kernel": kernel(), "bias": bias()},
    "nested": lambda: {"a": [{"kernel": kernel()}, ()], "b": {"c": {"bias": bias()}}},
    "FrozenDict": lambda: FrozenDict({"kernel": kernel(), "bias": bias()}),
    "list": lambda: [kernel(), bias()],
    "tuple": lambda: (kernel(), bias()),
    "NamedTuple": lambda: Pair(kernel(), bias()),
    "dataclass": lambda: Layer(kernel(), bias()),
    "with None": lambda: {"kernel": kernel(), "none": None, "bias": [None, bias()]},
    "integers as keys": lambda: {0: kernel(), 1: bias()},
}
EMPTY = [{}, (), [], None, {"a": None, "b": ()}, optax.EmptyState()]
LEAVES = [(), (1,), (7,), (1, 1), (1, 5), (5, 1), (2, 3, 4), (2, 1, 2, 3, 2)]
NO_ELEMENTS = [(0,), (0, 3), (3, 0), (2, 0, 3)]


@pytest.mark.parametrize("make_tree", TREES.values(), ids=TREES.keys())
def test_the_kind_of_tree_makes_no_difference(make_tree):
    tx, params = FACTORIES["recommended"](), make_tree()
    got, state = run(tx, params, 2)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    assert described(state) == described(tx.init(params))
    by_shape = {p.shape: p for p in jax.tree.leaves(got)}
    plain = {str(i): p for i, p in enumerate(jax.tree.leaves(params))}  # in the same order: the same gradients
    for p in run(tx, plain, 2)[0].values():
        np.testing.assert_array_equal(by_shape[p.shape], p)


@every_factory
def test_empty_trees(factory):
    tx = factory()
    for empty in EMPTY:
        state = tx.init(empty)
        assert jax.tree.leaves(state) == [0]  # the count
        updates, after = tx.update(empty, state, empty)
        assert jax.tree.structure((updates, after)) == jax.tree.structure((empty, state))


@sweep_of_factories
def test_leaves_of_any_rank_and_without_elements(factory):
    """Beside one another in one tree, in which each is stepped as if it were alone."""
    params = {str(shape): jnp.full(shape, 1.0, jnp.float32) for shape in LEAVES + NO_ELEMENTS}
    start = factory().init(params)
    got, state = run(factory(), params, 2)
    chex.assert_tree_all_finite((got, state))
    for name, p in got.items():
        if p.size > 1 and not (factory.ternary or "centralize" in factory.settings):
            assert (p != 1.0).all(), name
    assert described((got, state)) == described((params, start))


@representative
def test_a_bare_array_equals_one_in_a_dict(factory):
    for p in (jnp.sign(kernel()), jnp.float32(1.0)):
        alone, _ = run(factory(), p, 2)
        inside, _ = run(factory(), {"x": p}, 2)
        np.testing.assert_array_equal(alone, inside["x"])


@representative_descending
def test_arrays_of_numpys(factory):
    """As gradients and as parameters; float64 ones, NumPy's default, become JAX's default."""
    tx, params = factory(), {"kernel": kernel(), "bias": bias()}
    expected = tx.update(gradients(params), tx.init(params), params)
    for dtype in (np.float32, np.float64):
        p, g = (jax.tree.map(lambda x, d=dtype: np.asarray(x, d), t) for t in (params, gradients(params)))
        chex.assert_trees_all_equal(tx.update(g, tx.init(params), params), expected)
        chex.assert_trees_all_equal(tx.update(g, tx.init(p), p), expected)


@pytest.mark.parametrize("huge", [1e30, -1e30])
def test_an_overflow_in_numpys_gradients_is_jaxs_affair(huge):
    tx, params = fusedbun(0.1, use_rms=True), bias()
    updates, _ = tx.update(np.full(4, huge, np.float32), tx.init(params), params)  # no warning
    assert updates.shape == (4,)


def test_numbers_are_arrays_without_axes():
    tx = FACTORIES["recommended"]()
    got, state = tx.update(0.5, tx.init(1.0), 1.0)
    array, array_state = tx.update(jnp.float32(0.5), tx.init(jnp.float32(1.0)), jnp.float32(1.0))
    chex.assert_trees_all_equal((got, state), (array, array_state))
    assert described(state) == described(array_state)


@sweep_of_descending
def test_what_is_not_finite_stays_in_its_leaf_and_shows_there(factory):
    """Where only signs count an infinity is a sign like any other, and only NaN shows."""
    params = {"a": kernel(), "b": kernel() + 1}
    tx = factory()
    step, start = jitted(tx), tx.init(params)
    clean, state = step(params, start, gradients(params))
    expected, _ = step(clean, state, gradients(params))
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        broken = gradients(params)
        broken["a"] = broken["a"].at[1, 2].set(bad)
        got, broken_state = step(params, start, broken)
        again, _ = step(got, broken_state, gradients(params))
        np.testing.assert_array_equal(got["b"], clean["b"])
        np.testing.assert_array_equal(again["b"], expected["b"])
        if factory.by_sign and jnp.isinf(bad):
            assert jnp.isfinite(got["a"]).all()
        else:
            assert not jnp.isfinite(got["a"][1, 2])
            assert not jnp.isfinite(again["a"][1, 2])
