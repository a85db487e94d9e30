"""The C++ that goes over memory: a function for each pass of a schedule, in a way that suits some shape of leaf.

All ways (`ways.py`) share one skeleton, and this is it. A block of rows is taken at a time (of columns, where the
schedule says so). Within a sweep along it the arrays' elements are loaded, computed with, reduced and stored, a
register of lanes at a time. The ways differ in what the lanes run along, and so in how the values of a block, of a
sweep and of a chunk are held, which their tables say.

In the code p0, p1, … are the leaf's arrays, o0, o1, … what is stored in them; k is the row of the block, or its
register of columns; r7_ and c7_ point to small vectors, and a7 is %7 while it is reduced over a chunk.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import ClassVar

from fusedbun.compiler.cpp.text import REDUCE, Arrays, Cpp
from fusedbun.compiler.graph import REDUCTIONS, Span, Value
from fusedbun.compiler.printer import is_single, name_of
from fusedbun.compiler.schedule import Pass, Schedule, Sweep

INLINED = "__attribute__((always_inline))"
LOOP = "each<{0}>([&](auto {1}) " + INLINED + " {{"


def each(*lines: str) -> str:
    """Lines for every k of a block."""
    return f"{LOOP.format('K', 'k')} {' '.join(lines)} }});"


class Way(Cpp):
    """A way of going over memory, of which this is one pass; see `Cpp`."""

    name: ClassVar[str]
    registers: ClassVar[tuple[Span, ...]]  # what the lanes run along
    spots: ClassVar[dict[Span, str]]  # where a number of each span lies, from where its array or vector begins
    indices: ClassVar[dict[Span, str]]  # the places of elements, by what these span
    rows_of: ClassVar[str]  # declares p0, by its number, its type and its array
    ask_ahead: ClassVar[str]  # asks for what is loaded from an array soon after this element, by its number
    ask_next: ClassVar[str] = ""  # for this element of the next block; nothing where memory need not be asked
    chunk: ClassVar[str] = " + j"  # where a reduction over the chunk lies
    saved: ClassVar[str] = ""  # likewise what is kept for a later sweep, by its place in the block's buffer
    taken: ClassVar[str] = "{0} = {1}::of({0}, {2});"  # takes an element up in a reduction over the chunk
    ended: ClassVar[str] = "q{0}[k]"  # the result of a reduction along a block, by its number and function
    total: ClassVar[str] = "{1}"  # a block's value as one number, by the function and its name

    def __init__(self, schedule: Schedule, arrays: Arrays) -> None:
        super().__init__(schedule, arrays)
        spans = (Span.ROW, Span.COLUMN)
        self.of_block, self.small = spans if schedule.blocks == "rows" else spans[::-1]
        self.work, self.sweep = Pass([]), Sweep()

    @abstractmethod
    def blocks(self, t: int) -> AbstractContextManager[None]:
        """What a function begins and ends with, and the loops over its blocks."""

    @abstractmethod
    def loop(self, sweep: Sweep) -> AbstractContextManager[None]:
        """The loop of a sweep along a block."""

    def buffer_size(self) -> str:
        """The body of the function that says how many bytes a chunk's buffer takes."""
        return "(void)leaf; return 0;"

    def function(self, t: int) -> list[str]:
        work = self.schedule.passes[t]
        self.hoist([v for sweep in work.sweeps for v in (*sweep.block, *sweep.full)] + work.after, is_single)
        self.work = work
        with self.blocks(t):
            self._block()
        return [f"void {self.name}{t}(const Work& w, Index begin, Index end) {{", *self.lines, "}"]

    def _block(self) -> None:
        work = self.work
        for sweep, asks in zip(work.sweeps, self._asks(), strict=True):
            self.sweep = sweep
            self._read(sweep.block)
            along = [v for v in sweep.reductions if v not in self.places.partial]
            for v in along:
                self.start(v)
            self.go_over(asks)
            for v in along:
                self.declare(v, self.ended.format(v.number, REDUCE[v.detail]))
        self._read(work.after)
        for v in work.keeps:
            self._store(v, self._kept(v))
        for v in work.totals:
            function, x = REDUCE[v.detail], self.read(v.args[0])
            self.line(f"T& a{v.number} = *{self.places.of_partial(v)};")
            self.line(each(f"a{v.number} = {function}::of(a{v.number}, {self.total.format(function, x)});"))
        for name, v in work.stores:
            self._store(v, self.arrays.pointer(name))

    def _read(self, values: Iterable[Value]) -> None:
        for v in values:
            self.read(v)

    def _store(self, v: Value, array: str) -> None:
        """Stores a block's value."""
        store = "lanes.store" if self.is_register(v) else "put"
        self.line(each(f"{store}({array}{self.spots[v.span]}, {self.read(v)});"))

    def _asks(self) -> list[list[str]]:
        """The lines with which each sweep asks memory for what is needed soon.

        An array is asked for a little ahead of where it is first loaded. One that the first of several sweeps loads is
        asked for a block ahead in the last of them, which does the most with each element and so waits the least.
        """
        sweeps = self.work.sweeps
        asks: list[list[str]] = [[] for _ in sweeps]
        first: dict[str, int] = {}
        for s, sweep in enumerate(sweeps):
            for v in sweep.full:
                is_long = v.op == "input" and self.arrays.has_every_element(v.detail)
                if is_long and first.setdefault(v.detail, s) == s:
                    is_next = s == 0 and len(sweeps) > 1
                    ask = (self.ask_next if is_next else self.ask_ahead).format(self.arrays.number(v.detail))
                    asks[-1 if is_next else s] += [ask] if ask else []
        return asks

    def go_over(self, asks: list[str]) -> None:
        """The loop of the sweep, with what it asks memory for."""
        sweep, crossing, stores = self.sweep, self.crossing([self.sweep]), self.stores()
        with self.loop(sweep):
            self._read(self.small_vectors(Pass([sweep])))
            for v in crossing:
                self.line(f"auto a{v.number} = lanes.template load<T>(a{v.number}_{self.chunk});")
            for number, v in stores:
                self.line(f"{self.type(v)} o{number}[K];")
            with self.braces(LOOP.format("K", "k"), "});"):
                self.line(*asks)
                for v in sweep.full:
                    self.read(v)
                    self.save(v)
                for v in sweep.reductions:
                    if v in crossing:
                        self.line(self.taken.format(f"a{v.number}", REDUCE[v.detail], self.read(v.args[0])))
                    else:
                        self.take_up(v)
                self.line(*(f"o{number}[k] = {self.read(v)};" for number, v in stores))
            for v in crossing:
                self.line(f"lanes.store(a{v.number}_{self.chunk}, a{v.number});")
            for number, _ in stores:  # when all is loaded: a store may be to what the compiler thinks is read next
                self.line(each(f"lanes.store(p{number}{self.spots[Span.FULL]}, o{number}[k]);"))

    def start(self, v: Value) -> None:
        """Starts a reduction along a block, before its sweep."""
        q = f"q{v.number}"
        self.line(f"Vector<T> {q}[K]; {each(f'{q}[k] = wide<Vector<T>>({REDUCE[v.detail]}::start<T>);')}")

    def take_up(self, v: Value) -> None:
        """Takes an element up in it."""
        q = f"q{v.number}[k]"
        self.line(f"{q} = lanes.only({REDUCE[v.detail]}::of({q}, {self.read(v.args[0])}), {q});")

    def save(self, v: Value) -> None:
        """Keeps an element for a later sweep, if one needs it."""
        if v in self.sweep.saved:
            x = self.read(v)
            number = f"select<Vector<T>>({x}, T(1), T(0))" if v.is_condition else x
            self.line(f"lanes.store({self._saved(v)}, {f'(Vector<T>){number}' if v.is_word else number});")

    def _saved(self, v: Value) -> str:
        return f"saved{self.saved.format(self.work.buffer.index(v))}"

    def is_register(self, v: Value) -> bool:
        return v.span in self.registers

    def index(self, v: Value) -> str:
        return self.indices[v.span]

    def is_loaded(self, v: Value) -> bool:
        return super().is_loaded(v) or v.op in REDUCTIONS or (v in self.work.buffer and v not in self.sweep.saved)

    def loaded(self, v: Value) -> str:
        if v in self.work.buffer:
            return f"(Words<T>)lanes.template load<T>({self._saved(v)})" if v.is_word else self.load(v, self._saved(v))
        return self.load(v, self._start(v) + self.spots[v.span]) if v.span in self.spots else super().loaded(v)

    def _start(self, v: Value) -> str:
        """Where what a value is loaded from begins."""
        if v.span == Span.FULL:
            return f"p{self.arrays.number(v.detail)}"
        if v.span == self.small:
            return f"{name_of(v)}_"
        return self._kept(v) if v in self.places.kept else self.pointer(v)

    def _kept(self, v: Value) -> str:
        return f"kept<T>(w, {self.places.kept[v]}, w.leaf->{self.schedule.blocks})"

    def declare(self, v: Value, text: str) -> None:
        if v.span == self.of_block:
            self.names[v] = f"{name_of(v)}[k]"
            self.line(f"{self.type(v)} {name_of(v)}[K]; {each(f'{self.names[v]} = {text};')}")
        else:
            super().declare(v, text)

    def point(self, sweeps: list[Sweep]) -> None:
        """Declares pointers to the arrays of full size that sweeps read or write."""
        used = {v.detail for sweep in sweeps for v in sweep.full if v.op == "input"}
        used |= {name for sweep in sweeps for name, _ in sweep.stores}
        for number, name in enumerate(self.arrays.names):
            if name in used:
                self.line(self.rows_of.format(number, self.arrays.type(name), self.arrays.pointer(name)))

    def stores(self) -> list[tuple[int, Value]]:
        """What the sweep stores, by the arrays' numbers.

        Of numbers made of words, bfloat16 takes the words' upper halves as they are.
        """
        return [
            (self.arrays.number(name), v.args[0] if v.op == "from_bits" and self.arrays.is_bfloat16(name) else v)
            for name, v in self.sweep.stores
        ]

    def crossing(self, sweeps: list[Sweep]) -> list[Value]:
        """The reductions over the chunk that sweeps add to."""
        return [v for sweep in sweeps for v in sweep.reductions if v in self.places.partial]

    def small_vectors(self, work: Pass) -> list[Value]:
        found = {a for sweep in work.sweeps for v in sweep.full for a in v.args if a.span == self.small}
        return sorted(found, key=lambda v: v.number)
