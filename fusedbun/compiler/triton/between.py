"""The Triton of what lies between two passes: the reductions put together, the small values and the small outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby

from fusedbun.compiler.graph import REDUCTIONS, Span, Value
from fusedbun.compiler.triton.text import Kernel, Table, name_of, ordered, reduced
from fusedbun.compiler.triton.writer import Writer, nowhere

TILE = "tl.arange(0, BR * BC)"


def combine(name: str, table: Table, values: list[Value]) -> Kernel:
    """The kernel that reduces, for each column, what the blocks of rows have reduced."""
    k = Writer(name, table)
    k.spot = lambda v: (" + j", ", columns")
    k.line("j = block * BC + tl.arange(0, BC)[None, :]")
    k.line(f"columns = j < {k.size('C')}")
    for v in values:
        k.start(v, "(BR, BC)")
    with k.loop("b0", "B", "BR"):
        k.line("b = b0 + tl.arange(0, BR)[:, None]")
        k.line("m = (b < B) & columns")
        for v in values:
            k.accumulate(v, f"tl.load({k.pointer(table.parts[v])} + b * C + j, m)", "m")
    for v in values:
        k.line(f"{name_of(v)} = {reduced(v, f'q{v.number}', 0)}")
        k.keep(v)
    return k.finish("columns")


class Between(Writer):
    """The kernel of the small values between two passes, and of the small outputs."""

    def __init__(self, name: str, table: Table) -> None:
        super().__init__(name, table)
        self._unseen: set[Value] = set()  # values in memory that the program's other threads may not see yet

    def kernel(self, values: list[Value], stores: list[tuple[str, Value]]) -> Kernel:
        for (is_reduced, axes), same in groupby(values, lambda v: (v.op in REDUCTIONS, v.axes)):
            group = list(same)
            if is_reduced:
                for v in group:
                    self._reduction(v)
            elif axes:
                self._columns(group)
            else:
                self._numbers(group)
        if stores:
            self._outputs(stores)
        return self.finish("leaf")

    def _numbers(self, group: list[Value]) -> None:
        for v in group:
            self.compute(v)

    def _columns(self, group: list[Value]) -> None:
        self._before_loop(a for v in group for a in v.args)
        with self._elements("k", group[0].axes):
            for v in group:
                self.compute(v)
        self._unseen |= set(group)

    def _outputs(self, stores: list[tuple[str, Value]]) -> None:
        """The small outputs, at the end, for the values are made of what they overwrite."""
        if not self.is_empty:
            self.line("tl.debug_barrier()")
        for name, v in stores:
            if v.axes:
                with self._elements("k", v.axes):
                    self.store(name, v)
            else:
                self.store(name, v)

    def _reduction(self, v: Value) -> None:
        if v in self.table.parts:
            self._of_blocks(v)
        elif v.axes:
            self._of_columns(v)
        else:
            self._of_all(v)

    def _of_blocks(self, v: Value) -> None:
        """One number from what each block of rows has reduced."""
        self.start(v, "(BR * BC,)")
        with self.loop("b0", "B", "BR * BC"):
            self.line(f"b = b0 + {TILE}")
            self.accumulate(v, f"tl.load({self.pointer(self.table.parts[v])} + b, b < B)", "b < B")
        self._one(v)

    def _of_all(self, v: Value) -> None:
        """One number from all columns, or from all rows."""
        (x,) = v.args
        self._before_loop([x])
        self.start(v, "(BR * BC,)")
        with self._elements("k", x.axes):
            self.accumulate(v, self.read(x), "m")
        self._one(v)

    def _one(self, v: Value) -> None:
        """The end of a reduction to one number."""
        self.spot = nowhere
        self.line(f"{name_of(v)} = {reduced(v, f'q{v.number}', 'None')}")
        self.keep(v)

    def _of_columns(self, v: Value) -> None:
        """Fewer columns from all of them."""
        (x,) = v.args
        outer, inner = self.table.size(v.axes), self.table.size(x.axes - v.axes)
        self._before_loop([x])
        with self.loop("k0", outer, "BR"):
            self.line("k = k0 + tl.arange(0, BR)[:, None]")
            self.start(v, "(BR, BC)")
            with self.loop("l0", inner, "BC"):
                self.line("l = l0 + tl.arange(0, BC)[None, :]")
                self.line(f"m = (k < {outer}) & (l < {inner})")
                self._count({"k": v.axes, "l": x.axes - v.axes})
                self.accumulate(v, self.read(x), "m")
            self.spot = lambda v: (" + k", f", k < {outer}")
            self.line(f"{name_of(v)} = {reduced(v, f'q{v.number}', 1)}")
            self.keep(v)
        self.spot = nowhere
        self._unseen.add(v)

    @contextmanager
    def _elements(self, index: str, axes: frozenset[int]) -> Iterator[None]:
        """A loop over every index along some axes."""
        size = self.table.size(axes)
        with self.loop(f"{index}0", size, "BR * BC"):
            self.line(f"{index} = {index}0 + {TILE}")
            self.line(f"m = {index} < {size}")
            self._count({index: axes})
            yield
        self.spot = nowhere

    def _count(self, variables: dict[str, frozenset[int]]) -> None:
        """Says what the variables of the loops around the lines to come count: the elements along some axes."""
        indices = Indices(self, variables)
        self.spot, self.along = indices.spot, indices.along

    def _before_loop(self, goals: Iterable[Value]) -> None:
        """Reads the single numbers that the loop needs, and waits for the columns that it reads."""
        goals = list(goals)
        self.hoist(goals, (Span.HOST, Span.SCALAR))
        if self._unseen & _behind(goals, self.is_loaded):
            self.line("tl.debug_barrier()")
            self._unseen = set()


class Indices:
    """Where a value lies in its array, from the loops' variables.

    Args:
        writer: takes the lines that compute an index along an axis, where one is needed.
        variables: what each variable counts: the elements along some axes.
    """

    def __init__(self, writer: Writer, variables: dict[str, frozenset[int]]) -> None:
        self.writer, self.variables = writer, variables
        self._known: dict[int, str] = {}

    def spot(self, v: Value) -> tuple[str, str]:
        if not v.axes:
            return "", ""
        for name, axes in self.variables.items():
            if axes == v.axes:
                return f" + {name}", ", m"
        text = ""
        for axis in ordered(self.writer.table.graph, v.axes):
            if text:
                faster = f"({text})" if "+" in text else text
                text = f"{faster} * {self.writer.size(f'n{axis}')} + {self.along(axis)}"
            else:
                text = self.along(axis)
        return f" + {text}", ", m"

    def along(self, axis: int) -> str:
        """The index along one axis."""
        if axis not in self._known:
            ((name, axes),) = ((name, axes) for name, axes in self.variables.items() if axis in axes)
            order = ordered(self.writer.table.graph, axes)
            faster = " * ".join(f"n{a}" for a in order[order.index(axis) + 1 :])
            text = f"{name} // {f'({faster})' if '*' in faster else faster}" if faster else name
            if axis != order[0]:
                text = f"{text} % n{axis}"
            self.writer.size(f"{faster} n{axis}")
            self.writer.line(f"i{axis} = {text}")
            self._known[axis] = f"i{axis}"
        return self._known[axis]


def _behind(goals: Iterable[Value], is_loaded: Callable[[Value], bool]) -> set[Value]:
    """The values in memory that these are made of."""
    found: set[Value] = set()
    seen: set[Value] = set()

    def visit(v: Value) -> None:
        if v not in seen:
            seen.add(v)
            if is_loaded(v):
                found.add(v)
            else:
                for a in v.args:
                    visit(a)

    for v in goals:
        visit(v)
    return found
