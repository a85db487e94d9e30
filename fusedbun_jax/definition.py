"""The definition run by JAX: a whole chain as transformations of optax's, one after the other."""

from __future__ import annotations

from typing import Any

import optax

from fusedbun.chain import Chain
from fusedbun.storage.codes import Stored
from fusedbun_jax.lift import lift
from fusedbun_jax.rounding import round_stochastically, round_to_params
from fusedbun_jax.state import TransformState


class IrregularError(Exception):
    """The definition must take the step, or say what is wrong; the message says why."""


def transformation(chain: Chain, scale: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The chain, what scales by the negative learning rate, and rounding; its state is a tuple of theirs."""
    seed = chain.rounding.seed
    last = round_stochastically(seed) if chain.rounding.stochastic else round_to_params()
    return optax.chain(*(lift(t, seed) for t in chain), scale, last)


def join_state(chain: Chain, states: list[TransformState], rate_state: Any) -> tuple[Any, ...]:
    """The state of `transformation`, of those of the chain's transformations and of stochastic rounding if it is on."""
    count = len(chain.transforms)
    return (*states[:count], rate_state, *(states[count:] or [optax.EmptyState()]))


def split_state(chain: Chain, state: Any) -> tuple[list[TransformState], Any]:
    """What `join_state` has joined; an IrregularError for another optimizer's state."""
    if not isinstance(state, tuple) or len(state) != len(chain.transforms) + 2:
        raise IrregularError("the state is another optimizer's")
    *states, rate_state, rounding = state
    states += [rounding] if chain.rounding.stochastic else []
    if not all(isinstance(x, TransformState) for x in states):
        raise IrregularError("the state is another optimizer's")
    return states, rate_state


def arrays_by_state(chain: Chain, param: Any) -> dict[str, dict[str, Stored]]:
    """The arrays of a parameter in each of these states, by the names of the transformations and of rounding.

    Raises:
        ValueError: such a parameter cannot be rounded so.
    """
    by_state: dict[str, dict[str, Stored]] = {t.name: {} for t in chain}
    for key, stored in chain.arrays(param.shape, param.dtype.name).items():
        owner, _, name = key.partition(".")
        by_state.setdefault(owner, {})[name] = stored
    return by_state
