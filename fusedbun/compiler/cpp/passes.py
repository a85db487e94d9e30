"""The C++ that goes over memory: a function for each pass of a schedule, in a way that suits some shape of leaf.

All ways (`ways.py`) share one skeleton, and this is it. A tile of rows is taken at a time (of columns, where the
schedule says so). Within a sweep along it the arrays' elements are loaded, computed with, reduced and stored, a
register of lanes at a time. The ways differ in what the lanes run along, and so in how the values of a tile, of a
sweep and of a chunk are held, which their tables say.

In the code p0, p1, … are the leaf's arrays, o0, o1, … what is stored in them; k is the row of the tile, or its
register of columns; r7_ and c7_ point to small vectors, and a7 is %7 while it is reduced over a chunk.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import ClassVar

from fusedbun.compiler.cpp.dialect import REDUCE, Cpp
from fusedbun.compiler.graph import REDUCTIONS, Span, Value
from fusedbun.compiler.printer import full_arrays, is_single, name_of
from fusedbun.compiler.schedule import Pass, Schedule, Sweep
from fusedbun.compiler.trace import used

INLINED = "__attribute__((always_inline))"
EACH_K = f"each<K>([&](auto k) {INLINED} {{"


def each(text: str) -> str:
    """A line for every k of a tile."""
    return f"{EACH_K} {text} }});"


class Way(Cpp):
    """A way of going over memory, of which this is one pass; see `Cpp`.

    Most of what is said of a reduction is a text of its number, its function, and what is taken up or where it lies.
    """

    name: ClassVar[str]
    registers: ClassVar[tuple[Span, ...]]  # what the lanes run along
    spots: ClassVar[dict[Span, str]]  # where a number of each span lies, from where its array or vector begins
    indices: ClassVar[dict[Span, str]]  # the places of elements, by what these span
    opening: ClassVar[tuple[str, ...]] = ()  # a function's first lines
    vector: ClassVar[str] = "const auto* const {}_ = {};"  # declares a small vector: its name, place and type
    rows_of: ClassVar[str]  # declares p0: its number, type and array
    loop: ClassVar[tuple[str, str]]  # what a sweep along a tile begins and ends with
    ask_ahead: ClassVar[str]  # asks for what is loaded from an array soon after this element, by its number
    ask_next: ClassVar[str] = ""  # for this element of the next tile; nothing where memory need not be asked
    saved: ClassVar[str] = ""  # where a value lies in the tile's buffer, by its number there
    buffer: ClassVar[str] = "(void)leaf; return 0;"  # the bytes of a chunk's buffer, by what `buffer_size` counts
    # a reduction over the chunk: declared, where it lies, and with an element taken up
    crossing: ClassVar[str] = ""
    chunk: ClassVar[str] = " + j"
    crossing_taken: ClassVar[str] = "a{0} = {1}::of(a{0}, {2});"
    # one along a tile: declared, with an element taken up, its result, and this as one number
    along: ClassVar[str] = ""
    along_taken: ClassVar[str] = "q{0}[k] = lanes.only({1}::of(q{0}[k], {2}), q{0}[k]);"
    along_ended: ClassVar[str] = "q{0}[k]"
    total: ClassVar[str] = "{2}"
    # one over a whole tile, of whose rows nothing else needs to know; where there is no text, it is one along the tile
    over: ClassVar[str] = ""
    over_taken: ClassVar[str] = "q{0} = lanes.only({1}::of(q{0}, {2}), q{0});"
    over_ended: ClassVar[str] = "fold<{1}>(q{0})"

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule)
        spans = (Span.ROW, Span.COLUMN)
        self.of_tile, self.small = spans if schedule.tiles == "rows" else spans[::-1]
        self.work, self.sweep = Pass([]), Sweep()
        self.whole: set[Value] = set()  # the reductions along a tile that are taken over all of it at once

    @abstractmethod
    def tiles(self, t: int) -> AbstractContextManager[None]:
        """The loops over the tiles."""

    def function(self, t: int) -> list[str]:
        work = self.schedule.passes[t]
        self.hoist([v for sweep in work.sweeps for v in (*sweep.tile, *sweep.full)] + work.after, is_single)
        self.work = work
        self.whole = self._whole() if self.over else set()
        self.line(*self.opening)
        for v in self.small_vectors(work.sweeps):
            self.line(self.vector.format(name_of(v), self.pointer(v), "Word" if v.is_word else "T"))
        for v in self.across_tiles(work.sweeps):
            self.line(reduced(self.crossing, v, self.places.partial[v]))
        with self.tiles(t):
            self._tile()
        return [f"void {self.name}{t}(const Work& w, Index begin, Index end) {{", *self.lines, "}"]

    def buffer_size(self) -> str:
        """The body of the function that says how many bytes a chunk's buffer takes."""
        return self.buffer.format(len(self.schedule.partials), self.places.buffered, self.repeated())

    def repeated(self) -> int:
        """How many values are as long as a tile of packed rows."""
        sweeps = [sweep for work in self.schedule.passes for sweep in work.sweeps]
        reductions = sum(len(sweep.reductions) for sweep in sweeps)
        return 1 + len(self.small_vectors(sweeps)) + reductions + self.places.buffered

    def _tile(self) -> None:
        work = self.work
        for sweep, asks in zip(work.sweeps, self._asks(), strict=True):
            along = [v for v in sweep.reductions if v not in self.places.partial]
            self.sweep = sweep
            self._read(sweep.tile)
            self.line(*(reduced(self.over if v in self.whole else self.along, v) for v in along))
            self.go_over(asks)
            for v in along:
                if v not in self.whole:
                    self.declare(v, reduced(self.along_ended, v))
        self._read(v for v in work.after if v not in self.whole)
        for v in work.keeps:
            self._store(v, self._kept(v))
        for v in work.totals:
            of = v.args[0]
            total = reduced(self.over_ended, of) if of in self.whole else reduced(self.total, v, self.read(of))
            taken = reduced(self.crossing_taken, v, total)
            self.line(f"T& a{v.number} = *{self.places.partial[v]};", taken if of in self.whole else each(taken))
        for name, v in work.stores:
            self._store(v, self.array(name))

    def _whole(self) -> set[Value]:
        """The reductions along a tile that only the same one over the chunk is made of."""
        users = Counter(a for v in used(self.program.outputs.values()) for a in v.args)
        outputs = {*self.program.outputs.values()}
        ends = [(v, v.args[0]) for v in self.work.totals]
        return {
            a for v, a in ends if a.op in REDUCTIONS and a.detail == v.detail and users[a] == 1 and a not in outputs
        }

    def taken(self, v: Value, of: str) -> str:
        """The line that takes an element up into a reduction along the tile."""
        return reduced(self.over_taken if v in self.whole else self.along_taken, v, of)

    def _read(self, values: Iterable[Value]) -> None:
        for v in values:
            self.read(v)

    def _store(self, v: Value, array: str) -> None:
        """Stores a tile's value."""
        store = "lanes.store" if self.is_register(v) else "put"
        self.line(each(f"{store}({array}{self.spots[v.span]}, {self.read(v)});"))

    def _asks(self) -> list[list[str]]:
        """The lines with which each sweep asks memory for what is needed soon.

        An array is asked for a little ahead of where it is first loaded. One that the first of several sweeps loads is
        asked for a tile ahead in the last of them, which does the most with each element and so waits the least.
        """
        sweeps = self.work.sweeps
        asks: list[list[str]] = [[] for _ in sweeps]
        first: dict[str, int] = {}
        for s, sweep in enumerate(sweeps):
            for v in sweep.full:
                is_long = v.op == "input" and not self.arrays[v.detail].is_by_blocks
                if is_long and first.setdefault(v.detail, s) == s:
                    is_next = s == 0 and len(sweeps) > 1
                    ask = self.ask_next if is_next else self.ask_ahead
                    asks[-1 if is_next else s].append(ask.format(self.numbers[v.detail]))
        return asks

    def go_over(self, asks: list[str]) -> None:
        """The loop of the sweep, with what it asks memory for."""
        sweep, crossing, stores = self.sweep, self.across_tiles([self.sweep]), self.stores()
        with self.within(*self.loop):
            self.enter()
            for v in crossing:
                self.line(f"auto a{v.number} = lanes.template load<T>(a{v.number}_{self.chunk});")
            for name, v in stores:
                self.line(f"{self.type(v)} o{self.numbers[name]}[K];")
            with self.within(EACH_K, "});"):
                self.line(*asks)
                for v in sweep.full:
                    self.read(v)
                    self.save(v)
                for v in sweep.reductions:
                    of = self.read(v.args[0])
                    self.line(reduced(self.crossing_taken, v, of) if v in crossing else self.taken(v, of))
                for name, v in stores:
                    self.line(f"o{self.numbers[name]}[k] = {self.read(v)};")
            for v in crossing:
                self.line(f"lanes.store(a{v.number}_{self.chunk}, a{v.number});")
            for name, _ in stores:  # when all is loaded: a store may be to what the compiler thinks is read next
                self.line(each(f"lanes.store({self.element(name)}, o{self.numbers[name]}[k]);"))

    def enter(self) -> None:
        """What a sweep's loop begins with."""
        self._read(self.small_vectors([self.sweep]))

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
        if v.span == Span.FULL:
            return self.load(v, self.element(v.detail))
        if v.span == self.small:
            return self.load(v, f"{name_of(v)}_{self.spots[v.span]}")
        if v.span == self.of_tile:
            array = self._kept(v) if v in self.places.kept else self.pointer(v)
            return self.load(v, f"{array}{self.spots[v.span]}")
        return super().loaded(v)

    def element(self, name: str) -> str:
        """A pointer to an element of an array."""
        return f"p{self.numbers[name]}{self.spots[Span.FULL]}"

    def _kept(self, v: Value) -> str:
        return f"kept<T>(w, {self.places.kept[v]}, w.leaf->{self.schedule.tiles})"

    def declare(self, v: Value, text: str) -> None:
        if v.span == self.of_tile:
            self.names[v] = f"{name_of(v)}[k]"
            self.line(f"{self.type(v)} {name_of(v)}[K]; {each(f'{self.names[v]} = {text};')}")
        else:
            super().declare(v, text)

    def point(self, sweeps: list[Sweep]) -> None:
        """Declares pointers to the arrays of full size that sweeps read or write."""
        full = full_arrays(sweeps)
        for name, number in self.numbers.items():
            if name in full:
                self.line(self.rows_of.format(number, self.stored(name), self.array(name)))

    def stores(self) -> list[tuple[str, Value]]:
        """What the sweep stores. Of numbers made of words, bfloat16 takes the words' upper halves as they are."""
        low = [name for name, _ in self.sweep.stores if self.arrays[name].dtype == "bfloat16"]
        return [(name, v.args[0] if name in low and v.op == "from_bits" else v) for name, v in self.sweep.stores]

    def across_tiles(self, sweeps: list[Sweep]) -> list[Value]:
        """The reductions over the chunk that sweeps add to."""
        return [v for sweep in sweeps for v in sweep.reductions if v in self.places.partial]

    def small_vectors(self, sweeps: list[Sweep]) -> list[Value]:
        found = {a for sweep in sweeps for v in sweep.full for a in v.args if a.span == self.small}
        return sorted(found, key=lambda v: v.number)


def reduced(text: str, v: Value, of: str = "") -> str:
    """A text of a reduction."""
    return text.format(v.number, REDUCE[v.detail], of)
