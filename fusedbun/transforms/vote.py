"""Votes for the next value of a ternary weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fusedbun.hyper import Votes
from fusedbun.transform import Array, Namespace, Shape, Signal, Slot, State, Transform

LARGEST = 127  # of an int8: votes saturate here and never wrap


@dataclass(frozen=True)
class Vote(Transform):
    """Sums the signs of the gradients, and steps a ternary weight by one against a sum that is large enough.

        v = clip(v + sign(u), -127, 127)               a NaN does not vote
        t = p - sign(v) where abs(v) >= threshold, else p
        v = 0 where abs(v) >= threshold
        u = p - clip(t, -1, 1)                         NaN where the gradient is

    With a learning rate of 1 the weights stay in {-1, 0, +1}.

    Args:
        threshold: the size of the sum at which the weight steps, a whole number in [1, 127].

    State: one int8 array of the parameter's shape.
    """

    name: ClassVar[str] = "vote"
    reads_param: ClassVar[bool] = True
    threshold: Votes = 8

    def slots(self, shape: Shape) -> Mapping[str, Slot]:
        return {"votes": Slot.full(len(shape), "int8")}

    def update(self, xp: Namespace, signal: Signal, state: State, param: Array) -> tuple[Signal, State]:
        g = signal.update
        ballot = xp.where(g == g, xp.sign(g), 0.0)  # NaN alone differs from itself
        votes = clip(xp, state["votes"] + ballot, LARGEST)
        decided = xp.abs(votes) >= self.threshold
        target = clip(xp, param - xp.where(decided, xp.sign(votes), 0.0), 1)
        return Signal(xp.where(g == g, param - target, g)), {"votes": xp.where(decided, 0.0, votes)}


def clip(xp: Namespace, x: Array, size: float) -> Array:
    """`x` within [-size, size]."""
    return xp.minimum(xp.maximum(x, -size), size)
