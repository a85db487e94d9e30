"""Clipping of every element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fusedbun.hyper import Positive
from fusedbun.transform import Array, Namespace, Signal, State, Transform


@dataclass(frozen=True)
class Clip(Transform):
    """Limits every element of the update to `threshold`; NaN stays NaN.

        u = max(-threshold, min(u, threshold))

    Args:
        threshold: the largest size of an element, in (0, inf).
    """

    name: ClassVar[str] = "clip"
    threshold: Positive = 10.0

    def for_rows(self) -> Transform:
        return self

    def update(self, xp: Namespace, signal: Signal, state: State, param: Array) -> tuple[Signal, State]:
        return Signal(xp.maximum(xp.minimum(signal.update, self.threshold), -self.threshold)), state
