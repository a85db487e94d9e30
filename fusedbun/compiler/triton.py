"""Prints a schedule as Triton, for GPUs: few kernels, each for all leaves that share the program.

    pass_0      a pass over memory; a program has a block of rows and loops over its columns, once for each sweep
    combine_1   what the blocks of pass 0 reduced, put together in their order, so that the same bits come every time
    between_1   the small values that pass 1 needs, or that are written at the end; a program has a leaf

What there is nothing to do in is not printed. A program finds its leaf and its block in `work`, and everything about
the leaf, addresses and sizes, in a row of `leaves` (`Table`). Nothing of full size is kept between two sweeps: on a GPU
a division costs less than memory. Names in the code are those of the values in the printed schedule: %7 is x7 where it
is of full size, r7 for a row, c7 for a column, s7 where it is one number, and q7 while it is reduced.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import NamedTuple

import numpy as np

from fusedbun.compiler.graph import ARITHMETIC, COMPARISONS, REDUCTIONS, Graph, Span, Value
from fusedbun.compiler.schedule import Schedule, Sweep
from fusedbun.compiler.trace import GRAD, PARAM

LETTER = {Span.HOST: "s", Span.SCALAR: "s", Span.COLUMN: "c", Span.ROW: "r", Span.FULL: "x"}
STORED = {"compute": "T", "int8": "tl.int8", "int32": "tl.int32"}  # by a slot's code
START = {"sum": "0.0", "max": 'float("-inf")', "min": 'float("inf")'}
COMBINE = {"max": "maximum", "min": "minimum"}
BLOCK = "tl.arange(0, BR * BC)"
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

    First come addresses, of the leaf's own arrays, of its scalars, and of what is kept while a step runs; then sizes:
    of each axis, the numbers of rows and columns, and the number of blocks of rows.

    Args:
        schedule: what is to be run.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.graph = schedule.program.graph
        self.scalars = schedule.program.scalars
        self.dtype = {PARAM: "P", GRAD: "P"}
        self.dtype |= {key: STORED[slot.code] for key, slot in schedule.program.slots.items()}
        self.place = {v: _name(v) for v in (*schedule.small, *schedule.kept)}
        self.parts = {v: f"q{v.number}" for v in schedule.partials}
        self.temporary = {name: v for place in (self.place, self.parts) for v, name in place.items()}
        self.addresses = [*self.dtype, "scalars", *self.temporary]
        self.names = [*self.addresses, *(f"n{axis}" for axis in range(self.graph.ndim)), "R", "C", "B"]
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


def emit(schedule: Schedule) -> str:
    """The source of a module with every kernel of a schedule.

    Args:
        schedule: with blocks of rows.
    """
    source = "\n\n\n".join(kernel.source for kernel in kernels(schedule))
    helpers = [f"@triton.jit{text}" for name, text in HELPERS.items() if re.search(rf"\b{name}\b(?!=)", source)]
    comment = [f"# {line}".rstrip() for line in f"{schedule.program}\n\n{schedule}".split("\n")]
    table = f"# a leaf's row: {', '.join(Table(schedule).names)}"
    head = "\n".join([*comment, "#", table, "", "import triton", "import triton.language as tl"])
    return "\n\n\n".join([head, *helpers, source]) + "\n"


def kernels(schedule: Schedule) -> list[Kernel]:
    """The kernels of a schedule, in the order in which they are launched."""
    if schedule.blocks != "rows":
        raise ValueError(f"Triton is printed for blocks of rows, but these are of {schedule.blocks}")
    table, found = Table(schedule), []
    for t in range(len(schedule.passes) + 1):
        sums = [v for v in schedule.between[t] if v in schedule.partials and v.span == Span.COLUMN]
        small = [v for v in schedule.between[t] if v not in sums]
        stores = schedule.stores if t == len(schedule.passes) else []
        if sums:
            found.append(_combine(f"combine_{t}", table, sums))
        if small or stores:
            found.append(_Between(f"between_{t}", table).kernel(small, stores))
        if t < len(schedule.passes):
            found.append(_flat(schedule, table) if is_flat(schedule) else _Pass(f"pass_{t}", table).kernel(schedule, t))
    return found


def is_flat(schedule: Schedule) -> bool:
    """Whether rows and columns make no difference to the pass, so that a block is a run of elements."""
    return schedule.is_elementwise and not any(work.stores for work in schedule.passes)


def ordered(graph: Graph, axes: Iterable[int]) -> tuple[int, ...]:
    """Some axes, from the slowest in memory to the fastest."""
    axes = set(axes)
    return tuple(axis for axis in graph.order if axis in axes)


class _Writer:
    """The lines of one kernel. A value is loaded or computed where it is first read.

    Args:
        name: the kernel's.
        table: where things are.
    """

    def __init__(self, name: str, table: Table) -> None:
        self.name, self.table = name, table
        self.names: dict[Value, str] = {}  # the values that have been read
        self.spot: Callable[[Value], tuple[str, str]] = lambda v: ("", "")  # where in its array, and masked by what
        self._head: dict[int, str] = {}  # by the column of the table
        self._body: list[str] = []
        self._depth = 1

    def finish(self, work: str) -> Kernel:
        head = [f"    leaf = leaves + tl.load(work + 2 * tl.program_id(0)) * {len(self.table.names)}"]
        head += ["    block = tl.load(work + 2 * tl.program_id(0) + 1)"] if work != "leaf" else []
        head += [self._head[column] for column in sorted(self._head)]
        signature = "leaves, work, P: tl.constexpr, T: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr"
        lines = ["@triton.jit", f"def {self.name}({signature}):", *head, "", *self._body]
        return Kernel(self.name, work, "\n".join(lines))

    def line(self, text: str) -> None:
        self._body.append("    " * self._depth + text)

    @contextmanager
    def loop(self, index: str, stop: str, by: str) -> Iterator[None]:
        """A loop; what is read in it is forgotten at its end."""
        self.line(f"for {index} in range(0, {self.size(stop)}, {by}):")
        names = dict(self.names)
        self._depth += 1
        yield
        self._depth -= 1
        self.names = names

    def size(self, text: str) -> str:
        """A size, or a product of some, made known at the kernel's head."""
        for name in re.findall(r"\b(?:[RCB]|n\d+)\b", text):
            self._known(name, f"{name} = tl.load(leaf + {{}})")
        return text

    def pointer(self, name: str) -> str:
        """The address of an array, made known at the kernel's head."""
        pointer = f"{self.table.identifiers[self.table.names.index(name)]}_at"
        dtype = self.table.dtype.get(name, "T")
        self._known(name, f"{pointer} = tl.load(leaf + {{}}).to(tl.pointer_type({dtype}))")
        return pointer

    def _known(self, name: str, text: str) -> None:
        column = self.table.names.index(name)
        self._head[column] = f"    {text.format(column)}"

    def read(self, v: Value) -> str:
        """What the value is called, once it has been loaded or computed."""
        if v.op == "const":
            return _literal(v)
        if v not in self.names:
            text = self._load(v) or self._expression(v)
            self.line(f"{_name(v)} = {text}")
            self.names[v] = _name(v)
        return self.names[v]

    def compute(self, v: Value) -> str:
        """The same for a value that has a place in memory, where it is computed and kept."""
        self.line(f"{_name(v)} = {self._expression(v)}")
        self.keep(v)
        return self.names[v]

    def keep(self, v: Value) -> None:
        """Stores a value that has just been computed in its place."""
        self.names[v] = _name(v)
        index, mask = self.spot(v)
        cast = ".to(T)" if v.is_condition else ""
        self.line(f"tl.store({self.pointer(self.table.place[v])}{index}, {_name(v)}{cast}{mask})")

    def store(self, name: str, v: Value) -> None:
        """Stores a value in one of the leaf's own arrays."""
        index, mask = self.spot(v)
        dtype = self.table.dtype[name]
        cast = "" if dtype == "T" else f".to({dtype})"
        self.line(f"tl.store({self.pointer(name)}{index}, {self.read(v)}{cast}{mask})")

    def hoist(self, goals: Iterable[Value], spans: tuple[Span, ...]) -> None:
        """Reads, before a loop, what does not change in it among the values that these are made of."""
        seen: set[Value] = set()

        def visit(v: Value) -> None:
            if v in seen or v in self.names or v.op == "const":
                return
            seen.add(v)
            if v.span in spans:
                self.read(v)
            elif not self._is_loaded(v):
                for a in v.args:
                    visit(a)

        for v in goals:
            visit(v)

    def accumulate(self, v: Value, x: str, mask: str) -> None:
        """Takes `x` up in the reduction, element by element of a block."""
        q = f"q{v.number}"
        x = f"tl.where({mask}, {x}, {START[v.detail]})"
        self.line(f"{q} = {q} + {x}" if v.detail == "sum" else f"{q} = {COMBINE[v.detail]}({q}, {x})")

    def start(self, v: Value, shape: str) -> None:
        self.line(f"q{v.number} = tl.full({shape}, {START[v.detail]}, T)")

    def _is_loaded(self, v: Value) -> bool:
        return v.op == "input" or v.span == Span.HOST or v in self.table.place

    def _load(self, v: Value) -> str | None:
        if v.op == "count":
            size = self.size(self.table.size(v.detail))
            return f"({size}).to(T)" if "*" in size else f"{size}.to(T)"
        decode = " != 0" if v.is_condition else ""
        if v.span == Span.HOST:
            return f"tl.load({self.pointer('scalars')} + {self.table.scalars.index(v)}){decode}  # {_formula(v)}"
        if not self._is_loaded(v):
            return None
        name = v.detail if v.op == "input" else self.table.place[v]
        index, mask = self.spot(v)
        decode = decode or ("" if self.table.dtype.get(name, "T") == "T" else ".to(T)")
        return f"tl.load({self.pointer(name)}{index}{mask}){decode}"

    def _expression(self, v: Value) -> str:
        args = [self.read(a) for a in v.args]
        if v.op == "div":
            return f"divide({', '.join(map(self._exact, v.args))}, T)"
        if v.op in ARITHMETIC or v.op in COMPARISONS:
            return f"{args[0]} {ARITHMETIC.get(v.op) or COMPARISONS[v.op]} {args[1]}"
        if v.op in ("minimum", "maximum", "where"):
            return f"{'tl.' if v.op == 'where' else ''}{v.op}({', '.join(map(self._exact, v.args))})"
        if v.op in ("sqrt", "log", "expm1"):
            return f"{v.op}({args[0]}, T)"
        return {"neg": "-{}", "abs": "tl.abs({})", "sign": "sign({})", "expand": "{}"}[v.op].format(*args)

    def _exact(self, v: Value) -> str:
        """An operand of a function, for which Triton would round a number to float32."""
        if v.op == "const" and float(np.float32(v.detail)) != v.detail:
            return f"tl.full((), {_literal(v)}, T)"
        return self.read(v)


