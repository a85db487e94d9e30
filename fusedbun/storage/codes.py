"""How a slot's numbers are stored between steps. A rule never sees a code: it computes on decoded values.

    compute     as computed: float32, or float64 for float64 parameters
    int8 int32  whole numbers, such as votes and step counters
    param float32 float16 bfloat16    in the parameter's dtype, or in this one
    block8 block4    whole numbers of 8 or 4 bits with an exponent for every block of 32 along a row of the leading axis

What has fewer bits than it is computed in is rounded without a bias (`fusedbun.storage.noise`), float16 to the nearest.
The arrays of a slot are named after it: `moment`, and its `moment.exponents`.
A code is a line of `CODES`: everything else asks it what it needs to know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol

from fusedbun.hyper import Dtypes
from fusedbun.operations import Functions
from fusedbun.storage.noise import shifted
from fusedbun.storage.rounding import SIGNLESS, to_bfloat16
from fusedbun.transform import Array, Shape, Slot

BLOCK = 32  # numbers that share an exponent
LEAST, MOST = 27, 254  # exponents that a block may have: below, its numbers count as 0; above are infinities and NaN
EXPONENTS = ".exponents"
STEP = "step"  # the counter of a parameter's steps; it belongs to no slot


class Stored(NamedTuple):
    """An array in memory.

    Args:
        dtype: its dtype's name.
        axes: it has the parameter's size along these axes and size 1 along the others.
        part: where it has a number for every "element" of these axes. Of a parameter's rows, "block" has one for
            every block of 32, and "packed" the codes of whole blocks, several to a byte.
        bits: of a packed code: 1, 2 or 4.
        stacked: the leading axes of a stack. The array has them in front, and the others are those of a slice.
    """

    dtype: str
    axes: tuple[int, ...]
    part: Literal["element", "block", "packed"] = "element"
    bits: int | None = None
    stacked: int = 0

    def shape(self, parameter: Shape) -> Shape:
        """Its shape, for a parameter of this shape."""
        stack, of = parameter[: self.stacked], parameter[self.stacked :]
        if self.part == "element":
            return (*stack, *(n if axis in self.axes else 1 for axis, n in enumerate(of)))
        return (*stack, of[0], -(-math.prod(of[1:]) // BLOCK), BLOCK * self.bits // 8 if self.bits else 1)

    def is_full(self, ndim: int) -> bool:
        """Whether it has the shape of its parameter, which has so many axes."""
        return self.part == "element" and len(self.along) == ndim

    @property
    def along(self) -> tuple[int, ...]:
        """The axes of the parameter, the stack's among them, that it has numbers along."""
        return (*range(self.stacked), *(self.stacked + axis for axis in self.axes))

    @property
    def is_by_blocks(self) -> bool:
        """Whether it is laid out by the blocks of a parameter's rows."""
        return self.part != "element"

    @property
    def is_whole(self) -> bool:
        """Whether its numbers are whole ones."""
        return "int" in self.dtype


class Storing(Functions, Protocol):
    """The array functions that encoding and decoding use beside operators and those of the table."""

    def astype(self, x: Array, dtype: Any, /) -> Array: ...
    def single(self, x: Array, /) -> Array: ...  # as float32
    def index(self, like: Array, axes: Sequence[int], /) -> Sequence[Array]: ...  # places along its axes, as words
    def to_blocks(self, x: Array, /) -> Array: ...  # (rows, blocks, 32), the last block of a row filled up
    def from_blocks(self, x: Array, shape: Shape, /) -> Array: ...
    def block_max(self, words: Array, /) -> Array: ...  # of each block, repeated for none of its elements
    def pack(self, words: Array, bits: int, /) -> Array: ...  # of blocks the lowest bits, in bytes
    def unpack(self, stored: Array, bits: int, /) -> Array: ...  # blocks of words with the sign of their highest bit


def computed_in(dtype: str) -> str:
    """The dtype that a parameter of some dtype is stepped in."""
    return "float64" if dtype == "float64" else "float32"


