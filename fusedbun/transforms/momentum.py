"""Momentum, heavy-ball or Nesterov's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fusedbun.hyper import UnitInterval, is_concrete_zero
from fusedbun.storage.codes import MomentDtype, moment
from fusedbun.transform import Array, Namespace, Shape, Signal, Slot, State, Transform


@dataclass(frozen=True)
class Momentum(Transform):
    """Replaces the update by a decaying sum of the updates so far.

        m = beta*m + (1 - dampening)*u
        u = m                                  (nesterov: u = beta*m + (1 - dampening)*u)

    With `undampened_start` the first step of a parameter is not dampened (m = u), as in torch.optim.SGD.

    Args:
        beta: the share of the past that is kept, in [0, 1). At 0 (a Python number) there is no state and the rule is
            `u = (1 - dampening)*u`; a 0-d array is never known to be 0 in advance, so with one the state is kept.
        dampening: how much of the new update is left out, in [0, 1).
        nesterov: look ahead one step.
        undampened_start: leave nothing out in the first step.
        dtype: what the sum is stored in (`fusedbun.storage.codes`).

    State: one array of the parameter's shape, and an int32 step counter where the first step is another; none when
        `beta` is 0.
    """

    name: ClassVar[str] = "momentum"
    beta: UnitInterval = 0.9
    dampening: UnitInterval = 0.0
    nesterov: bool = False
    undampened_start: bool = False
    dtype: MomentDtype = None

    def slots(self, shape: Shape) -> Mapping[str, Slot]:
        if is_concrete_zero(self.beta):
            return {}
        counts = self.undampened_start and not is_concrete_zero(self.dampening)
        return {"moment": moment(len(shape), self.dtype), **({"count": Slot((), "int32")} if counts else {})}

    def for_rows(self) -> None:
        """Left out: a momentum goes on in rows that no gradient touches."""

    def update(self, xp: Namespace, signal: Signal, state: State, param: Array) -> tuple[Signal, State]:
        u, count = (1 - self.dampening) * signal.update, {}
        if "count" in state:
            u = xp.where(state["count"] == 0, signal.update, u)
            count = {"count": state["count"] + 1}
        if not state:
            return Signal(u), state
        m = self.beta * state["moment"] + u
        return Signal(self.beta * m + u if self.nesterov else m), {"moment": m, **count}
