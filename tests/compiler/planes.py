"""Codes of any few bits, for tests: whole numbers of 1, 2 or 4 bits, and planes of them that share an exponent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gpu_steps
from leaves import Arrays
from rules import stateful

from fusedbun import Chain, Slot
from fusedbun.storage import codes
from fusedbun.storage.codes import EXPONENTS, Code, Stored, from_words, to_words
from fusedbun.storage.noise import shifted


@dataclass(frozen=True)
class Planes(Code):
    """Codes whose lowest bits are one plane, the bits above them the next, and so on.

    Args:
        widths: the bits of each plane, from the lowest.
    """

    widths: tuple[int, ...] = (1,)

    @property
    def bits(self) -> int:
        return sum(self.widths)

    @property
    def planes(self) -> list[tuple[str, int, int]]:
        """What follows the slot's name, the first bit, and the number of bits."""
        return [(f".plane{n}" if n else "", sum(self.widths[:n]), width) for n, width in enumerate(self.widths)]

    def arrays(self, axes: tuple[int, ...]) -> dict[str, Stored]:
        planes = {part: Stored("uint8", axes, "packed", width) for part, _, width in self.planes}
        return {**planes, EXPONENTS: Stored("uint8", axes, "block")}

    def decode(self, xp: Any, stored: Mapping[str, Any], shape: tuple[int, ...], dtype: Any) -> Any:
        words = 0
        for part, first, width in self.planes:
            plane = xp.unpack(stored[part], width)
            is_highest = first + width == self.bits
            words = words | ((plane if is_highest else plane & ((1 << width) - 1)) << first)
        numbers = from_words(xp, words, xp.whole(stored[EXPONENTS]), self.bits)
        return xp.astype(xp.from_blocks(numbers, shape), dtype)

    def encode(self, xp: Any, value: Any, noise: Any) -> dict[str, Any]:
        x = xp.to_blocks(xp.single(value))
        words, exponents = to_words(xp, x, xp.bits(x) & 0, self.bits)
        planes = {part: xp.pack(shifted(words, first) if first else words, width) for part, first, width in self.planes}
        return {**planes, EXPONENTS: exponents}


@dataclass(frozen=True)
class Whole(Code):
    """The lowest bits of whole numbers, and nothing beside them."""

    bits: int = 1

    def arrays(self, axes: tuple[int, ...]) -> dict[str, Stored]:
        return {"": Stored("uint8", axes, "packed", self.bits)}

    def decode(self, xp: Any, stored: Mapping[str, Any], shape: tuple[int, ...], dtype: Any) -> Any:
        return xp.astype(xp.from_blocks(xp.unpack(stored[""], self.bits), shape), dtype)

    def encode(self, xp: Any, value: Any, noise: Any) -> dict[str, Any]:
        return {"": xp.pack(xp.to_blocks(xp.whole(value)), self.bits)}


CODES: dict[str, Code] = {
    code.name: code
    for code in (
        Whole("whole2", bits=2),
        Planes("planes4_1", widths=(4, 1)),
        Planes("planes1_2_4", widths=(1, 2, 4)),
    )
}


def register() -> None:
    """Adds them to the table of codes, in this process."""
    codes.CODES.update(CODES)


def mean_in(code: str) -> Chain:
    """A chain that keeps a mean of a matrix in this code."""
    return stateful({"mean": Slot((0, 1), code)}, lambda xp, u, state: {"mean": 0.5 * state["mean"] + 2.0 * u})


def take(code: str, arrays: Arrays, **named: Any) -> Arrays:
    """A leaf after a step with the Triton kernels, in a process of its own."""
    register()
    ((after,),) = gpu_steps.take([mean_in(code)], [arrays], [[arrays["grad"]]], "float32", **named)
    return after
