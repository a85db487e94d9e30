"""Whether arrays share memory, exactly: several threads may write to arrays at once that do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusedbun.torch.leaf import Leaf

_SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # for NumPy has no bfloat16


class Written(NamedTuple):
    """A dense tensor on the CPU, and what a message calls it; one that is only read may share memory with its like."""

    name: str
    tensor: Tensor
    is_written: bool = True


def arrays_in(leaf: Leaf) -> Iterator[Written]:
    """The arrays that a step of a leaf reads and writes."""
    yield Written(leaf.name, leaf.param)
    if leaf.grad is not None:
        yield Written(f"the gradient of {leaf.name}", leaf.grad, is_written=False)
    for key in filter(leaf.arrays.__contains__, leaf.state):
        yield Written(f"the state {key!r} of {leaf.name}", leaf.state[key])


def check_overlap(arrays: Sequence[Written]) -> None:
    """Raises a ValueError where an array that is written shares memory with another, or has two elements in a place."""
    for array in arrays:
        if array.is_written and _overlaps_itself(array.tensor):
            raise ValueError(
                f"{array.name} has several elements in one place of memory (shape {tuple(array.tensor.shape)}, "
                f"strides {array.tensor.stride()}), so that no step of it is defined; give its contiguous() copy"
            )
    reach: list[tuple[int, Written]] = []  # arrays that end behind the present one's start, with their ends
    for start, end, array in sorted(((*_range(a.tensor), a) for a in arrays), key=lambda ranged: ranged[:2]):
        reach = [(e, other) for e, other in reach if e > start]
        for _, other in reach:
            if (array.is_written or other.is_written) and _share(array.tensor, other.tensor):
                raise ValueError(
                    f"{other.name} and {array.name} share memory, which a step of both at once would spoil; "
                    f"give one of them a copy, or step them with implementation='definition'"
                )
        reach.append((end, array))


def _range(x: Tensor) -> tuple[int, int]:
    """The first address of a tensor, and the one behind its last."""
    start = x.data_ptr()
    length = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) + 1
    return start, start + length * x.element_size() if x.numel() else start


def _overlaps_itself(x: Tensor) -> bool:
    steps = sorted((step, n) for n, step in zip(x.shape, x.stride(), strict=True) if n > 1)
    reach = 0  # of the axes seen so far
    for step, n in steps:
        if step <= reach:
            break
        reach += (n - 1) * step
    else:
        return False
    offsets = np.zeros(1, np.int64)
    for step, n in steps:
        offsets = (offsets[:, None] + step * np.arange(n)).ravel()
    return len(np.unique(offsets)) < len(offsets)


def _share(*tensors: Tensor) -> bool:
    a, b = (x.detach().view(_SAME_SIZE[x.element_size()]).numpy() for x in tensors)
    return np.shares_memory(a, b)
