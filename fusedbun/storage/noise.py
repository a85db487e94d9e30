"""The noise that rounds numbers without a bias: words drawn for every element from its place.

All of it is arithmetic that every framework does alike, so NumPy, torch, JAX and the kernels draw the same bits. A
*word* is an int32 whose products and sums wrap.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from fusedbun.transform import Array

GOLDEN = 0x9E3779B9  # keys of streams and axes lie this far apart


def word(number: int) -> int:
    """The int32 with the same bits as a whole number of up to 32 bits."""
    number &= 0xFFFFFFFF
    return number - (1 << 32) if number >> 31 else number


def shifted(word: Array, n: int) -> Array:
    """A word shifted right as if it had no sign."""
    return (word >> n) & ((1 << (32 - n)) - 1)


def mix(h: Array) -> Array:
    """A hash of a word, each bit of which depends on all bits of `h` (the finaliser "lowbias32")."""
    h = (h ^ shifted(h, 16)) * word(0x7FEB352D)
    h = (h ^ shifted(h, 15)) * word(0x846CA68B)
    return h ^ shifted(h, 16)


def start(seed: Array | int, name: str, stream: int) -> Array | int:
    """Where the noise of one array begins: a word made of the run's seed, the parameter's name and the stream.

        mix(mix(seed + stream*GOLDEN) + crc32(name))

    Args:
        seed: any integer, or a framework's array of one as a word.
        name: the parameter's.
        stream: a number of the array.
    """
    return _start_of(seed, name, stream) if isinstance(seed, int) else _start(seed, name, stream)


@lru_cache(maxsize=1 << 16)
def _start_of(seed: int, name: str, stream: int) -> int:
    return int(_start(np.array([word(seed)], np.int32), name, stream)[0])


def _start(seed: Array, name: str, stream: int) -> Array:
    return mix(mix(seed + word(stream * GOLDEN)) + word(zlib.crc32(name.encode())))


def draw(start: Array | int, step: Array, index: Sequence[Array], stack: Sequence[Array | int] = ()) -> Array:
    """Whole numbers, uniform in [0, 65535], one for each element: a function of its place and of nothing else.

        key = mix(start + step)
        n   = mix(mix(key) + sum_i mix(mix(key + (i + 1)*GOLDEN) + index_i)) >> 16

    The axes are a stack's, and then those of a slice. So any part of an array, by rows, by blocks or on shards, is
    given the noise that it has in the whole.

    Args:
        start: see `start`.
        step: how many steps came before, as a word.
        index: for each axis the elements' places along it, as words of size 1 along the others.
        stack: of a slice, its place along the axes that are before these.
    """
    key = mix(step + start)
    h = mix(key)
    axes = [*enumerate(stack), *reversed([*enumerate(index, len(stack))])]
    for i, at in axes:  # the leading axis last: what is added grows as late as it can
        h = mix(mix(key + word((i + 1) * GOLDEN)) + at) + h
    return shifted(mix(h), 16)
