"""Codes of few bits that no optimizer has, for tests: whole numbers of 2 bits, and blocks in several planes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gpu_steps
from leaves import Arrays
from rules import stateful

from fusedbun import Chain, Slot
from fusedbun.storage import codes
from fusedbun.storage.codes import Blocks, Code, Stored


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
        Blocks("block5", bits=5),  # a plane of 4 bits and one of 1
        Blocks("block7", bits=7),  # of 4, 2 and 1
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
