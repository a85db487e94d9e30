"""How a slot's numbers are stored between steps. A rule never sees a code: it computes on decoded values.

    compute     as computed: float32, or float64 for float64 parameters
    int8 int32  whole numbers, such as votes and step counters
    param float32 float16 bfloat16    in the parameter's dtype, or in this one
    block8 block4    codes of 8 or 4 bits with an exponent for every block of 32 along a row of the leading axis

What has fewer bits than it is computed in is rounded without a bias (`fusedbun.storage.noise`), float16 to the nearest.
The arrays of a slot are named after it: `moment`, its `moment.exponents`, and `moment.step`, which counts the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from fusedbun.storage import noise as rounding
from fusedbun.storage.noise import BLOCK
from fusedbun.transform import Array, Shape, Slot

WHOLE = ("int8", "int32")
FLOATING = ("float32", "float16", "bfloat16")
BITS = {"block8": 8, "block4": 4}
CODES = ("compute", *WHOLE, "param", *FLOATING, *BITS)
EXPONENTS, STEP = ".exponents", ".step"


class Stored(NamedTuple):
    """An array in memory.

    Args:
        dtype: its dtype's name.
        axes: it has the parameter's size along these axes and size 1 along the others.
        part: where it has a number for every "element" of these axes. Of a parameter's rows, "block" has one for
            every block of 32, and "pair" one for every two elements of whole blocks.
    """

    dtype: str
    axes: tuple[int, ...]
    part: Literal["element", "block", "pair"] = "element"

    def shape(self, parameter: Shape) -> Shape:
        """Its shape, for a parameter of this shape."""
        if self.part == "element":
            return tuple(n if axis in self.axes else 1 for axis, n in enumerate(parameter))
        return (parameter[0], -(-math.prod(parameter[1:]) // BLOCK), 1 if self.part == "block" else BLOCK // 2)


class Storing(rounding.Words, Protocol):
    """The array functions that encoding and decoding use."""

    def astype(self, x: Array, dtype: Any, /) -> Array: ...
    def single(self, x: Array, /) -> Array: ...  # as float32
    def index(self, like: Array, axes: Sequence[int], /) -> Sequence[Array]: ...  # places along its axes, as words
    def to_blocks(self, x: Array, /) -> Array: ...  # (rows, blocks, 32), the last block of a row filled up
    def from_blocks(self, x: Array, shape: Shape, /) -> Array: ...
    def to_pairs(self, codes: Array, /) -> Array: ...  # of blocks, to bytes
    def from_pairs(self, stored: Array, /) -> Array: ...


def computed_in(dtype: str) -> str:
    """The dtype that a parameter of some dtype is stepped in."""
    return "float64" if dtype == "float64" else "float32"


def arrays(slot: Slot, dtype: str) -> dict[str, Stored]:
    """The arrays that a slot is stored in, by what follows its name.

    Args:
        slot: the slot.
        dtype: the parameter's dtype.
    """
    code = resolved(slot.code, dtype)
    if code in BITS:
        codes = Stored("int8", slot.axes) if code == "block8" else Stored("uint8", slot.axes, "pair")
        return {"": codes, EXPONENTS: Stored("uint8", slot.axes, "block"), STEP: Stored("int32", ())}
    return {"": Stored(code, slot.axes), **({STEP: Stored("int32", ())} if is_noisy(code) else {})}


def resolved(code: str, dtype: str) -> str:
    """The code with the dtype that "compute" and "param" stand for."""
    if code not in CODES:
        raise ValueError(f"a slot's code must be one of {', '.join(CODES)}, but it is {code!r}")
    return {"compute": computed_in(dtype), "param": dtype}.get(code, code)


def is_noisy(code: str) -> bool:
    """Whether what is stored so is rounded with noise."""
    return code in BITS or code == "bfloat16"


def may_be_noisy(code: str) -> bool:
    """Whether what is stored so is rounded with noise, for some parameter's dtype."""
    return code == "param" or is_noisy(code)


def decode(xp: Storing, code: str, stored: Mapping[str, Array], shape: Shape, dtype: Any) -> Array:
    """A slot's numbers in `dtype`, the precision that is computed in.

    Args:
        xp: the functions.
        code: the slot's code, resolved.
        stored: its arrays, by what follows its name.
        shape: the parameter's shape.
        dtype: the framework's own.
    """
    if code not in BITS:
        return xp.astype(stored[""], dtype)
    words = xp.from_pairs(stored[""]) if code == "block4" else xp.to_blocks(xp.whole(stored[""]))
    numbers = rounding.decode(xp, words, xp.whole(stored[EXPONENTS]), BITS[code])
    return xp.astype(xp.from_blocks(numbers, shape), dtype)


def encode(
    xp: Storing, code: str, value: Array, stored: Mapping[str, Array], start: Array | int, index: Sequence[Array]
) -> dict[str, Array]:
    """The arrays to store for `value`, to be cast to their dtypes.

    Args:
        xp: the functions.
        code: the slot's code, resolved.
        value: its numbers.
        stored: its arrays before this step; of these the step counter is read.
        start: where the slot's noise begins; only looked at where it is noisy.
        index: the elements' places along the parameter's axes (`Storing.index`).
    """
    if not is_noisy(code):
        return {"": value}
    step = stored[STEP]
    noise = rounding.noise(start, step, index)
    after = {STEP: step + 1}
    if code == "bfloat16":
        return {"": rounding.to_bfloat16(xp, xp.single(value), noise), **after}
    blocks, noise = xp.to_blocks(xp.single(value)), xp.to_blocks(noise)
    words, exponents = rounding.encode(xp, blocks, noise, BITS[code])
    packed = xp.to_pairs(words) if code == "block4" else xp.from_blocks(words, value.shape)
    return {"": packed, EXPONENTS: exponents, **after}


# ---- what is the same in every library of arrays


def along(shape: Shape, axis: int) -> tuple[int, ...]:
    """The shape of what has a number for each index along one axis."""
    return tuple(n if i == axis else 1 for i, n in enumerate(shape))


def to_blocks(x: Array, pad: Callable[[Array, int], Array]) -> Array:
    """Rows of the leading axis cut into blocks: an array of shape (rows, blocks, 32).

    Args:
        x: an array of two or more axes.
        pad: fills rows up with so many zeros.
    """
    rows = x.reshape(x.shape[0], -1)
    missing = -rows.shape[1] % BLOCK
    return (pad(rows, missing) if missing else rows).reshape(x.shape[0], -1, BLOCK)


def from_blocks(x: Array, shape: Shape) -> Array:
    """The array of this shape that was cut into blocks."""
    return x.reshape(shape[0], -1)[:, : math.prod(shape[1:])].reshape(shape)


def to_pairs(codes: Array) -> Array:
    """Blocks of codes of 4 bits as words of 8: the low bits hold a block's first half, the high bits the other."""
    return (codes[..., : BLOCK // 2] & 15) | ((codes[..., BLOCK // 2 :] & 15) << 4)


def from_pairs(stored: Array, concatenate: Callable[..., Array]) -> Array:
    """The blocks of codes that such words were made of."""
    halves = (stored & 15), (stored >> 4)
    return concatenate([(half ^ 8) - 8 for half in halves], -1)
