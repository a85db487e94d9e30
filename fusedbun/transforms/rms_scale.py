"""Scaling by the root of the second moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fusedbun.hyper import NonNegative, is_concrete_zero
from fusedbun.transform import Array, Namespace, Signal, State, Transform


@dataclass(frozen=True)
class RMSScale(Transform):
    """Divides the update by the root of the second moment `nu` that the accumulator directly before it made.

        u = u / (sqrt(nu + eps_root) + eps)        where 0/0 is 0

    Args:
        eps: added to the root, in [0, inf).
        eps_root: added under the root, in [0, inf). With both 0 an element that never had a gradient stays 0.

    Raises:
        ValueError: no accumulator stands directly before it.
    """

    name: ClassVar[str] = "rms_scale"
    reads_second_moment: ClassVar[bool] = True
    eps: NonNegative = 1e-8
    eps_root: NonNegative = 0.0

    def for_rows(self) -> Transform:
        return self

    def update(self, xp: Namespace, signal: Signal, state: State, param: Array) -> tuple[Signal, State]:
        u, nu, root = signal
        if nu is None and root is None:
            raise ValueError(
                "rms_scale: there is no second moment to scale by; "
                "put an accumulator such as sm3_accumulate directly before it"
            )
        if root is None:
            root = xp.sqrt(nu + self.eps_root)
        elif not is_concrete_zero(self.eps_root):
            root = xp.sqrt(root * root + self.eps_root)
        divisor = root + self.eps
        return Signal(u / xp.where(divisor + xp.abs(u) == 0, 1.0, divisor)), state