class _Pass(_Writer):
    """The kernel of a pass over memory."""

    def kernel(self, schedule: Schedule, t: int) -> Kernel:
        work = schedule.passes[t]
        spots = {Span.ROW: (" + i", ", rows"), Span.COLUMN: (" + j", ", columns"), Span.FULL: (" + at", ", m")}
        self.spot = lambda v: spots.get(v.span, ("", ""))
        self.line("i = block * BR + tl.arange(0, BR)[:, None]")
        self.line(f"rows = i < {self.size('R')}")
        for sweep in work.sweeps:
            self._sweep(sweep)
        for v in work.keeps:
            self.keep(v)
        for v in (*(total.args[0] for total in work.totals), *(v for _, v in work.stores)):
            self.read(v)
        for v in work.totals:
            x = f"tl.where(rows, {self.read(v.args[0])}, {START[v.detail]})"
            self.line(f"tl.store({self.pointer(self.table.parts[v])} + block, {_reduced(v, x, 'None')})")
        for name, v in work.stores:
            self.store(name, v)
        return self.finish("rows")

    def _sweep(self, sweep: Sweep) -> None:
        goals = [*(v.args[0] for v in sweep.reductions), *(v for _, v in sweep.stores)]
        across = [v for v in sweep.reductions if v.op == "across"]
        self.hoist(goals, (Span.HOST, Span.SCALAR, Span.ROW))
        for v in across:
            self.start(v, "(BR, BC)")
        with self.loop("j0", "C", "BC"):
            self.line("j = j0 + tl.arange(0, BC)[None, :]")
            self.line("columns = j < C")
            self.line("m = rows & columns")
            self.line("at = i * C + j")
            for v in goals:
                self.read(v)
            for v in sweep.reductions:
                if v.op == "across":
                    self.accumulate(v, self.read(v.args[0]), "m")
                else:
                    self._down(v)
            for name, v in sweep.stores:
                self.store(name, v)
        for v in across:
            self.line(f"{_name(v)} = {_reduced(v, f'q{v.number}', 1)}")
            self.names[v] = _name(v)

    def _down(self, v: Value) -> None:
        self.line(f"q{v.number} = tl.where(m, {self.read(v.args[0])}, {START[v.detail]})")
        parts = self.pointer(self.table.parts[v])
        self.line(f"tl.store({parts} + block * C + j, {_reduced(v, f'q{v.number}', 0)}, columns)")


