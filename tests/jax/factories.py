"""The optimizers that the optax tests run over, and what those tests share: parameters, gradients, a run.

An optimizer gets all the generic tests with its recommended settings, or with those of its lines in `FACTORIES`.
Programs are shared: `Factory.__call__` gives the same optimizer for the same settings, and `jitted` the same compiled
step for the same optimizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sweeps import sweep

import fusedbun_jax as fj
from fusedbun.recipes import RECIPES


@dataclass(frozen=True)
class Factory:
    """A factory under its settings.

    Args:
        make: called as make(learning_rate, **settings).
        settings: its hyper-parameters.
        learning_rate: one with which it gets to the bottom of a parabola in a few hundred steps.
        undecayed: the settings without which nothing pulls the parameters to zero.
        by_sign: only the gradients' signs count, so no derivative flows through them.
        ternary: it steps weights of -1, 0 and +1, by its own learning rate.
    """

    make: Callable[..., optax.GradientTransformationExtraArgs]
    settings: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 0.1
    undecayed: dict[str, Any] = field(default_factory=dict)
    by_sign: bool = False
    ternary: bool = False

    def __call__(self, learning_rate: Any = None, **changed: Any) -> optax.GradientTransformationExtraArgs:
        rate = self.learning_rate if learning_rate is None else learning_rate
        arguments = {} if self.ternary else {"learning_rate": rate}
        return shared(self.make, **arguments, **{**self.settings, **changed})

    def injected(self, learning_rate: Any = None, **changed: Any) -> optax.GradientTransformationExtraArgs:
        """The same under inject_hyperparams."""
        rate = self.learning_rate if learning_rate is None else learning_rate
        arguments = {} if self.ternary else {"learning_rate": rate}
        return optax.inject_hyperparams(self.make)(**arguments, **{**self.settings, **changed})

    def parameters(self, dtype: Any = jnp.float32) -> dict[str, Any]:
        """Parameters that it can step."""
        return jax.tree.map(jnp.sign, parameters(dtype)) if self.ternary else parameters(dtype)


def shared(make: Callable[..., Any], **arguments: Any) -> Any:
    """The optimizer, the same one for the same arguments where these can be keys."""
    try:
        return _shared(make, **arguments)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        return make(**arguments)


@cache
def _shared(make: Callable[..., Any], **arguments: Any) -> Any:
    return make(**arguments)


def constants(make: Callable[..., Any]) -> tuple[str, ...]:
    """The arguments that a factory's docstring says inject_hyperparams leaves as they are given."""
    (said,) = re.findall(r"optax\.inject_hyperparams leaves (.*?)\sas\sthey\sare", make.__doc__ or "", re.DOTALL)
    return tuple(re.findall(r"`(\w+)`", said))


def by_rank(path: tuple[str, ...], param: Any) -> tuple[str, int] | str:
    """A rule for u-muP types that any tree satisfies, with a depth somewhere."""
    return ("weight", 4) if param.ndim > 1 else "bias"


RECOMMENDED = RECIPES["fusedbun"].recommended
WITHOUT_DECAY = {"Lambda": 0.0}
DECAY: dict[str, Any] = {"weight_decay": 1e-4, "initial_learning_rate": 0.1}
UNDECAYED = {"weight_decay": 0.0}

