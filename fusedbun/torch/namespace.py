"""torch's functions as the namespace that rules, rounding and codes are written over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedbun.operations import functions_of
from fusedbun.storage import codes
from fusedbun.transform import Array

Number = Tensor | float

globals().update(functions_of(torch))
from_blocks, pack = codes.from_blocks, codes.pack
astype, single, real, whole = Tensor.to, Tensor.float, Tensor.float, Tensor.int


def sign(x: Tensor, /) -> Tensor:
    return torch.where(x.isnan(), x, torch.sign(x))  # torch's own sign of NaN is 0


def minimum(a: Number, b: Number, /) -> Tensor:
    return torch.minimum(*_tensors(a, b))


def maximum(a: Number, b: Number, /) -> Tensor:
    return torch.maximum(*_tensors(a, b))


def _over_axes(reduce: Callable[..., Tensor], adds: bool) -> Callable[..., Tensor]:
    def over_axes(x: Tensor, /, *, axis: tuple[int, ...], keepdims: bool) -> Tensor:
        if not axis:
            return x  # torch takes an empty tuple of axes for all of them
        options: dict[str, Any] = {"dtype": _summed_in(x)} if adds else {}
        return reduce(x, dim=axis, keepdim=keepdims, **options).to(x.dtype)

    return over_axes


mean, sum = _over_axes(torch.mean, adds=True), _over_axes(torch.sum, adds=True)
max, min = _over_axes(torch.amax, adds=False), _over_axes(torch.amin, adds=False)


def _summed_in(x: Tensor) -> torch.dtype:
    """The dtype to add in.

    Compiled for a CPU a sum is one long chain, which costs float32 two digits in 50,000 terms. Eager torch and GPUs
    add in parts, which is accurate.
    """
    return torch.float64 if torch.compiler.is_compiling() and x.device.type == "cpu" else x.dtype


def bits(x: Tensor, /) -> Tensor:
    return x.view(torch.int32)


def from_bits(word: Tensor, /) -> Tensor:
    return word.view(torch.float32)


def index(like: Tensor, axes: Sequence[int], /) -> list[Tensor]:
    shape = tuple(like.shape)
    return [torch.arange(shape[i], dtype=torch.int32, device=like.device).reshape(codes.along(shape, i)) for i in axes]


def block_max(words: Tensor, /) -> Tensor:
    return words.amax(-1, keepdim=True)


def to_blocks(x: Tensor, /) -> Array:
    return codes.to_blocks(x, lambda rows, n: torch.nn.functional.pad(rows, (0, n)))


def unpack(stored: Tensor, bits: int, /) -> Array:
    return codes.unpack(whole(stored), bits, torch.cat)


def _tensors(*numbers: Number) -> list[Tensor]:
    like = next(x for x in numbers if isinstance(x, Tensor))
    return [x if isinstance(x, Tensor) else torch.full((), x, dtype=like.dtype, device=like.device) for x in numbers]
