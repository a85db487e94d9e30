"""The Triton of what lies between two passes: the reductions put together, the small values and the small outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby

from fusedbun.compiler.graph import REDUCTIONS, Span, Value
from fusedbun.compiler.printer import is_single
from fusedbun.compiler.trace import used
from fusedbun.compiler.triton.dialect import Writer
from fusedbun.compiler.triton.text import WORD, Kernel, Table, ordered

TILE = "tl.arange(0, BR * BC)"


def combine(name: str, table: Table, values: list[Value]) -> Kernel:
    """The kernel that reduces, for each column, what the stretches of rows have reduced."""
    k = Writer(name, table, {Span.COLUMN: (" + j", ", columns")}, {})
    k.line("j = stretch * BC + tl.arange(0, BC)[None, :]")
    k.line(f"columns = j < {k.size('C')}")
    for v in values:
        k.start(v, "(BR, BC)")
    with k.within(f"for b0 in range(0, {k.size('B')}, BR):"):
        k.line("b = b0 + tl.arange(0, BR)[:, None]", "m = (b < B) & columns")
        for v in values:
            k.accumulate(v, f"tl.load({k.pointer(table.parts[v])} + b * C + j, m)", "m")
    for v in values:
        k.end(v, 0)
    return k.finish("columns")


class Between(Writer):
    """The kernel of the small values between two passes, and of the small outputs."""

    def __init__(self, name: str, table: Table) -> None:
        super().__init__(name, table, {}, {})
        self._unseen: set[Value] = set()  # values in memory that the program's other threads may not see yet
        self._count({})

    def kernel(self, values: list[Value], stores: list[tuple[str, Value]]) -> Kernel:
        for (is_reduced, axes), same in groupby(values, lambda v: (v.op in REDUCTIONS, v.axes)):
            group = list(same)
            if is_reduced:
                reduction = self._columns if axes else self._number
                for v in group:
                    reduction(v, *v.args)
                continue
            if axes:
                self._before_loop(a for v in group for a in v.args)
                self._unseen |= set(group)
            with self._elements(axes):
                for v in group:
                    self.compute(v)
        if stores and self.lines:  # at the end, for the values are made of what is overwritten
            self.line("tl.debug_barrier()")
        for name, v in stores:
            with self._elements(v.axes):
                self.store(name, v)
        return self.finish("leaf")

    def _number(self, v: Value, x: Value) -> None:
        """A reduction to one number: of what each stretch of rows has reduced, or of all columns or rows."""
        if v in self.table.parts:
            self.start(v, "(BR * BC,)")
            with self.within(f"for b0 in range(0, {self.size('B')}, BR * BC):"):
                self.line(f"b = b0 + {TILE}")
                self.accumulate(v, f"tl.load({self.pointer(self.table.parts[v])} + b, b < B)", "b < B")
        else:
            self._before_loop([x])
            self.start(v, "(BR * BC,)")
            with self._elements(x.axes):
                self.accumulate(v, self.read(x), "m")
        self.end(v, None)

    def _columns(self, v: Value, x: Value) -> None:
        """A reduction of all columns to fewer."""
        outer, inner = (self.size(*self.table.sizes(axes)) for axes in (v.axes, x.axes - v.axes))
        self._before_loop([x])
        with self.within(f"for k0 in range(0, {outer}, BR):"):
            self.line("k = k0 + tl.arange(0, BR)[:, None]")
            self.start(v, "(BR, BC)")
            with self.within(f"for l0 in range(0, {inner}, BC):"):
                self.line("l = l0 + tl.arange(0, BC)[None, :]", f"m = (k < {outer}) & (l < {inner})")
                self._count({"k": v.axes, "l": x.axes - v.axes})
                self.accumulate(v, self.read(x), "m")
            self._count({"k": v.axes}, f"k < {outer}")
            self.end(v, 1)
        self._count({})
        self._unseen.add(v)

    @contextmanager
    def _elements(self, axes: frozenset[int]) -> Iterator[None]:
        """A loop over every index along some axes, if there are any."""
        if not axes:
            yield
            return
        size = self.size(*self.table.sizes(axes))
        with self.within(f"for k0 in range(0, {size}, BR * BC):"):
            self.line(f"k = k0 + {TILE}", f"m = k < {size}")
            self._count({"k": axes})
            yield
        self._count({})

    def _count(self, variables: dict[str, frozenset[int]], mask: str = "m") -> None:
        """Says what the variables of the loops around the lines to come count, the elements along some axes."""
        self._variables, self._mask = variables, f", {mask}"
        self._places: dict[int, str] = {}  # along the axes for which they have been computed

    def _before_loop(self, goals: Iterable[Value]) -> None:
        """Reads the single numbers that the loop needs, and waits for the columns that it reads."""
        goals = list(goals)
        self.hoist(goals, is_single)
        if self._unseen.intersection(used(goals, is_end=self.is_loaded)):
            self.line("tl.debug_barrier()")
            self._unseen = set()

    def spot(self, v: Value) -> tuple[str, str]:
        if not v.axes:
            return "", ""
        for name, axes in self._variables.items():
            if axes == v.axes:
                return f" + {name}", self._mask
        slowest, *others = ordered(self.table.graph, v.axes)
        text = self._place(slowest)
        for n, axis in enumerate(others):
            text = f"{f'({text})' if n else text} * {self.size(f'n{axis}')} + {self._place(axis)}"
        return f" + {text}", self._mask

    def index(self, v: Value) -> str:
        return f"{self._place(v.detail)}.to({WORD})"

    def _place(self, axis: int) -> str:
        """The index along one axis, computed from the variable that counts it."""
        if axis not in self._places:
            ((name, axes),) = ((name, axes) for name, axes in self._variables.items() if axis in axes)
            order = ordered(self.table.graph, axes)
            faster = [f"n{a}" for a in order[order.index(axis) + 1 :]]
            size = self.size(*faster)
            text = f"{name} // {f'({size})' if len(faster) > 1 else size}" if faster else name
            if axis != order[0]:
                text = f"{text} % {self.size(f'n{axis}')}"
            self.line(f"i{axis} = {text}")
            self._places[axis] = f"i{axis}"
        return self._places[axis]
