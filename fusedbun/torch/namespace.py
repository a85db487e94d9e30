"""torch's functions as the namespace that rules, rounding and codes are written over."""

from __future__ import annotations

from collections.abc import Sequence

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


# torch takes an empty tuple of axes for all of them.


def mean(x: Tensor, /, *, axis: tuple[int, ...], keepdims: bool) -> Tensor:
    return torch.mean(x, dim=axis, keepdim=keepdims, dtype=_summed_in(x)).to(x.dtype) if axis else x


def sum(x: Tensor, /, *, axis: tuple[int, ...], keepdims: bool) -> Tensor:
    return torch.sum(x, dim=axis, keepdim=keepdims, dtype=_summed_in(x)).to(x.dtype) if axis else x


def max(x: Tensor, /, *, axis: tuple[int, ...], keepdims: bool) -> Tensor:
    return torch.amax(x, dim=axis, keepdim=keepdims) if axis else x


def min(x: Tensor, /, *, axis: tuple[int, ...], keepdims: bool) -> Tensor:
    return torch.amin(x, dim=axis, keepdim=keepdims) if axis else x


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


def _tensors(a: Number, b: Number) -> tuple[Tensor, Tensor]:
    if not isinstance(a, Tensor):
        assert isinstance(b, Tensor)
        a = torch.full((), a, dtype=b.dtype, device=b.device)
    if not isinstance(b, Tensor):
        b = torch.full((), b, dtype=a.dtype, device=a.device)
    return a, b
