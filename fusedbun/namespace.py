"""NumPy's functions as the namespace that rules, rounding and codes are written over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy import abs, astype, expm1, floor, log, max, maximum, mean, min, minimum, sign, sqrt, sum, where

from fusedbun.storage import codes
from fusedbun.transform import Array, Shape

__all__ = ["abs", "astype", "expm1", "log", "max", "maximum", "mean", "min", "minimum", "sign", "sqrt", "sum", "where"]
__all__ += ["bits", "block_max", "floor", "from_bits", "from_blocks", "index", "pack", "real", "single"]
__all__ += ["to_blocks", "unpack", "whole"]


def single(x: Array, /) -> Array:
    return x.astype(np.float32)


real = single


def bits(x: Array, /) -> Array:
    return x.view(np.int32)


def from_bits(word: Array, /) -> Array:
    return word.view(np.float32)


def whole(x: Array, /) -> Array:
    return x.astype(np.int32)


def index(like: Array, axes: Sequence[int], /) -> list[Array]:
    return [np.arange(like.shape[i], dtype=np.int32).reshape(codes.along(like.shape, i)) for i in axes]


def block_max(words: Array, /) -> Array:
    return words.max(axis=-1, keepdims=True)


def to_blocks(x: Array, /) -> Array:
    return codes.to_blocks(x, lambda rows, n: np.pad(rows, ((0, 0), (0, n))))


def from_blocks(x: Array, shape: Shape, /) -> Array:
    return codes.from_blocks(x, shape)


def pack(words: Array, bits: int, /) -> Array:
    return codes.pack(words, bits)


def unpack(stored: Any, bits: int, /) -> Array:
    return codes.unpack(whole(stored), bits, np.concatenate)
