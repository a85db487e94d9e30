"""NumPy's functions as the namespace that rules, rounding and codes are written over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fusedbun.operations import functions_of
from fusedbun.storage import codes
from fusedbun.transform import Array

globals().update(functions_of(np))
astype, max, mean, min, sum = np.astype, np.max, np.mean, np.min, np.sum
from_blocks, pack = codes.from_blocks, codes.pack


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


def unpack(stored: Any, bits: int, /) -> Array:
    return codes.unpack(whole(stored), bits, np.concatenate)
