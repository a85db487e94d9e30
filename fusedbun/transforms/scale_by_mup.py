"""The scale that u-muP gives a parameter's learning rate (Blake et al. 2024, arXiv 2407.17465)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fusedbun.hyper import PerParam, Positive
from fusedbun.transform import Array, Namespace, Signal, State, Transform


@dataclass(frozen=True)
class ScaleByMup(Transform):
    """Multiplies the update by the parameter's own scale.

        u = scale*u

    Args:
        scale: the factor, in (0, inf), or a rule `(path, param) -> factor` such as `fusedbun.mup.MupScale`.
    """

    name: ClassVar[str] = "scale_by_mup"
    scale: PerParam[Positive] = 1.0

    def update(self, xp: Namespace, signal: Signal, state: State, param: Array) -> tuple[Signal, State]:
        return Signal(self.scale * signal.update), state
