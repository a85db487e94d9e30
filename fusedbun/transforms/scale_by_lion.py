"""Lion (Chen et al. 2023, arXiv 2302.06675, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fusedbun.hyper import UnitInterval
from fusedbun.storage.codes import MomentDtype, moment
from fusedbun.transform import Array, Namespace, Shape, Signal, Slot, State, Transform


@dataclass(frozen=True)
class ScaleByLion(Transform):
    """The sign of the update mixed with its running mean, which then moves on at a pace of its own.

        c = beta1*m + (1 - beta1)*u
        m = beta2*m + (1 - beta2)*u
        u = sign(c)

    Args:
        beta1: the share of the mean in the step, in [0, 1).
        beta2: the share of the past that the mean keeps, in [0, 1).
        dtype: what the mean is stored in (`fusedbun.storage.codes`).

    State: one array of the parameter's shape.
    """

    name: ClassVar[str] = "scale_by_lion"
    beta1: UnitInterval = 0.9
    beta2: UnitInterval = 0.99
    dtype: MomentDtype = None

    def slots(self, shape: Shape) -> Mapping[str, Slot]:
        return {"moment": moment(len(shape), self.dtype)}

    def update(self, xp: Namespace, signal: Signal, state: State, param: Array) -> tuple[Signal, State]:
        u, m = signal.update, state["moment"]
        c = self.beta1 * m + (1 - self.beta1) * u
        return Signal(xp.sign(c)), {"moment": self.beta2 * m + (1 - self.beta2) * u}
