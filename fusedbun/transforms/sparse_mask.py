"""The sparse mask: elements too small to matter are set to zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fusedbun.hyper import NonNegative
from fusedbun.transform import Array, Namespace, Signal, State, Transform


@dataclass(frozen=True)
class SparseMask(Transform):
    """Sets every element of the update whose size is at most `eps` to zero.

        u = where(abs(u) <= eps, 0, u)

    The comparison is this way round so that NaN stays NaN.

    Args:
        eps: the threshold, in [0, inf).
    """

    name: ClassVar[str] = "sparse_mask"
    eps: NonNegative = 1e-8

    def update(self, xp: Namespace, signal: Signal, state: State, param: Array) -> tuple[Signal, State]:
        u = signal.update
        return Signal(xp.where(xp.abs(u) <= self.eps, 0.0, u)), state
