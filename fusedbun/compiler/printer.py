"""What the printers of kernels do alike, whatever the language: values get names, and are declared where they are read.

In the code %7 is x7 where it is of full size, b7 for a block of 32 columns, r7 for a row, c7 for a column and s7 where
it is one number; it is q7 while it is reduced.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar

from fusedbun.compiler.graph import Span, Value
from fusedbun.compiler.schedule import Schedule, Sweep
from fusedbun.compiler.trace import Program, used

LETTER = {Span.HOST: "s", Span.SCALAR: "s", Span.COLUMN: "c", Span.ROW: "r", Span.BLOCK: "b", Span.FULL: "x"}


def name_of(v: Value) -> str:
    """What a value is called in the code."""
    return f"{LETTER[v.span]}{v.number}"


def is_single(v: Value) -> bool:
    """Whether it is one number in all."""
    return v.span in (Span.HOST, Span.SCALAR)


def has_blocks(program: Program, sweeps: Sequence[Sweep]) -> bool:
    """Whether some sweeps read or write arrays that are laid out by blocks of a row."""
    return any(program.arrays[name].is_by_blocks for name in full_arrays(sweeps) & program.arrays.keys())


def is_coded(schedule: Schedule) -> bool:
    """Whether any of its sweeps do."""
    return any(has_blocks(schedule.program, work.sweeps) for work in schedule.passes)


def full_arrays(sweeps: Sequence[Sweep]) -> set[str]:
    """The arrays of full size that they read or write."""
    read = {v.detail for sweep in sweeps for v in sweep.full if v.op == "input"}
    return read | {name for sweep in sweeps for name, _ in sweep.stores}


class Printer(ABC):
    """The lines of one function. A value is loaded or computed where it is first read.

    A language's dialect says how constants, operations and declarations are written; the functions that are printed
    in it say what lies where.
    """

    tab: ClassVar[str]
    declaration: ClassVar[str]  # of a name and its text

    def __init__(self, placed: Mapping[Value, str]) -> None:
        self.placed = placed  # where small values lie in memory
        self.names: dict[Value, str] = {}  # the values that have been read
        self.lines: list[str] = []
        self._depth = 1

    @abstractmethod
    def literal(self, v: Value) -> str:
        """A constant."""

    @abstractmethod
    def expression(self, v: Value, args: list[str]) -> str:
        """An operation on operands that are written so."""

    @abstractmethod
    def index(self, v: Value) -> str:
        """The elements' places along an axis."""

    @abstractmethod
    def loaded(self, v: Value) -> str:
        """The text of a value that is given or in memory."""

    def is_loaded(self, v: Value) -> bool:
        """Whether a value is, and not made of others here."""
        return v.op in ("input", "count") or v.span == Span.HOST or v in self.placed

    def line(self, *texts: str) -> None:
        """Adds lines, one for each text that is not empty."""
        self.lines += [self.tab * self._depth + text for text in texts if text]

    @contextmanager
    def within(self, head: str, end: str = "") -> Iterator[None]:
        """Lines further in, between two others; what is read in them is forgotten at their end."""
        self.line(head)
        names = dict(self.names)
        self._depth += 1
        yield
        self._depth -= 1
        self.names = names
        self.line(end)

    def read(self, v: Value) -> str:
        """What a value is called, once it has been loaded or computed."""
        if v.op == "const":
            return self.literal(v)
        if v not in self.names:
            self.declare(v, self.text(v))
        return self.names[v]

    def text(self, v: Value) -> str:
        return self.loaded(v) if self.is_loaded(v) else self.computed(v)

    def declare(self, v: Value, text: str) -> None:
        self.names[v] = name_of(v)
        self.line(self.declaration.format(name_of(v), text))

    def computed(self, v: Value) -> str:
        """The text of a value that is made of others."""
        if v.op == "index":
            return self.index(v)
        args = [self.operand(a, v) for a in v.args]
        return args[0] if v.op == "expand" else self.expression(v, args)

    def operand(self, v: Value, of: Value) -> str:
        """How an operand of a value is written."""
        return self.read(v)

    def hoist(self, goals: Iterable[Value], is_steady: Callable[[Value], bool]) -> None:
        """Reads, before a loop, what does not change in it among the values that these are made of."""
        found = used(goals, is_end=lambda v: v in self.names or self.is_loaded(v))
        for v in self.hoisted([v for v in found if is_steady(v)]):
            self.read(v)

    def hoisted(self, values: list[Value]) -> list[Value]:
        """The order in which they are read."""
        return values
