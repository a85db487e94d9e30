"""The lines of one Triton kernel."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from fusedbun.compiler.graph import Span, Value
from fusedbun.compiler.triton.text import (
    COMBINE,
    NUMBER,
    START,
    WORD,
    Kernel,
    Table,
    expression,
    formula,
    is_inexact,
    literal,
    name_of,
)
from fusedbun.operations import OPERATIONS

# Operations that are written as calls, which would round a number among their operands to float32.
CALLS = {operation.name for operation in OPERATIONS.values() if "(" in operation.triton}


class Writer:
    """The lines of one kernel. A value is loaded or computed where it is first read.

    Args:
        name: the kernel's.
        table: where things are.
    """

    def __init__(self, name: str, table: Table) -> None:
        self.name, self.table = name, table
        self.names: dict[Value, str] = {}  # the values that have been read
        self.spot: Callable[[Value], tuple[str, str]] = nowhere  # where in its array, and masked by what
        self.along: Callable[[int], str] = str  # the elements' places along an axis
        self._head: dict[int, str] = {}  # by the column of the table
        self._body: list[str] = []
        self._depth = 1

    def finish(self, work: str) -> Kernel:
        """The kernel, of which a program has this much."""
        head = [f"    leaf = leaves + tl.load(work + 2 * tl.program_id(0)) * {len(self.table.names)}"]
        head += ["    block = tl.load(work + 2 * tl.program_id(0) + 1)"] if work != "leaf" else []
        head += [self._head[column] for column in sorted(self._head)]
        signature = "leaves, work, P: tl.constexpr, T: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr"
        lines = ["@triton.jit", f"def {self.name}({signature}):", *head, "", *self._body]
        return Kernel(self.name, work, "\n".join(lines))

    @property
    def is_empty(self) -> bool:
        return not self._body

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
        dtype = self.table.dtype.get(name, NUMBER)
        self._known(name, f"{pointer} = tl.load(leaf + {{}}).to(tl.pointer_type({dtype}))")
        return pointer

    def _known(self, name: str, text: str) -> None:
        column = self.table.names.index(name)
        self._head[column] = f"    {text.format(column)}"

    def read(self, v: Value) -> str:
        """What the value is called, once it has been loaded or computed."""
        if v.op == "const":
            return literal(v)
        if v not in self.names:
            text = self._load(v) or self.computed(v)
            self.line(f"{name_of(v)} = {text}")
            self.names[v] = name_of(v)
        return self.names[v]

    def compute(self, v: Value) -> str:
        """The same for a value that has a place in memory, where it is computed and kept."""
        self.line(f"{name_of(v)} = {self.computed(v)}")
        self.keep(v)
        return self.names[v]

    def keep(self, v: Value) -> None:
        """Stores a value that has just been computed in its place."""
        self.names[v] = name_of(v)
        index, mask = self.spot(v)
        cast = ".to(T)" if v.is_condition else ""
        self.line(f"tl.store({self.pointer(self.table.place[v])}{index}, {name_of(v)}{cast}{mask})")

    def store(self, name: str, v: Value) -> None:
        """Stores a value in one of the leaf's own arrays."""
        index, mask = self.spot(v)
        cast = _cast(_type(v), self.table.dtype[name])
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
            elif not self.is_loaded(v):
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

    def is_loaded(self, v: Value) -> bool:
        return v.op == "input" or v.span == Span.HOST or v in self.table.place

    def _load(self, v: Value) -> str | None:
        if v.op == "count":
            size = self.size(self.table.size(v.detail))
            return f"({size}).to(T)" if "*" in size else f"{size}.to(T)"
        decode = " != 0" if v.is_condition else ""
        if v in self.table.words:
            return f"tl.load(leaf + {self.table.names.index(v.detail)}).to({WORD})  # {v.detail}"
        if v.span == Span.HOST:
            return f"tl.load({self.pointer('scalars')} + {self.table.numbers.index(v)}){decode}  # {formula(v)}"
        return self.load(v, v.detail if v.op == "input" else self.table.place[v]) if self.is_loaded(v) else None

    def load(self, v: Value, name: str) -> str:
        """The text of a value that is in memory."""
        index, mask = self.spot(v)
        decode = " != 0" if v.is_condition else _cast(self.table.dtype[name], _type(v))
        return f"tl.load({self.pointer(name)}{index}{mask}){decode}"

    def computed(self, v: Value) -> str:
        """The text of a value that is made of others."""
        if v.op == "index":
            return f"{self.along(v.detail)}.to({WORD})"
        return expression(v, [self.operand(a, v) for a in v.args])

    def operand(self, v: Value, of: Value) -> str:
        """How an operand of a value is written."""
        return f"tl.full((), {literal(v)}, T)" if of.op in CALLS and is_inexact(v) else self.read(v)


def nowhere(v: Value) -> tuple[str, str]:
    """Where a single number lies in its array, and masked by what."""
    return "", ""


def _type(v: Value) -> str:
    return WORD if v.is_word else NUMBER


def _cast(source: str, target: str) -> str:
    return "" if source == target else f".to({target})"
