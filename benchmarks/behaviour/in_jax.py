"""The JAX uses' contenders, and what they share: parameters, gradients, a run, comparison."""

from __future__ import annotations

import ast
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fusedbun_jax
from benchmarks.behaviour.in_torch import by_axes
from benchmarks.behaviour.uses import Contender
from fusedbun.recipes import RECIPES

RATE = 1e-2
SHAPES = {"bias": (8,), "kernel": (6, 8)}


def contenders() -> list[Contender]:
    """optax's adamw, and every factory of this package at the settings that its recipe recommends."""
    found = [Contender("adamw", optax.adamw, {"learning_rate": RATE}, ours=False)]
    for name, recipe in RECIPES.items():
        settings: dict[str, Any] = {"threshold": 1} if recipe.fixed_lr else {"learning_rate": RATE}
        settings |= {"mup": by_axes} if "mup" in recipe.defaults else {}
        settings |= {"initial_learning_rate": RATE} if recipe.wants_initial_lr else {}
        make = getattr(fusedbun_jax, name)
        found.append(Contender(name, make, {**settings, **recipe.recommended}, ternary=recipe.fixed_lr))
    return found


def static_args(contender: Contender) -> tuple[str, ...]:
    """The `static_args` that a factory's docstring names; none of optax's."""
    found = re.search(r"static_args=(\([^)]*\))", contender.make.__doc__ or "")
    return tuple(ast.literal_eval(found[1])) if found and contender.ours else ()


def parameters(contender: Contender, dtype: Any = jnp.float32, shapes: Any = None) -> Any:
    """A tree of parameters, the same in every call."""
    return made(SHAPES if shapes is None else shapes, 0, dtype, contender.ternary)


def gradients(params: Any, step: int = 0) -> Any:
    """Gradients for a tree, the same for the same step."""
    rng = np.random.default_rng(step + 1)
    return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)


def made(shapes: Any, seed: int, dtype: Any, ternary: bool) -> Any:
    """Random arrays of these shapes."""
    rng = np.random.default_rng(seed)

    def drawn(shape: tuple[int, ...]) -> jax.Array:
        values = rng.standard_normal(shape)
        return jnp.asarray(np.sign(values) if ternary else values, dtype)

    return jax.tree.map(drawn, shapes, is_leaf=lambda x: isinstance(x, tuple) and all(isinstance(n, int) for n in x))


def stepper(tx: Any) -> Any:
    """A step that is compiled: (params, state, grads) to (params, state)."""

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def one(tx: Any, params: Any, grads: Any, state: Any = None) -> tuple[Any, Any]:
    """A step that is not compiled: parameters and state behind it."""
    updates, state = tx.update(grads, tx.init(params) if state is None else state, params)
    return optax.apply_updates(params, updates), state


def run(tx: Any, params: Any, steps: int | range = 3, state: Any = None) -> tuple[Any, Any]:
    """Parameters and state behind these steps, which are not compiled: operations are shared, programs are not."""
    for i in range(steps) if isinstance(steps, int) else steps:
        params, state = one(tx, params, gradients(params, i), state)
    return params, state


def assert_same(found: Any, wanted: Any, off: float = 0.0) -> None:
    """Equality, to the last bit or to within `off` of 1."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted), "the trees differ"
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype), "shapes or dtypes differ"
        assert np.allclose(np.float64(x), np.float64(y), rtol=off, atol=off, equal_nan=True), "the numbers differ"


def assert_moved(after: Any, before: Any) -> None:
    """Every parameter is another one, is finite, and has its shape and dtype."""
    assert jax.tree.structure(after) == jax.tree.structure(before), "the trees differ"
    for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype), "shapes or dtypes differ"
        assert bool(jnp.isfinite(x).all()), "a parameter is not finite"
        assert not x.size or bool((x != y).any()), "a parameter does not move"