FACTORIES = {
    "fusedbun": Factory(fj.fusedbun, {}, 0.05, WITHOUT_DECAY),
    "recommended": Factory(fj.fusedbun, RECOMMENDED, 0.1, WITHOUT_DECAY),
    "clipped-lagged": Factory(fj.fusedbun, {"use_rms": True, "clip_rms": 0.7, "lagged": True}, 0.1, WITHOUT_DECAY),
    "flax": Factory(fj.fusedbun, {**RECOMMENDED, "channel_axis": fj.flax_channel_axis}, 0.1, WITHOUT_DECAY),
    "fusedbunw": Factory(fj.fusedbunw, {"momentum_dtype": None}, 0.1, UNDECAYED),  # int8 rounds with noise
    "sm3": Factory(fj.sm3, {}, 1.0),
    "sm3-momentum": Factory(fj.sm3, {"momentum": 0.9, "beta": 0.9}, 1.0),
    "scaled_optum": Factory(fj.scaled_optum, {"weight_decay": 1e-4}, 0.05, UNDECAYED, by_sign=True),
    "decoupled_lionw": Factory(fj.decoupled_lionw, DECAY, 0.05, UNDECAYED, by_sign=True),
    "mup_adam": Factory(fj.mup_adam, {**DECAY, "amsgrad": True, "mup": by_rank}, 0.2, UNDECAYED),
    "mup_adamw": Factory(fj.mup_adamw, {**DECAY, "mup": by_rank}, 0.2, UNDECAYED),
    "mup_sgd": Factory(fj.mup_sgd, {**DECAY, "momentum": 0.9, "dampening": 0.5, "mup": by_rank}, 0.05, UNDECAYED),
    "ternary_vote": Factory(fj.ternary_vote, {"threshold": 1}, 1.0, by_sign=True, ternary=True),
}
_LISTED = [factory.make for factory in FACTORIES.values()]
for name, recipe in RECIPES.items():
    if (make := getattr(fj, name)) not in _LISTED:
        types = {"mup": by_rank} if "mup" in recipe.defaults else {}
        undecayed = {key: value for key, value in UNDECAYED.items() if key in recipe.defaults}
        FACTORIES[name] = Factory(make, {**recipe.recommended, **types}, undecayed=undecayed, ternary=recipe.fixed_lr)


def over(names: Any, short: Any = FACTORIES) -> pytest.MarkDecorator:
    """Runs a test with each of these factories, in `make test` with those alone that are also among the `short`."""
    names, few = list(names), [FACTORIES[name] for name in short]
    return sweep("factory", [FACTORIES[name] for name in names], short=lambda factory: factory in few, ids=names)


every_factory = over(FACTORIES)
# ternary_vote's learning rate is fixed, and its weights cannot be near a minimum
descending = over(name for name, f in FACTORIES.items() if not f.ternary)
# one with axis accumulators, one with a counter beside full-size buffers, one with integer state: for expensive tests
representative = over(["recommended", "mup_adamw", "ternary_vote"], ["recommended", "ternary_vote"])
representative_descending = over(["recommended", "sm3-momentum", "mup_adamw"], ["recommended", "mup_adamw"])
# For what takes a second or so with each
FEW = ("recommended", "mup_adamw", "ternary_vote")
sweep_of_factories = over(FACTORIES, FEW)
sweep_of_descending = over((name for name, f in FACTORIES.items() if not f.ternary), FEW)
fusedbun_factories = over(name for name, f in FACTORIES.items() if f.make is fj.fusedbun)

SHAPES = {"bias": (4,), "kernel": (3, 4)}


def parameters(dtype: Any = jnp.float32) -> dict[str, Any]:
    """Parameters of two ranks with random values, the same in every call."""
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


@cache
def jitted(tx: optax.GradientTransformation) -> Callable[..., tuple[Any, Any]]:
    """`stepper(tx)`, compiled; the same function for the same optimizer."""
    return jax.jit(stepper(tx))


@cache
def jitted_update(tx: optax.GradientTransformation) -> Callable[..., tuple[Any, Any]]:
    """`tx.update`, compiled; the same function for the same optimizer."""
    return jax.jit(tx.update)


def run(tx: optax.GradientTransformation, params: Any, steps: int | range = 3, state: Any = None) -> tuple[Any, Any]:
    """Jitted steps with fresh gradients: for these step numbers, or for the first so many."""
    state = tx.init(params) if state is None else state
    for i in range(steps) if isinstance(steps, int) else steps:
        params, state = jitted(tx)(params, state, gradients(params, i))
    return params, state


def described(tree: Any) -> Any:
    """Shape, dtype and weak type of every array: what jit, scan and cond compare."""
    return jax.tree.map(lambda x: str(jax.typeof(x)), tree)
