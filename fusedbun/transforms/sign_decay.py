"""Weight decay by the parameter's sign."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fusedbun.hyper import NonNegative, is_concrete_zero
from fusedbun.transform import Array, Namespace, Signal, State, Transform


@dataclass(frozen=True)
class SignDecay(Transform):
    """Adds the parameter's sign to the update, so that every step takes it nearer to zero by the same amount.

        u = u + weight_decay*sign(p)

    Args:
        weight_decay: how much of a step goes to the decay, in [0, inf).
    """

    name: ClassVar[str] = "sign_decay"
    reads_param: ClassVar[bool] = True
    weight_decay: NonNegative = 0.01

    def update(self, xp: Namespace, signal: Signal, state: State, param: Array) -> tuple[Signal, State]:
        if is_concrete_zero(self.weight_decay):
            return Signal(signal.update), state
        return Signal(signal.update + self.weight_decay * xp.sign(param)), state
