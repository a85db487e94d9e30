"""The graph of a step: every value that a chain computes for one parameter, each computed once.

A value spans some of the parameter's axes. One axis, the slowest in memory, is the *row* axis; the others together are
the *columns*, so that every parameter is a matrix of rows and columns here. By what it spans a value is

    FULL     of the parameter's size
    ROW      one number for each row
    COLUMN   one number for each column, or for each index along some of the column axes
    SCALAR   one number
    HOST     one number made of hyper-parameters alone; Python computes it before the step runs

Reductions come in three kinds: `across` a row (FULL to ROW), `down` the rows (FULL to COLUMN, ROW to SCALAR), and
`within` the columns (COLUMN to fewer of the column axes). `expand` repeats a number for every column it stands for.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
ARITHMETIC = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
FUNCTIONS = ("neg", "abs", "sign", "sqrt", "expm1", "log", "minimum", "maximum", "where")
REDUCTIONS = ("across", "down", "within")


class UnplannableError(Exception):
    """A chain that no plan expresses, with the reason. The definition itself runs instead."""


class Span(enum.IntEnum):
    """What a value spans, from little to much."""

    HOST = 0
    SCALAR = 1
    COLUMN = 2
    ROW = 3
    FULL = 4


@dataclass(frozen=True, eq=False, repr=False)  # a repr of the arguments' arguments would have no end
class Value:
    """One value of a graph.

    Args:
        number: its place in the graph.
        op: the operation that makes it: one of those above, "input", "const" or "count".
        args: the values that it is made of.
        axes: the parameter's axes that it spans.
        span: see `Span`.
        detail: what else says what it is: an input's name, a constant's number, a reduction's function ("sum", "max",
            "min"), or the axes whose elements are counted.
        varies: those of its axes along which its numbers may differ. Along the others they are repeated.
    """

    number: int
    op: str
    args: tuple[Value, ...]
    axes: frozenset[int]
    span: Span
    detail: Any
    varies: frozenset[int]

    @property
    def is_condition(self) -> bool:
        return self.op in COMPARISONS

    def __str__(self) -> str:
        parts = [self.op, *([str(self.detail)] if self.detail is not None else [])]
        return f"%{self.number} = {' '.join([*parts, *(f'%{a.number}' for a in self.args)])}"

    __repr__ = __str__


class Graph:
    """Values by what they are, so that what is computed twice becomes one.

    Args:
        ndim: the parameter's number of axes, at least 1. A parameter of one axis is one row.
        order: its axes from the slowest in memory to the fastest; None: as they are.
    """

    def __init__(self, ndim: int, order: tuple[int, ...] | None = None) -> None:
        self.ndim = ndim
        self.order = order or tuple(range(ndim))
        self.every = frozenset(range(ndim))
        self.row = frozenset(self.order[:1]) if ndim > 1 else frozenset()
        self.columns = self.every - self.row
        self.values: list[Value] = []
        self._known: dict[tuple[Any, ...], Value] = {}

    def input(self, name: str, axes: Iterable[int]) -> Value:
        """An array that is given: the parameter, its gradient, or a slot."""
        axes = self.every & set(axes)
        if self.row < axes < self.every:
            raise UnplannableError(
                f"{name} spans the axes {sorted(axes)}: with the slowest in memory, some of the others"
            )
        return self._value("input", (), axes, name)

    def hyperparameter(self, name: str) -> Value:
        """A number that Python gives with every step."""
        return self._value("input", (), frozenset(), name, Span.HOST)

    def constant(self, number: float) -> Value:
        return self._value("const", (), frozenset(), float(number), Span.HOST)

    def count(self, axes: Iterable[int]) -> Value:
        """How many elements the parameter has along these axes."""
        return self._value("count", (), frozenset(), tuple(sorted(axes)), Span.SCALAR)

    def apply(self, op: str, *operands: Any) -> Value:
        """An operation on values and numbers, element by element."""
        args = tuple(x if isinstance(x, Value) else self.constant(x) for x in operands)
        if (same := _unchanged(op, args)) is not None:
            return same
        if any(a.is_condition for a in (args[1:] if op == "where" else args)):
            raise UnplannableError(f"a rule computes with a comparison as a number ({op}); write it with xp.where")
        if op in ("minimum", "maximum"):
            return self._extreme(op, args)
        return self._elementwise(op, args)

    def reduce(self, function: str, x: Value, axes: Iterable[int]) -> Value:
        """The sum, maximum or minimum over some of the parameter's axes, which stay with size 1."""
        over = x.axes & set(axes)
        if not over:
            return x
        if function == "sum" and not over <= x.varies:
            raise UnplannableError("a rule takes the sum over axes along which its numbers are only repeated by a plan")
        if x.span == Span.COLUMN:
            return self._value("within", (x,), x.axes - over, function)
        if x.span == Span.FULL and (over == self.every or not self.row & over):
            if over | self.row != self.every:
                raise UnplannableError(
                    f"a rule takes the {function} over some, but not all, of the axes {sorted(self.columns)}, "
                    f"which follow the slowest in memory"
                )
            x = self._value("across", (x,), self.row, function, Span.ROW)
            return self._value("down", (x,), frozenset(), function) if over == self.every else x
        x = self._value("down", (x,), x.axes - self.row, function)
        over -= self.row
        return self._value("within", (x,), x.axes - over, function) if over else x

    def _extreme(self, op: str, args: tuple[Value, ...]) -> Value:
        """Minima and maxima are exact in any order, so the small operands come first and the full ones last."""
        flat = [y for x in args for y in (x.args if x.op == op and x.span > Span.HOST else (x,))]
        small, *others = sorted(flat, key=lambda x: (x.span, x.number))
        for x in others:
            small = self._elementwise(op, (small, x))
        return small

    def _elementwise(self, op: str, args: tuple[Value, ...]) -> Value:
        axes = frozenset[int]().union(*(a.axes for a in args))
        if self.row & axes and axes - self.row:
            axes = self.every  # a row's number beside a column's is a full value
            args = tuple(self._expand(a) for a in args)
        span = Span.HOST if all(a.span == Span.HOST for a in args) else None
        return self._value(op, args, axes, None, span)

    def _expand(self, x: Value) -> Value:
        in_part = x.span == Span.COLUMN and x.axes != self.columns
        return self._value("expand", (x,), self.columns, None) if in_part else x

    def _value(
        self, op: str, args: tuple[Value, ...], axes: frozenset[int], detail: Any, span: Span | None = None
    ) -> Value:
        span = self._span(axes) if span is None else span
        key = (op, tuple(a.number for a in args), detail, axes, span)
        if key not in self._known:
            varies = axes.intersection(frozenset[int]().union(*(a.varies for a in args))) if args else axes
            self._known[key] = Value(len(self.values), op, args, axes, span, detail, varies)
            self.values.append(self._known[key])
        return self._known[key]

    def _span(self, axes: frozenset[int]) -> Span:
        if axes == self.every:
            return Span.FULL
        if not axes:
            return Span.SCALAR
        return Span.ROW if axes == self.row else Span.COLUMN


def _unchanged(op: str, args: tuple[Value, ...]) -> Value | None:
    """The operand that the result is equal to in every bit, or None: `1*x`, `x/1`, and `x + 0` where x is never -0."""
    for x, other in zip(args, reversed(args), strict=True) if len(args) == 2 else ():
        if op == "mul" and _is_constant(other, 1):
            return x
        if op == "add" and _is_constant(other, 0) and _is_never_minus_zero(x):
            return x
    return args[0] if op == "div" and _is_constant(args[1], 1) else None


def _is_constant(v: Value, number: float) -> bool:
    return v.op == "const" and v.detail == number


def _is_never_minus_zero(v: Value) -> bool:
    if v.op == "add":  # -0 only where both are
        return any(map(_is_never_minus_zero, v.args))
    if v.op == "mul":
        return v.args[0] is v.args[1]
    return v.op == "abs" or (v.op == "sqrt" and _is_never_minus_zero(v.args[0]))