def _flat(schedule: Schedule, table: Table) -> Kernel:
    """The kernel of a pass in which no element depends on another."""
    k = _Writer("pass_0", table)
    stores = schedule.passes[0].sweeps[0].stores
    k.spot = lambda v: (" + at", ", m") if v.span == Span.FULL else ("", "")
    k.line(f"at = block.to(tl.int64) * (BR * BC) + {BLOCK}")
    k.line(f"m = at < {k.size('R * C')}")
    k.hoist((v for _, v in stores), (Span.HOST, Span.SCALAR))
    for _, v in stores:
        k.read(v)
    for name, v in stores:
        k.store(name, v)
    return k.finish("elements")


def _combine(name: str, table: Table, values: list[Value]) -> Kernel:
    """The kernel that reduces, for each column, what the blocks of rows have reduced."""
    k = _Writer(name, table)
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
        k.line(f"{_name(v)} = {_reduced(v, f'q{v.number}', 0)}")
        k.keep(v)
    return k.finish("columns")


class _Between(_Writer):
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
        if self._body:
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
            self.line(f"b = b0 + {BLOCK}")
            self.accumulate(v, f"tl.load({self.pointer(self.table.parts[v])} + b, b < B)", "b < B")
        self._reduced(v)

    def _of_all(self, v: Value) -> None:
        """One number from all columns, or from all rows."""
        (x,) = v.args
        self._before_loop([x])
        self.start(v, "(BR * BC,)")
        with self._elements("k", x.axes):
            self.accumulate(v, self.read(x), "m")
        self._reduced(v)

    def _reduced(self, v: Value) -> None:
        self.spot = lambda v: ("", "")
        self.line(f"{_name(v)} = {_reduced(v, f'q{v.number}', 'None')}")
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
                self.spot = _Indices(self, {"k": v.axes, "l": x.axes - v.axes}).spot
                self.accumulate(v, self.read(x), "m")
            self.spot = lambda v: (" + k", f", k < {outer}")
            self.line(f"{_name(v)} = {_reduced(v, f'q{v.number}', 1)}")
            self.keep(v)
        self.spot = lambda v: ("", "")
        self._unseen.add(v)

    @contextmanager
    def _elements(self, index: str, axes: frozenset[int]) -> Iterator[None]:
        """A loop over every index along some axes."""
        size = self.table.size(axes)
        with self.loop(f"{index}0", size, "BR * BC"):
            self.line(f"{index} = {index}0 + {BLOCK}")
            self.line(f"m = {index} < {size}")
            self.spot = _Indices(self, {index: axes}).spot
            yield
        self.spot = lambda v: ("", "")

    def _before_loop(self, goals: Iterable[Value]) -> None:
        """Reads the single numbers that the loop needs, and waits for the columns that it reads."""
        goals = list(goals)
        self.hoist(goals, (Span.HOST, Span.SCALAR))
        if self._unseen & _behind(goals, self._is_loaded):
            self.line("tl.debug_barrier()")
            self._unseen = set()


