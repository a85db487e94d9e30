"""How a step's results are rounded: to the nearest, or with noise to either neighbour, without a bias."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from fusedbun.operations import Functions
from fusedbun.storage import noise
from fusedbun.transform import Array

PARAM = "param"
SIGNLESS, QUIET = 0x7FFFFFFF, 0x00400000  # of float32: all bits but the sign, and the one that makes a NaN quiet


@dataclass(frozen=True)
class Rounding:
    """How a step's results are rounded where they are stored in fewer bits than they are computed in."""

    stochastic: bool = False  # round bfloat16 parameters to either neighbour, without a bias, not to the nearest
    seed: Any = 0  # any integer, or a word; with the parameter's name and the number of steps it decides all noise
    name: str = ""  # the parameter's; `Chain.at` puts it here
    starts: tuple[tuple[str, Any], ...] = ()  # where the noise of arrays begins, by name, as far as it is known already
    place: tuple[Any, ...] = ()  # of a slice in its stack, along the axes that all of its elements have in front

    def start(self, key: str) -> Any:
        """Where the noise of an array begins, the parameter's or a slot's (`fusedbun.storage.noise.start`)."""
        for known, start in self.starts:
            if known == key:
                return start
        return noise.start(self.seed, self.name, 0 if key == PARAM else zlib.crc32(key.encode()))

    def at(self, param: Any) -> Rounding:
        """That of one parameter, any framework's: those that are not bfloat16 are rounded to the nearest."""
        if not self.stochastic or str(param.dtype).endswith("bfloat16"):
            return self
        return replace(self, stochastic=False)

    def of_updates(self, dtype: str) -> str:
        """The dtype of updates that optax adds to parameters of this one."""
        return "float32" if self.stochastic else dtype

    def of(self, name: str, keys: Iterable[str]) -> Rounding:
        """The same for the parameter of this name, with the starts of these arrays' noise computed once for all."""
        named = replace(self, name=name, starts=())
        return replace(named, starts=tuple((key, named.start(key)) for key in keys))


TO_NEAREST = Rounding()


def to_bfloat16(xp: Functions, x: Array, n: Array) -> Array:
    """Float32 numbers rounded by their noise `n` to a neighbour in bfloat16, each as often as they lie near to it.

    They stay float32, and NaN and infinities what they are.
    """
    b = xp.bits(x)
    return xp.from_bits(xp.where(x == x, b + n, b | QUIET) & noise.word(0xFFFF0000))  # an infinity's zeros stay


def to_nearest_bfloat16(xp: Functions, x: Array) -> Array:
    """Float32 numbers rounded to the nearest in bfloat16, of two as near to the one whose last bit is 0."""
    return to_bfloat16(xp, x, ((xp.bits(x) >> 16) & 1) + 0x7FFF)


def neighbours(xp: Functions, x: Array) -> tuple[Array, Array]:
    """The numbers in bfloat16 next to float32 numbers that are some of them; of infinities one is NaN."""
    b = xp.bits(x)
    return xp.from_bits(b - 0x10000), xp.from_bits(b + 0x10000)


def nearest_update(
    xp: Functions,
    param: Array,
    change: Array,
    rounded: Callable[[Array], Array],
    neighbours: Callable[[Array], Iterable[Array]],
) -> Array:
    """The update in a parameter's dtype whose sum with it, rounded to that, is nearest to `param + change`.

        u = rounded(param + change) - param, or its neighbour whose sum with param is nearer

    The difference of two numbers within a factor of two of one another is a number of their format (Sterbenz), so for
    such a step `param + u` is exactly the once-rounded result; for a larger one it is that or a neighbour of it.

    Args:
        xp: the functions.
        param: numbers of the dtype, in the precision that is computed in, as all others.
        change: what would be added if nothing were rounded.
        rounded: rounds to the nearest in the dtype.
        neighbours: the numbers of the dtype next to one of them.
    """

    def miss(u: Array) -> Array:
        return abs(rounded(param + u) - (param + change))

    best = rounded(rounded(param + change) - param)
    for other in neighbours(best):
        best = xp.where(miss(other) < miss(best), other, best)
    return best
