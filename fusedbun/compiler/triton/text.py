"""The words of generated Triton: what a kernel is told of a leaf, and functions that kernels call."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from fusedbun.compiler.graph import Graph, Value
from fusedbun.compiler.printer import is_coded, name_of
from fusedbun.compiler.schedule import Schedule
from fusedbun.compiler.trace import GRAD, Program
from fusedbun.storage.codes import BLOCK, computed_in
from fusedbun.storage.rounding import PARAM

NUMBER, WORD = "T", "tl.int32"  # what is computed in
HELPERS = {
    "minimum": """
def minimum(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)""",
    "maximum": """
def maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)""",
    "sign": """
def sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))""",
    "divide": """
def divide(a, b, T: tl.constexpr):
    if T == tl.float64:
        q = a / b
    else:
        q = tl.div_rn(a, b)
    return q""",
    "sqrt": """
def sqrt(x, T: tl.constexpr):
    if T == tl.float64:
        y = tl.sqrt(x)
    else:
        y = tl.sqrt_rn(x)
    return y""",
    "log": """
def log(x, T: tl.constexpr):
    return tl.log(x.to(tl.float64)).to(T)  # the float32 one of a GPU is inexact near 1""",
    "expm1": """
def expm1(x, T: tl.constexpr):
    x = x.to(tl.float64)
    y = tl.exp(x)
    z = (y - 1) * (x / tl.where(y == 1, 1.0, tl.log(y)))  # what y was rounded by cancels
    return tl.where(y == 1, x, tl.where((y == 0) | (y == float("inf")), y - 1, z)).to(T)""",
    "block_max": f"""
def block_max(x, BR: tl.constexpr, BC: tl.constexpr):
    return tl.max(tl.reshape(x, (BR, BC // {BLOCK}, {BLOCK})), 2)""",
    "spread": f"""
def spread(b, BR: tl.constexpr, BC: tl.constexpr):
    return tl.reshape(tl.broadcast_to(b[:, :, None], (BR, BC // {BLOCK}, {BLOCK})), (BR, BC))""",
    # a block's first words are the lowest bits of its bytes; see `fusedbun.storage.codes.pack`
    "from_packed": f"""
def from_packed(byte, j, BITS: tl.constexpr):
    field = (j % {BLOCK} // ({BLOCK} * BITS // 8)).to(tl.int32)
    bits = (byte.to(tl.int32) >> (BITS * field)) & ((1 << BITS) - 1)
    return (bits ^ (1 << (BITS - 1))) - (1 << (BITS - 1))""",
    "to_packed": f"""
def to_packed(x, j, BITS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    field = (j % {BLOCK} // ({BLOCK} * BITS // 8)).to(tl.int32)
    bits = (x & ((1 << BITS) - 1)) << (BITS * field)
    fields = tl.reshape(bits, (BR, BC // {BLOCK}, 8 // BITS, {BLOCK} * BITS // 8))
    return tl.reshape(tl.sum(fields, 2), (BR, BC * BITS // 8))""",
}


class Kernel(NamedTuple):
    """One kernel of a schedule: its name, what a program of it has, its source, and the helpers that this calls.

    A program has a "leaf", a stretch of a leaf's "rows", of its "columns", or of its "elements" in memory's order.
    """

    name: str
    work: str
    source: str
    helpers: frozenset[str]


class Table:
    """What a kernel is told of a leaf: the names of the integers in its row of `leaves`.

    First come addresses, of the leaf's own arrays, of its scalars, and of what is kept while a step runs; then the
    words that are given; then sizes: of each axis, the numbers of rows and columns, and that of stretches of rows.

    Args:
        schedule: what is to be run.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.program = program = schedule.program
        self.graph, self.is_coded = program.graph, is_coded(schedule)
        self.numbers, self.words = numbers(program), words(program)
        arrays = {PARAM: "P", GRAD: "P", **{key: _stored(x.dtype, program) for key, x in program.arrays.items()}}
        self.bits = {key: x.bits for key, x in program.arrays.items() if x.bits}  # of what is packed
        self.place = {v: name_of(v) for v in (*schedule.small, *schedule.kept)}
        self.parts = {v: f"q{v.number}" for v in schedule.partials}
        self.temporary = {name: v for place in (self.place, self.parts) for v, name in place.items()}
        self.dtype = {**arrays, **{name: WORD if v.is_word else NUMBER for name, v in self.temporary.items()}}
        given, sizes = [v.detail for v in self.words], [f"n{axis}" for axis in range(self.graph.ndim)]
        self.names = [*arrays, "scalars", *self.temporary, *given, *sizes, "R", "C", "B"]
        self.identifiers: list[str] = []
        for name in self.names:
            text = re.sub(r"\W", "_", name)
            self.identifiers.append(f"{text}_" if text in self.identifiers else text)

    def sizes(self, axes: Iterable[int]) -> tuple[str, ...]:
        """The sizes whose product is the number of elements along some axes."""
        axes = frozenset(axes)
        if axes in (self.graph.row, self.graph.columns):
            return ("C" if axes == self.graph.columns else "R",)
        return tuple(f"n{axis}" for axis in ordered(self.graph, axes))


def numbers(program: Program) -> tuple[Value, ...]:
    """Of the values that Python gives, the numbers; they may be others in every step."""
    return tuple(v for v in program.scalars if not v.is_word)


def words(program: Program) -> tuple[Value, ...]:
    """Of the values that Python gives, the words; a leaf has its own."""
    return tuple(v for v in program.scalars if v.is_word)


def ordered(graph: Graph, axes: Iterable[int]) -> tuple[int, ...]:
    """Some axes, from the slowest in memory to the fastest."""
    axes = set(axes)
    return tuple(axis for axis in graph.order if axis in axes)


def _stored(dtype: str, program: Program) -> str:
    """The type of an array of this dtype; that of what is computed in is left to the launch."""
    return NUMBER if dtype == computed_in(program.dtype) else f"tl.{dtype}"
