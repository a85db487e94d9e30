"""The definition run by JAX: a whole chain as one transformation of optax's."""

from __future__ import annotations

from functools import partial
from typing import Any

import optax

from fusedbun.chain import Chain
from fusedbun.storage.codes import STEP, Stored
from fusedbun_jax import leaf
from fusedbun_jax.lift import update_leaf
from fusedbun_jax.rounding import to_either, to_nearest
from fusedbun_jax.state import Arrays, TransformState, over_leaves, zeros


class IrregularError(Exception):
    """The definition must take the step, or say what is wrong; the message says why."""


def transformation(chain: Chain, scale: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The chain, what scales by the negative learning rate, and rounding.

    Its state is a tuple: of every transformation its own, of the scale its own, and the counters of the steps.
    """
    seed = chain.rounding.seed
    rounded = partial(to_either, seed) if chain.rounding.stochastic else to_nearest

    def init(params: optax.Params) -> tuple[Any, ...]:
        leaves, tree = leaf.flatten(params)
        by_leaf = [_start(chain, path, param) for path, param in leaves]
        places = range(len(chain.transforms) + 1)
        states = [TransformState(tree.unflatten([arrays[i] for arrays in by_leaf])) for i in places]
        return join_state(states, scale.init(params))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **_: Any
    ) -> tuple[optax.Updates, tuple[Any, ...]]:
        try:
            (*states, counter), rate_state = split_state(chain, state)
        except IrregularError as error:
            raise ValueError(f"{error}; make one with init") from None
        for i, transform in enumerate(chain):
            step = partial(update_leaf, transform, seed)
            updates, states[i] = over_leaves(step, updates, states[i], params, counter)
        updates, rate_state = scale.update(updates, rate_state, params)
        updates, counter = over_leaves(rounded, updates, counter, params)
        return updates, join_state([*states, counter], rate_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _start(chain: Chain, path: leaf.KeyPath, param: Any) -> list[Arrays]:
    """A leaf's arrays at their start, for every state."""
    param, _ = leaf.floating(path, "parameter", param)
    with leaf.noted(path):
        by_state = arrays_by_state(chain.at(leaf.names(path), param), param)
    return [{name: zeros(stored, param) for name, stored in arrays.items()} for arrays in by_state.values()]


def join_state(states: list[TransformState], rate_state: Any) -> tuple[Any, ...]:
    """The state of `transformation`, of those of the chain's transformations and the counters, and the scale's."""
    *of_chain, counter = states
    return (*of_chain, rate_state, counter)


def split_state(chain: Chain, state: Any) -> tuple[list[TransformState], Any]:
    """What `join_state` has joined; an IrregularError for another optimizer's state."""
    if not isinstance(state, tuple) or len(state) != len(chain.transforms) + 2:
        raise IrregularError("the state is another optimizer's")
    *states, rate_state, counter = state
    if not all(isinstance(x, TransformState) for x in (*states, counter)):
        raise IrregularError("the state is another optimizer's")
    return [*states, counter], rate_state


def arrays_by_state(chain: Chain, param: Any) -> dict[str, dict[str, Stored]]:
    """The arrays of a parameter in each of these states, by the names of the transformations and of the counter."""
    by_state: dict[str, dict[str, Stored]] = {name: {} for name in (*(t.name for t in chain), STEP)}
    for key, stored in chain.arrays(param.shape, param.dtype.name).items():
        owner, _, name = key.partition(".")
        by_state[owner][name or STEP] = stored
    return by_state
