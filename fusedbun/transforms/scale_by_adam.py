"""Adam's scaling (Kingma, Ba 2015, arXiv 1412.6980)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fusedbun.hyper import NonNegative, UnitInterval
from fusedbun.storage.codes import MomentDtype, SecondMomentDtype, moment
from fusedbun.transform import Array, Namespace, Shape, Signal, Slot, State, Transform, from_start


@dataclass(frozen=True)
class ScaleByAdam(Transform):
    """Scales the update's running mean by the root of the running mean of its square, both corrected for their start.

        m = beta1*m + (1 - beta1)*u
        v = beta2*v + (1 - beta2)*u*u
        w = v                               (amsgrad: w = max(w, v))
        u = m / (1 - beta1**n) / (sqrt(w / (1 - beta2**n)) + eps)          in step n = 1, 2, …

    Args:
        beta1: the share of the past that the mean keeps, in [0, 1).
        beta2: the share of the past that the mean of squares keeps, in [0, 1).
        eps: added to the root, in [0, inf).
        amsgrad: divide by the largest mean of squares so far (Reddi, Kale, Kumar 2018, arXiv 1904.09237).
        dtype: what the mean is stored in (`fusedbun.storage.codes`).
        second_dtype: what the mean of squares is stored in. Codes of 8 and 4 bits are not for it: they have no number
            between 0 and a hundredth of a block's largest, and a root of 0 is divided by.

    State: two arrays of the parameter's shape (amsgrad: three) and the step counter.
    """

    name: ClassVar[str] = "scale_by_adam"
    beta1: UnitInterval = 0.9
    beta2: UnitInterval = 0.999
    eps: NonNegative = 1e-8
    amsgrad: bool = False
    dtype: MomentDtype = None
    second_dtype: SecondMomentDtype = None

    def slots(self, shape: Shape) -> Mapping[str, Slot]:
        k = len(shape)
        second = moment(k, self.second_dtype)
        largest = {"largest": second} if self.amsgrad else {}
        return {"moment": moment(k, self.dtype), "second_moment": second, **largest}

    @property
    def counts(self) -> bool:
        return True

    def update(self, xp: Namespace, signal: Signal, state: State, param: Array) -> tuple[Signal, State]:
        u = signal.update
        n = state["step"]
        m = self.beta1 * state["moment"] + (1 - self.beta1) * u
        v = self.beta2 * state["second_moment"] + (1 - self.beta2) * u * u
        w = xp.maximum(state["largest"], v) if self.amsgrad else v
        root = xp.sqrt(w / from_start(xp, self.beta2, n)) + self.eps
        after = {"moment": m, "second_moment": v} | ({"largest": w} if self.amsgrad else {})
        return Signal(m / from_start(xp, self.beta1, n) / root), after
