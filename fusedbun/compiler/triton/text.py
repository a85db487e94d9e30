"""The words of generated Triton: where things are, functions that kernels call, names and expressions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from fusedbun.compiler.graph import Graph, Span, Value
from fusedbun.compiler.schedule import Schedule
from fusedbun.compiler.trace import GRAD, Program
from fusedbun.operations import OPERATIONS
from fusedbun.storage.codes import BLOCK, computed_in
from fusedbun.storage.noise import word
from fusedbun.storage.rounding import PARAM

LETTER = {Span.HOST: "s", Span.SCALAR: "s", Span.COLUMN: "c", Span.ROW: "r", Span.BLOCK: "b", Span.FULL: "x"}
START = {"sum": "0.0", "max": 'float("-inf")', "min": 'float("inf")'}
COMBINE = {"max": "maximum", "min": "minimum"}
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
    "from_pairs": f"""
def from_pairs(pair, j):
    half = (j % {BLOCK} // {BLOCK // 2}).to(tl.int32)
    return (((pair.to(tl.int32) >> (4 * half)) & 15) ^ 8) - 8""",
    "to_pairs": f"""
def to_pairs(x, j, BR: tl.constexpr, BC: tl.constexpr):
    half = (j % {BLOCK} // {BLOCK // 2}).to(tl.int32)
    halves = tl.reshape((x & 15) << (4 * half), (BR, BC // {BLOCK}, 2, {BLOCK // 2}))
    return tl.reshape(tl.sum(halves, 2), (BR, BC // 2))""",
}


class Kernel(NamedTuple):
    """One kernel of a schedule: its name, what a program of it has, and its source.

    A program has a "leaf", a block of a leaf's "rows", of its "columns", or of its "elements" in memory's order.
    """

    name: str
    work: str
    source: str


class Table:
    """What a kernel is told of a leaf: the names of the integers in its row of `leaves`.

    First come addresses, of the leaf's own arrays, of its scalars, and of what is kept while a step runs; then the
    words that are given; then sizes: of each axis, the numbers of rows and columns, and the number of blocks of rows.

    Args:
        schedule: what is to be run.
    """

    def __init__(self, schedule: Schedule) -> None:
        program = schedule.program
        self.graph = program.graph
        self.numbers, self.words = numbers(program), words(program)
        arrays = {PARAM: "P", GRAD: "P", **{key: _stored(x.dtype, program) for key, x in program.arrays.items()}}
        self.pairs = {key for key, x in program.arrays.items() if x.bits}
        self.place = {v: name_of(v) for v in (*schedule.small, *schedule.kept)}
        self.parts = {v: f"q{v.number}" for v in schedule.partials}
        self.temporary = {name: v for place in (self.place, self.parts) for v, name in place.items()}
        self.dtype = {**arrays, **{name: WORD if v.is_word else NUMBER for name, v in self.temporary.items()}}
        self.addresses = [*arrays, "scalars", *self.temporary]
        given = [v.detail for v in self.words]
        self.names = [*self.addresses, *given, *(f"n{axis}" for axis in range(self.graph.ndim)), "R", "C", "B"]
        self.identifiers: list[str] = []
        for name in self.names:
            text = re.sub(r"\W", "_", name)
            self.identifiers.append(f"{text}_" if text in self.identifiers else text)

    def size(self, axes: Iterable[int]) -> str:
        """The number of elements along some axes."""
        axes = frozenset(axes)
        if axes in (self.graph.row, self.graph.columns):
            return "C" if axes == self.graph.columns else "R"
        return " * ".join(f"n{axis}" for axis in ordered(self.graph, axes))


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


def name_of(v: Value) -> str:
    """What a value is called in the code."""
    return f"{LETTER[v.span]}{v.number}"


def literal(v: Value) -> str:
    """A constant as Triton writes it."""
    number = word(v.detail) if v.is_word else v.detail
    if not np.isfinite(number):
        return f'float("{number}")'
    return repr(number) if number >= 0 else f"({number!r})"


def is_inexact(v: Value) -> bool:
    """Whether it is a constant that float32 cannot hold, to which a function would round it."""
    return v.op == "const" and not v.is_word and float(np.float32(v.detail)) != v.detail


def expression(v: Value, args: list[str]) -> str:
    """The Triton for one operation on operands with these names."""
    return args[0] if v.op == "expand" else OPERATIONS[v.op].triton.format(*args)


def reduced(v: Value, x: str, axis: int | str) -> str:
    """A reduction of a tile along one axis of it, or along "None" of them in particular."""
    keep = "" if axis == "None" else ", keep_dims=True"
    return f"tl.sum({x}, {axis}{keep})" if v.detail == "sum" else f"tl.reduce({x}, {axis}, {COMBINE[v.detail]}{keep})"


def formula(v: Value) -> str:
    """A number made of hyper-parameters, as it is computed from them."""
    if v.op in ("const", "input"):
        return f"{v.detail:g}" if v.op == "const" else str(v.detail)
    args = [formula(a) for a in v.args]
    if sign := OPERATIONS[v.op].sign:
        a, b = (f"({text})" if x.args else text for x, text in zip(v.args, args, strict=True))
        return f"{a} {sign} {b}"
    return f"{v.op}({', '.join(args)})"


def _stored(dtype: str, program: Program) -> str:
    """The type of an array of this dtype; that of what is computed in is left to the launch."""
    return NUMBER if dtype == computed_in(program.dtype) else f"tl.{dtype}"
