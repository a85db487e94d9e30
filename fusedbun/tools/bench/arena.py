"""Parameters and gradients that all contenders of a framework step, so that a hundred of them fit in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedbun.transform import Shape

Array = NDArray[np.float32]

_LINE = 64  # bytes of a cache line, which is also how torch and XLA align their arrays
_DRAWN = 1 << 20  # numbers drawn; more of them repeat these


@dataclass
class Arena:
    """The arrays of a workload.

    Args:
        params: the parameters, of a network's usual size.
        grads: their gradients.
        threads: on how many threads a step runs.
        shared: what the contenders of a framework make of these once, by the framework's name.
    """

    params: list[Array]
    grads: list[Array]
    threads: int
    shared: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, shapes: Sequence[Shape], threads: int) -> Arena:
        """An arena of some shapes; its numbers are always the same."""
        drawn = np.random.default_rng(0).standard_normal(_DRAWN, np.float32)
        return cls(
            [_filled(s, 0.02 * drawn) for s in shapes], [_filled(s, 0.01 * drawn[::-1]) for s in shapes], threads
        )

    @property
    def parameters(self) -> int:
        """How many."""
        return sum(array.size for array in self.params)


def zeros(shape: Shape) -> Array:
    """An array of zeros that begins on a cache line."""
    size = int(np.prod(shape, dtype=np.int64))
    raw = np.zeros(size + _LINE // 4, np.float32)
    start = -raw.ctypes.data % _LINE // 4
    return raw[start : start + size].reshape(shape)


def _filled(shape: Shape, numbers: Array) -> Array:
    array = zeros(shape)
    array.reshape(-1)[:] = np.resize(numbers, array.size)
    return array
