"""torch's functions as the namespace that a rule is written over (`fusedbun.transform.Namespace`)."""

from __future__ import annotations

import torch
from torch import Tensor, abs, expm1, log, sqrt, where

__all__ = ["abs", "astype", "expm1", "log", "max", "maximum", "mean", "min", "minimum", "sign", "sqrt", "sum", "where"]


def astype(x: Tensor, dtype: torch.dtype, /) -> Tensor:
    return x.to(dtype)


def sign(x: Tensor, /) -> Tensor:
    return torch.where(x.isnan(), x, torch.sign(x))  # torch's own sign of NaN is 0


def minimum(a: Tensor | float, b: Tensor | float, /) -> Tensor:
    return torch.minimum(*_tensors(a, b))


def maximum(a: Tensor | float, b: Tensor | float, /) -> Tensor:
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


def _tensors(a: Tensor | float, b: Tensor | float) -> tuple[Tensor, Tensor]:
    if not isinstance(a, Tensor):
        assert isinstance(b, Tensor)
        a = torch.full((), a, dtype=b.dtype, device=b.device)
    if not isinstance(b, Tensor):
        b = torch.full((), b, dtype=a.dtype, device=a.device)
    return a, b
