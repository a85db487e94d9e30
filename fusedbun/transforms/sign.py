"""The sign of the update (Bernstein, Wang, Azizzadenesheli, Anandkumar 2018, arXiv 1802.04434)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fusedbun.transform import Array, Namespace, Signal, State, Transform


@dataclass(frozen=True)
class Sign(Transform):
    """Replaces every element of the update by its sign: -1, 0 or +1, and NaN for NaN.

    u = sign(u)
    """

    name: ClassVar[str] = "sign"

    def update(self, xp: Namespace, signal: Signal, state: State, param: Array) -> tuple[Signal, State]:
        return Signal(xp.sign(signal.update)), state
