"""The graph of a step: every value that a chain computes for one parameter, each computed once.

A value spans some of the parameter's axes. One axis, the slowest in memory, is the *row* axis; the others together are
the *columns*, so that every parameter is a matrix of rows and columns here. By what it spans a value is

    FULL     of the parameter's size
    BLOCK    one number for every 32 elements along a row
    ROW      one number for each row
    COLUMN   one number for each column, or for each index along some of the column axes
    SCALAR   one number
    HOST     one number made of hyper-parameters alone; Python computes it before the step runs

Reductions come in three kinds: `across` a row (FULL to ROW), `down` the rows (FULL to COLUMN, ROW to SCALAR), and
`within` the columns (COLUMN to fewer of the column axes); `block_max` is the one within blocks (FULL to BLOCK).
`expand` repeats a number for every column it stands for.

Beside numbers there are conditions, the results of comparisons, and *words*: integers of 32 bits whose arithmetic
wraps, of which rounding's noise and codes are made (`fusedbun.storage.noise`).
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fusedbun.operations import OPERATIONS, Kind

Axes = frozenset[int]
REDUCTIONS = ("across", "down", "within")


class UnschedulableError(Exception):
    """A chain has no schedule; the message says why. Its rules are then run as they are written."""


class Span(enum.IntEnum):
    """What a value spans, from little to much."""

    HOST = 0
    SCALAR = 1
    COLUMN = 2
    ROW = 3
    BLOCK = 4
    FULL = 5


@dataclass(frozen=True, eq=False, repr=False)  # a repr of the arguments' arguments would have no end
class Value:
    """One value of a graph."""

    number: int  # its place in the graph
    op: str  # the operation that makes it: one of `OPERATIONS` or `REDUCTIONS`, or what has a method of `Graph`
    args: tuple[Value, ...]  # the values that it is made of
    axes: Axes  # the parameter's axes that it spans
    span: Span
    # an input's name, a constant's number, a reduction's function ("sum", "max" or "min"), a count's axes, an index's
    # axis; None for other operations
    detail: Any
    varies: Axes  # those of its axes along which its numbers may differ; along the others they are repeated
    kind: Kind = "number"  # what its elements are

    @property
    def is_condition(self) -> bool:
        return self.kind == "condition"

    @property
    def is_word(self) -> bool:
        return self.kind == "word"

    def __str__(self) -> str:
        parts = [self.op, *([str(self.detail)] if self.detail is not None else [])]
        return f"%{self.number} = {' '.join([*parts, *(f'%{a.number}' for a in self.args)])}"

    __repr__ = __str__


class Graph:
    """The values of a step. Whoever asks for the same value twice is given the one that there is."""

    def __init__(self, ndim: int, order: tuple[int, ...] | None = None) -> None:
        self.ndim = ndim  # the parameter's number of axes, at least 1; a parameter of one axis is one row
        self.order = order or tuple(range(ndim))  # its axes from the slowest in memory to the fastest
        self.every = frozenset(range(ndim))
        self.row = frozenset(self.order[:1]) if ndim > 1 else frozenset()
        self.columns = self.every - self.row
        self._spans = {self.row: Span.ROW, frozenset(): Span.SCALAR, self.every: Span.FULL}
        self.values: list[Value] = []
        self._known: dict[tuple[Any, ...], Value] = {}

    def input(self, name: str, axes: Iterable[int], is_word: bool = False, part: str = "element") -> Value:
        """An array in memory: the parameter, its gradient, or one of the state (`fusedbun.storage.codes.Stored`)."""
        axes = self.every & set(axes)
        if part != "element" and self.order != tuple(range(self.ndim)):
            raise UnschedulableError(f"{name} is for blocks along the parameter's axes as they are, not {self.order}")
        if self.row < axes < self.every:
            raise UnschedulableError(
                f"{name} spans the axes {sorted(axes)}: with the slowest in memory, some of the others"
            )
        return self._value("input", (), axes, name, Span.BLOCK if part == "block" else None, _kind(is_word))

    def hyperparameter(self, name: str, is_word: bool = False) -> Value:
        """A number that Python gives with every step."""
        return self._value("input", (), frozenset(), name, Span.HOST, _kind(is_word))

    def constant(self, number: float, is_word: bool = False) -> Value:
        detail = int(number) if is_word else float(number)
        return self._value("const", (), frozenset(), detail, Span.HOST, _kind(is_word))

    def index(self, axis: int) -> Value:
        """The elements' places along an axis, from 0 up."""
        return self._value("index", (), frozenset([axis]), axis, kind="word")

    def count(self, axes: Iterable[int]) -> Value:
        """How many elements the parameter has along these axes."""
        return self._value("count", (), frozenset(), tuple(sorted(axes)), Span.SCALAR)

    def apply(self, op: str, *operands: Any) -> Value:
        """An operation on values and numbers, element by element."""
        operation, is_of_words = OPERATIONS[op], any(isinstance(x, Value) and x.is_word for x in operands)
        kind = _kind(is_of_words)
        args = tuple(x if isinstance(x, Value) else self.constant(x, is_of_words) for x in operands)
        if is_of_words and any(x.kind == "number" for x in args):
            raise UnschedulableError(f"a rule computes with words and numbers at once ({op})")
        if not is_of_words and (operand := _equal_operand(op, args)):
            return operand
        if any(a.is_condition for a in (args[1:] if op == "where" else args)):
            raise UnschedulableError(f"a rule computes with a comparison as a number ({op}); write it with xp.where")
        if operation.takes not in ("any", kind):
            raise UnschedulableError(f"a rule computes with {kind}s where only {operation.takes}s will do ({op})")
        if op in ("minimum", "maximum") and not is_of_words:
            return self._extreme(op, args)
        return self._elementwise(op, args, kind if operation.gives == "same" else operation.gives)

    def adopt(self, v: Value, args: tuple[Value, ...]) -> Value:
        """The same operation as another graph's value, on operands of this graph.

        They span what that value's operands span, or are hyper-parameters instead.
        """
        span = Span.HOST if args and all(a.span == Span.HOST for a in args) else v.span
        return self._value(v.op, args, v.axes, v.detail, span, v.kind)

    def block_max(self, x: Value) -> Value:
        """The largest of the words of each block, as numbers without a sign."""
        return self._value("block_max", (x,), self.every, None, Span.BLOCK, "word")

    def reduce(self, function: str, x: Value, axes: Iterable[int]) -> Value:
        """The sum, maximum or minimum over some of the parameter's axes, which stay with size 1."""
        over = x.axes & set(axes)
        if not over:
            return x
        if function == "sum" and not over <= x.varies:
            raise UnschedulableError("a rule takes the sum over axes along which its numbers are only repeated")
        if x.span == Span.FULL and (over == self.every or not self.row & over):
            if over | self.row != self.every:
                raise UnschedulableError(
                    f"a rule takes the {function} over some, but not all, of the axes {sorted(self.columns)}, "
                    f"which follow the slowest in memory"
                )
            x = self._value("across", (x,), self.row, function, Span.ROW)
            return self._value("down", (x,), frozenset(), function) if over == self.every else x
        if x.span != Span.COLUMN:
            x = self._value("down", (x,), x.axes - self.row, function)
        over -= self.row
        return self._value("within", (x,), x.axes - over, function) if over else x

    def _extreme(self, op: str, args: tuple[Value, ...]) -> Value:
        """Minima and maxima are exact in any order, so the small operands come first and the full ones last."""
        flat = [y for x in args for y in (x.args if x.op == op and x.span > Span.HOST else (x,))]
        small, *others = sorted(flat, key=lambda x: (x.span, x.number))
        for x in others:
            small = self._elementwise(op, (small, x), "number")
        return small

    def _elementwise(self, op: str, args: tuple[Value, ...], kind: Kind) -> Value:
        axes = Axes().union(*(a.axes for a in args))
        spans = {a.span for a in args}
        if spans <= {Span.HOST}:
            return self._value(op, args, axes, None, Span.HOST, kind)
        if Span.BLOCK in spans and spans <= {Span.HOST, Span.SCALAR, Span.BLOCK}:
            return self._value(op, args, axes, None, Span.BLOCK, kind)
        if self.row & axes and axes - self.row:  # a row's number beside a column's is a full value
            axes, args = self.every, tuple(map(self._expand, args))
        return self._value(op, args, axes, None, kind=kind)

    def _expand(self, x: Value) -> Value:
        """A value of some of the column axes repeated for every column; others as they are."""
        in_part = x.span == Span.COLUMN and x.axes != self.columns
        return self._value("expand", (x,), self.columns, None, kind=x.kind) if in_part else x

    def _value(
        self, op: str, args: tuple[Value, ...], axes: Axes, detail: Any, span: Span | None = None, kind: Kind = "number"
    ) -> Value:
        span = self._spans.get(axes, Span.COLUMN) if span is None else span
        sign = str(detail) if detail == 0 else ""  # 0 and -0 are equal
        key = (op, tuple(a.number for a in args), detail, sign, axes, span, kind)
        if key not in self._known:
            varies = axes.intersection(Axes().union(*(a.varies for a in args))) if args else axes
            self._known[key] = Value(len(self.values), op, args, axes, span, detail, varies, kind)
            self.values.append(self._known[key])
        return self._known[key]


def _kind(is_word: bool) -> Kind:
    return "word" if is_word else "number"


def _equal_operand(op: str, args: tuple[Value, ...]) -> Value | None:
    """The operand that the result equals in every bit: in `1*x`, `x/1`, and `x + 0` where x is never -0."""
    first, last = args[0], args[-1]
    for x, other in ((first, last), (last, first)):
        if op == "mul" and _is_constant(other, 1):
            return x
        if op == "add" and _is_constant(other, 0) and _is_never_minus_zero(x):
            return x
    return first if op == "div" and _is_constant(last, 1) else None


def _is_constant(v: Value, number: float) -> bool:
    return v.op == "const" and v.detail == number


def _is_never_minus_zero(v: Value) -> bool:
    if v.op == "add":  # -0 only where both are
        return any(map(_is_never_minus_zero, v.args))
    if v.op == "mul":
        return v.args[0] is v.args[1]
    return v.op == "abs" or (v.op == "sqrt" and _is_never_minus_zero(v.args[0]))
