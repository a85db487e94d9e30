"""Numbers in fewer bits: the noise that rounds without a bias, and codes for blocks of 32 numbers.

All of it is arithmetic that every framework does alike, so NumPy, torch, JAX and the kernels give the same bits. A
*word* is an int32 whose products and sums wrap; `Words` lists the few functions that are needed beside operators.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from fusedbun.operations import Functions
from fusedbun.transform import Array

BLOCK = 32  # numbers that share an exponent
PARAM_STREAM = 0  # the noise of the parameter; that of the coded slots follows
GOLDEN = 0x9E3779B9  # keys of streams and axes lie this far apart
SIGNLESS, QUIET = 0x7FFFFFFF, 0x00400000  # of float32: all bits but the sign, and the one that makes a NaN quiet
LEAST, MOST = 27, 254  # exponents that a block may have: below, its numbers count as 0; above are infinities and NaN


class Words(Functions, Protocol):
    """The array functions that rounding and codes use beside operators."""

    def block_max(self, words: Array, /) -> Array: ...  # of each block, repeated for none of its elements


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


@lru_cache(maxsize=1 << 16)
def start(seed: int, name: str, stream: int) -> int:
    """Where the noise of one array begins: a word made of the run's seed, the parameter's name and the stream.

    mix(mix(seed + stream*GOLDEN) + crc32(name))
    """
    seeded = mix(np.array([word(seed + stream * GOLDEN)], np.int32))
    return int(mix(seeded + np.int32(word(zlib.crc32(name.encode()))))[0])


def noise(start: Array | int, step: Array, index: Sequence[Array]) -> Array:
    """Whole numbers, uniform in [0, 65535], one for each element: a function of its place and of nothing else.

        key = mix(start + step)
        n   = mix(mix(key) + sum_i mix(mix(key + (i + 1)*GOLDEN) + index_i)) >> 16

    So any part of an array, by rows, by blocks or on shards, is given the noise that it has in the whole.

    Args:
        start: see `start`.
        step: how many steps came before, as a word.
        index: for each axis the elements' places along it, as words of size 1 along the others.
    """
    key = mix(step + start)
    h = mix(key)
    for i, at in reversed([*enumerate(index)]):  # the leading axis last: what is added grows as late as it can
        h = mix(mix(key + word((i + 1) * GOLDEN)) + at) + h
    return shifted(mix(h), 16)


def to_bfloat16(xp: Words, x: Array, n: Array) -> Array:
    """`x` rounded to one of its two neighbours in bfloat16, to each as often as it lies near to it; still a float32.

    Args:
        xp: the functions.
        x: float32 numbers; NaN and infinities stay what they are.
        n: their noise.
    """
    b = xp.bits(x)
    return xp.from_bits(xp.where(x == x, b + n, b | QUIET) & word(0xFFFF0000))  # to an infinity's zeros n adds nothing


def encode(xp: Words, x: Array, n: Array, bits: int) -> tuple[Array, Array]:
    """Blocks of numbers as small whole numbers, and the exponent that a block shares.

    They are rounded without a bias, but what is larger than the largest code is clipped to it.

        e    = the largest exponent in the block, of float32
        code = floor(x*2^(125 + bits - e) + (n + 0.5)/2^16), within [-q, q], q = 2^(bits - 1) - 1
        code = 0 where e < 27, which is too small for a scale, or e = 255, that of NaN and infinities

    Args:
        xp: the functions.
        x: float32 numbers, in blocks. One NaN or infinity makes its block NaN.
        n: their noise.
        bits: of a code.

    Returns:
        The codes and the blocks' exponents, as words.
    """
    q = 2 ** (bits - 1) - 1
    e = shifted(xp.block_max(xp.bits(x) & SIGNLESS), 23)  # an integer maximum: exact, and NaN is the largest
    scale = xp.from_bits((252 + bits - _within(xp, e)) << 23)  # a power of two: the product is exact
    scale = xp.where(e < LEAST, 0.0, xp.where(e == 255, float("nan"), scale))
    y = xp.floor(x * scale + (xp.real(n) + 0.5) * 2.0**-16)
    codes = xp.whole(xp.minimum(xp.maximum(xp.where(y == y, y, 0.0), -float(q)), float(q)))
    return codes, xp.where(e < LEAST, 0, e)


def decode(xp: Words, codes: Array, e: Array, bits: int) -> Array:
    """The numbers that blocks of codes stand for: `code*2^(e - 125 - bits)`, NaN where the exponent is that of NaN."""
    return xp.real(codes) * xp.where(e == 255, float("nan"), xp.from_bits((2 - bits + _within(xp, e)) << 23))


def _within(xp: Words, e: Array) -> Array:
    return xp.minimum(xp.maximum(e, LEAST), MOST)
