"""The optimizers that the optax tests run over, and what those tests share: parameters, gradients, a run.

An optimizer gets all the generic tests by one line in `FACTORIES`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fusedbun_jax
from fusedbun.transforms import Momentum, RMSScale, SM3Accumulate
from fusedbun_jax import flax_channel_axis, from_chain, fusedbun


@dataclass(frozen=True)
class Factory:
    """A factory under its settings.

    Args:
        make: called as make(learning_rate, **settings).
        settings: its hyper-parameters.
        learning_rate: one with which it gets to the bottom of a parabola in a few hundred steps.
        undecayed: the settings without which nothing pulls the parameters to zero.
    """

    make: Callable[..., optax.GradientTransformationExtraArgs]
    settings: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 0.1
    undecayed: dict[str, Any] = field(default_factory=dict)

    def __call__(self, learning_rate: Any = None, **changed: Any) -> optax.GradientTransformationExtraArgs:
        rate = self.learning_rate if learning_rate is None else learning_rate
        return self.make(rate, **{**self.settings, **changed})

    def injected(self, learning_rate: Any, **changed: Any) -> optax.GradientTransformationExtraArgs:
        """The same under inject_hyperparams, with the static arguments that the documentation names."""
        make = optax.inject_hyperparams(self.make, static_args=static_args(self.make))
        return make(learning_rate, **{**self.settings, **changed})


def static_args(make: Callable[..., Any]) -> tuple[str, ...]:
    """The `static_args` that a factory's docstring names; none where it says nothing of them."""
    found = re.search(r"static_args=(\([^)]*\))", make.__doc__ or "")
    return ast.literal_eval(found[1]) if found else ()


def sm3_chain(learning_rate: Any) -> optax.GradientTransformationExtraArgs:
    return from_chain(fusedbun_jax.chain(SM3Accumulate(0.9), RMSScale(0.0, 1e-30), Momentum(0.9, 0.9)), learning_rate)


RECOMMENDED: dict[str, Any] = {"centralize": True, "use_rms": True, "nesterov": True}
WITHOUT_DECAY = {"Lambda": 0.0}

FACTORIES = {
    "fusedbun": Factory(fusedbun, {}, 0.05, WITHOUT_DECAY),
    "recommended": Factory(fusedbun, RECOMMENDED, 0.1, WITHOUT_DECAY),
    "clipped-lagged": Factory(fusedbun, {"use_rms": True, "clip_rms": 0.7, "lagged": True}, 0.1, WITHOUT_DECAY),
    "flax": Factory(fusedbun, {**RECOMMENDED, "channel_axis": flax_channel_axis}, 0.1, WITHOUT_DECAY),
    "sm3": Factory(sm3_chain, {}, 1.0),
}
every_factory = pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES.keys())
fusedbun_factories = pytest.mark.parametrize(
    "factory",
    [f for f in FACTORIES.values() if f.make is fusedbun],
    ids=[n for n, f in FACTORIES.items() if f.settings or n == "fusedbun"],
)

SHAPES = {"bias": (4,), "kernel": (3, 4), "conv": (2, 3, 4)}


def parameters(dtype: Any = jnp.float32) -> dict[str, Any]:
    """Parameters of several ranks with random values, the same in every call."""
    rng = np.random.default_rng(3)
    values = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    return {"layer": jax.tree.map(lambda x: jnp.asarray(x, dtype), values, is_leaf=lambda x: isinstance(x, np.ndarray))}


def gradients(params: Any, step: int = 0) -> Any:
    """Random gradients for any tree of arrays, the same for the same step."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(100 + step)
    return tree.unflatten([jnp.asarray(rng.standard_normal(p.shape), p.dtype) for p in leaves])


def stepper(tx: optax.GradientTransformation) -> Callable[..., tuple[Any, Any]]:
    """`step(params, state, grads) -> (params, state)`."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def run(tx: optax.GradientTransformation, params: Any, steps: int | range = 3, state: Any = None) -> tuple[Any, Any]:
    """Jitted steps with fresh gradients: for these step numbers, or for the first so many."""
    step = jax.jit(stepper(tx))
    state = tx.init(params) if state is None else state
    for i in range(steps) if isinstance(steps, int) else steps:
        params, state = step(params, state, gradients(params, i))
    return params, state


def described(tree: Any) -> Any:
    """Shape, dtype and weak type of every array: what jit, scan and cond compare."""
    return jax.tree.map(lambda x: str(jax.typeof(x)), tree)