class _Indices:
    """Where a value lies in its array, from the loops' variables.

    Args:
        writer: takes the lines that compute an index along an axis, where one is needed.
        variables: what each variable counts: the elements along some axes.
    """

    def __init__(self, writer: _Writer, variables: dict[str, frozenset[int]]) -> None:
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
                text = f"{faster} * {self.writer.size(f'n{axis}')} + {self._along(axis)}"
            else:
                text = self._along(axis)
        return f" + {text}", ", m"

    def _along(self, axis: int) -> str:
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


def _name(v: Value) -> str:
    return f"{LETTER[v.span]}{v.number}"


def _literal(v: Value) -> str:
    number = v.detail
    if not np.isfinite(number):
        return f'float("{number}")'
    return repr(number) if number >= 0 else f"({number!r})"


def _reduced(v: Value, x: str, axis: int | str) -> str:
    keep = "" if axis == "None" else ", keep_dims=True"
    return f"tl.sum({x}, {axis}{keep})" if v.detail == "sum" else f"tl.reduce({x}, {axis}, {COMBINE[v.detail]}{keep})"


def _formula(v: Value) -> str:
    """A number made of hyper-parameters, as it is computed from them."""
    if v.op in ("const", "input"):
        return f"{v.detail:g}" if v.op == "const" else str(v.detail)
    args = [_formula(a) for a in v.args]
    if v.op in ARITHMETIC or v.op in COMPARISONS:
        a, b = (f"({text})" if x.args else text for x, text in zip(v.args, args, strict=True))
        return f"{a} {ARITHMETIC.get(v.op) or COMPARISONS[v.op]} {b}"
    return f"{v.op}({', '.join(args)})"
