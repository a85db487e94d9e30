"""Momentum, heavy-ball or Nesterov's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

from fusedbun.hyper import StateAbove0, is_concrete_zero
from fusedbun.storage.codes import MomentDtype, moment
from fusedbun.transform import Array, Namespace, Shape, Signal, Slot, State, Transform, from_start


@dataclass(frozen=True)
class Momentum(Transform):
    """Replaces the update by a decaying sum of the updates so far.

        m = beta*m + (1 - dampening)*u
        u = m                                  (nesterov: u = beta*m + (1 - dampening)*u)

    With `bias_correction` (dampening == beta), in step n = 1, 2, …, as Adam's mean is corrected for its start:

        u = m / (1 - beta**n)                  (nesterov: u = beta*m / (1 - beta**(n+1)) + (1 - beta)*u / (1 - beta**n))

    n counts the parameter's steps: a momentum that comes into being later starts at 0 without a correction.
    With `undampened_start` the first step of a parameter is not dampened (m = u), as in torch.optim.SGD.

    Args:
        beta: the share of the past that is kept, in [0, 1). At 0 (a Python number) there is no state and the rule is
            `u = (1 - dampening)*u`; a 0-d array is never known to be 0 in advance, so with one the state is kept.
        dampening: how much of the new update is left out, in [0, 1).
        nesterov: look ahead one step.
        bias_correction: divide by the weight that the updates so far have in the mean; with `dampening == beta` only.
        undampened_start: leave nothing out in the first step.
        dtype: what the sum is stored in (`fusedbun.storage.codes`).

    State: one array of the parameter's shape, and the step counter where the first steps are others; none when `beta`
        is 0.
    Source: Kingma, Ba 2015 (arXiv 1412.6980) for the correction; Dozat 2016 for Nesterov's.
    """

    name: ClassVar[str] = "momentum"
    beta: StateAbove0 = 0.9
    dampening: StateAbove0 = 0.0
    nesterov: bool = False
    bias_correction: bool = False
    undampened_start: bool = False
    dtype: MomentDtype = None

    def __post_init__(self) -> None:
        super().__post_init__()
        numbers = isinstance(self.beta, Real) and isinstance(self.dampening, Real)
        if self.bias_correction and numbers and self.beta != self.dampening:
            raise ValueError(
                f"momentum: bias_correction=True corrects a running mean, so dampening must be beta, {self.beta!r}, "
                f"but it is {self.dampening!r}"
            )
        if self.bias_correction and self.undampened_start:
            raise ValueError("momentum: bias_correction=True leaves nothing for undampened_start=True to do; give one")

    def slots(self, shape: Shape) -> Mapping[str, Slot]:
        return {} if is_concrete_zero(self.beta) else {"moment": moment(len(shape), self.dtype)}

    @property
    def counts(self) -> bool:
        starts_otherwise = self.bias_correction or (self.undampened_start and not is_concrete_zero(self.dampening))
        return starts_otherwise and not is_concrete_zero(self.beta)

    def for_rows(self) -> None:
        """Left out: a momentum goes on in rows that no gradient touches."""

    def update(self, xp: Namespace, signal: Signal, state: State, param: Array) -> tuple[Signal, State]:
        u = (1 - self.dampening) * signal.update
        if not state:
            return Signal(u), state
        if self.undampened_start and self.counts:
            u = xp.where(state["step"] == 1, signal.update, u)
        m = self.beta * state["moment"] + u
        if not self.bias_correction:
            return Signal(self.beta * m + u if self.nesterov else m), {"moment": m}
        n = state["step"]
        now = 1 / from_start(xp, self.beta, n)
        if not self.nesterov:
            return Signal(now * m), {"moment": m}
        ahead = self.beta / from_start(xp, self.beta, n + 1)
        return Signal(ahead * m + now * u), {"moment": m}