@dataclass(frozen=True)
class Code:
    """Numbers of the dtype that is its name, rounded to the nearest.

    Args:
        name: what slots and files call it.
        moment: what `MomentDtype` calls it; None: no moment is stored so.
    """

    name: str
    moment: str | None = None
    is_noisy: ClassVar[bool] = False  # whether what is stored so is rounded with noise

    def of(self, dtype: str) -> Code:
        """The code that it stands for where the parameter has this dtype."""
        return self

    def fits(self, axes: Shape, ndim: int) -> bool:
        """Whether a slot with these of a parameter's axes can be stored so."""
        return True

    def arrays(self, axes: Shape) -> dict[str, Stored]:
        """The arrays that a slot with these axes is stored in, by what follows its name."""
        return {"": Stored(self.name, axes)}

    def decode(self, xp: Storing, stored: Mapping[str, Array], shape: Shape, dtype: Any) -> Array:
        """A slot's numbers.

        Args:
            xp: the functions.
            stored: its arrays, by what follows its name.
            shape: the parameter's shape.
            dtype: what is computed in, the framework's own.
        """
        return xp.astype(stored[""], dtype)

    def encode(self, xp: Storing, value: Array, noise: Array | None) -> dict[str, Array]:
        """The arrays to store for `value`, to be cast to their dtypes.

        Args:
            xp: the functions.
            value: the numbers.
            noise: a word for each; None where the code is not noisy.
        """
        return {"": value}


class Computed(Code):
    """As computed: itself for float64 parameters, float32 for others."""

    def of(self, dtype: str) -> Code:
        return self if dtype == "float64" else CODES["float32"]

    def arrays(self, axes: Shape) -> dict[str, Stored]:
        return {"": Stored("float64", axes)}


class OfParameter(Code):
    """In the parameter's dtype."""

    is_noisy = True  # where that is bfloat16

    def of(self, dtype: str) -> Code:
        return CODES["compute"] if dtype == "float64" else CODES.get(dtype, Code(dtype))


class Bfloat16(Code):
    """bfloat16, rounded to either neighbour."""

    is_noisy = True

    def arrays(self, axes: Shape) -> dict[str, Stored]:
        return {"": Stored("bfloat16", axes)}

    def encode(self, xp: Storing, value: Array, noise: Array | None) -> dict[str, Array]:
        return {"": to_bfloat16(xp, xp.single(value), noise)}


@dataclass(frozen=True)
class Blocks(Code):
    """Whole numbers of few bits with an exponent for every block of 32, rounded to either neighbour.

    Args:
        bits: of a number, from 2 to 8. Fewer than 8 lie in planes of 4, 2 and 1 bits, the lowest bits first.
    """

    bits: int = 8
    is_noisy = True

    @property
    def planes(self) -> list[tuple[str, int, int]]:
        """The packed arrays: what follows the slot's name, the first bit of a number that lies there, and how many."""
        widths = [width for width in (4, 2, 1) if self.bits & width]
        firsts = [sum(widths[:n]) for n in range(len(widths))]
        return [(f".plane{n}" if n else "", *bits) for n, bits in enumerate(zip(firsts, widths, strict=True))]

    def fits(self, axes: Shape, ndim: int) -> bool:
        return ndim > 1 and sorted(axes) == [*range(ndim)]

    def arrays(self, axes: Shape) -> dict[str, Stored]:
        planes = {part: Stored("uint8", axes, "packed", width) for part, _, width in self.planes}
        return {**(planes or {"": Stored("int8", axes)}), EXPONENTS: Stored("uint8", axes, "block")}

    def decode(self, xp: Storing, stored: Mapping[str, Array], shape: Shape, dtype: Any) -> Array:
        fields = [xp.unpack(stored[part], width) for part, _, width in self.planes]
        *lower, words = fields or [xp.to_blocks(xp.whole(stored[""]))]  # the highest have the sign
        for field, (_, _, width) in reversed([*zip(lower, self.planes, strict=False)]):
            words = (words << width) | (field & ((1 << width) - 1))
        numbers = from_words(xp, words, xp.whole(stored[EXPONENTS]), self.bits)
        return xp.astype(xp.from_blocks(numbers, shape), dtype)

    def encode(self, xp: Storing, value: Array, noise: Array | None) -> dict[str, Array]:
        words, exponents = to_words(xp, xp.to_blocks(xp.single(value)), xp.to_blocks(noise), self.bits)
        planes = {part: xp.pack(words >> first if first else words, width) for part, first, width in self.planes}
        return {**(planes or {"": xp.from_blocks(words, value.shape)}), EXPONENTS: exponents}


