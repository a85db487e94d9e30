"""Decoupled weight decay (Loshchilov, Hutter 2019, arXiv 1711.05101)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fusedbun.hyper import NonNegative, PerParam, is_concrete_zero
from fusedbun.transform import Array, Namespace, Signal, State, Transform


@dataclass(frozen=True)
class Decay(Transform):
    """Adds a share of the parameter to the update.

    After the scaling this is decoupled decay: each step shrinks the parameter by `1 - lr*weight_decay`. Before it, it
    is the gradient of an L2 penalty.

        u = u + weight_decay*p

    Args:
        weight_decay: the share, in [0, inf), or a rule `(path, param) -> share`.
    """

    name: ClassVar[str] = "decay"
    reads_param: ClassVar[bool] = True
    weight_decay: PerParam[NonNegative] = 0.01

    def update(self, xp: Namespace, signal: Signal, state: State, param: Array) -> tuple[Signal, State]:
        if is_concrete_zero(self.weight_decay):
            return Signal(signal.update), state
        return Signal(signal.update + self.weight_decay * param), state
