"""Update clipping by root mean square (Shazeer, Stern 2018, arXiv 1804.04235, section 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fusedbun.hyper import Positive
from fusedbun.transform import Array, Namespace, Signal, State, Transform


@dataclass(frozen=True)
class ClipRMS(Transform):
    """Shrinks the update of a parameter so that its root mean square is at most `threshold`.

        u = u / max(1, sqrt(mean(u*u)) / threshold)

    Args:
        threshold: the largest root mean square, in (0, inf).
    """

    name: ClassVar[str] = "clip_rms"
    threshold: Positive = 1.0

    def update(self, xp: Namespace, signal: Signal, state: State, param: Array) -> tuple[Signal, State]:
        u = signal.update
        rms = xp.sqrt(xp.mean(u * u, axis=tuple(range(u.ndim)), keepdims=True))
        return Signal(u / xp.maximum(rms / self.threshold, 1.0)), state
