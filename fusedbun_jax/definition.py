"""The definition run by JAX: a whole chain as transformations of optax's, one after the other."""

from __future__ import annotations

from typing import Any

import optax

from fusedbun.chain import Chain
from fusedbun.storage.codes import Stored
from fusedbun_jax.lift import lift
from fusedbun_jax.rounding import ARRAYS, round_stochastically, round_to_params
from fusedbun_jax.state import arrays_of


def transformation(
    chain: Chain, scale: optax.GradientTransformation | optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """The chain, the learning rate, and the rounding of the updates; its state is a tuple of theirs.

    Args:
        chain: the chain.
        scale: multiplies by the negative learning rate.
    """
    seed = chain.rounding.seed
    last = round_stochastically(seed) if chain.rounding.stochastic else round_to_params()
    return optax.chain(*(lift(t, seed) for t in chain), scale, last)


def arrays_by_state(chain: Chain, param: Any) -> list[dict[str, Stored]]:
    """What a parameter has in the state of each transformation, and in that of stochastic rounding where it is on."""
    arrays = [arrays_of(t.slots(param.shape), param.dtype.name) for t in chain]
    return [*arrays, ARRAYS] if chain.rounding.stochastic else arrays