COUNT = Stored("int32", ())  # of steps; of a stack, each slice's
CODES: dict[str, Code] = {
    code.name: code
    for code in (
        Computed("compute"),
        Code("int8"),
        Code("int32"),
        OfParameter("param", moment="param"),
        Code("float32", moment="float32"),
        Code("float16"),
        Bfloat16("bfloat16", moment="bfloat16"),
        Blocks("block8", moment="int8", bits=8),
        Blocks("block4", moment="int4", bits=4),
    )
}
MOMENTS = {code.moment: code for code in CODES.values() if code.moment}
# What a moment is stored in: "param" is the parameter's dtype, None float32 (float64 for float64 parameters). Blocks
# are too coarse for a second moment.
MomentDtype = Annotated[Any, Dtypes(tuple(MOMENTS))] | None
SecondMomentDtype = (
    Annotated[Any, Dtypes(tuple(name for name, code in MOMENTS.items() if not isinstance(code, Blocks)))] | None
)


def moment(ndim: int, dtype: str | None) -> Slot:
    """A slot of the parameter's own shape, in a `MomentDtype`; as it is computed where that does not fit its axes."""
    slot = Slot.full(ndim, MOMENTS[dtype].name if dtype else "compute")
    return slot if CODES[slot.code].fits(slot.axes, ndim) else Slot.full(ndim)


def declared(slot: Slot) -> Code:
    """The code that a slot is declared with, which may depend on the parameter's dtype."""
    if slot.code not in CODES:
        raise ValueError(f"a slot's code must be one of {', '.join(CODES)}, but it is {slot.code!r}")
    return CODES[slot.code]


def code_of(slot: Slot, dtype: str) -> Code:
    """The code in which a slot is stored for a parameter of this dtype."""
    return declared(slot).of(dtype)


def arrays(slot: Slot, dtype: str) -> dict[str, Stored]:
    """The arrays that a slot is stored in for a parameter of this dtype, by what follows its name."""
    return code_of(slot, dtype).arrays(slot.axes)


def slot_of(key: str) -> str:
    """The slot that an array belongs to: of `<transformation>.<slot>` and what follows, the first two."""
    return ".".join(key.split(".")[:2])


def recognised(stored: Mapping[str, Array], shape: Shape) -> Code:
    """The code of a slot of the parameter's shape, which shows in its arrays, by what follows its name."""
    found, axes = {part: (x.dtype.name, x.shape) for part, x in stored.items()}, tuple(range(len(shape)))
    for code in (code for code in CODES.values() if code.fits(axes, len(shape))):
        if found == {part: (x.dtype, x.shape(shape)) for part, x in code.arrays(axes).items()}:
            return code
    return Code(stored[""].dtype.name)


# ---- the arithmetic of blocks, the same in every library of arrays


def to_words(xp: Storing, x: Array, n: Array, bits: int) -> tuple[Array, Array]:
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
    words = xp.whole(xp.minimum(xp.maximum(xp.where(y == y, y, 0.0), -float(q)), float(q)))
    return words, xp.where(e < LEAST, 0, e)


def from_words(xp: Storing, words: Array, e: Array, bits: int) -> Array:
    """The numbers that blocks of codes stand for: `code*2^(e - 125 - bits)`, NaN where the exponent is that of NaN."""
    return xp.real(words) * xp.where(e == 255, float("nan"), xp.from_bits((2 - bits + _within(xp, e)) << 23))


def _within(xp: Storing, e: Array) -> Array:
    return xp.minimum(xp.maximum(e, LEAST), MOST)


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


def pack(words: Array, bits: int) -> Array:
    """The lowest bits of blocks of words, in bytes: the lowest bits of all bytes hold the first words of a block.

    Args:
        words: of shape (…, 32).
        bits: how many of each: 1, 2 or 4.
    """
    if bits not in (1, 2, 4):
        raise ValueError(f"1, 2 or 4 bits are packed, not {bits}; cut words of other widths into planes of these")
    size = BLOCK * bits // 8
    fields = [(words[..., k * size : (k + 1) * size] & ((1 << bits) - 1)) << (k * bits) for k in range(8 // bits)]
    return reduce(or_, fields)


def unpack(packed: Array, bits: int, concatenate: Callable[..., Array]) -> Array:
    """The blocks of words that were packed, whose highest bit is their sign.

    Args:
        packed: the bytes, as words.
        bits: see `pack`.
        concatenate: the library's function.
    """
    sign = 1 << (bits - 1)
    fields = [(packed >> (k * bits)) & ((1 << bits) - 1) for k in range(8 // bits)]
    return concatenate([(field ^ sign) - sign for field in fields], -1)
