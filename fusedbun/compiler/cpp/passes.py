"""The C++ that goes over memory: a function for each pass of a schedule, in a way that suits some shape of leaf.

All ways (`cpp_ways`) share one skeleton, and this is it. A block of rows is taken at a time (of columns, where the
schedule says so). Within a sweep along it the arrays' elements are loaded, computed with, reduced and stored, a
register of lanes at a time. The ways differ in what the lanes run along, and so in how the values of a block, of a
sweep and of a chunk are held.

Where codes share an exponent, a sweep goes over 32 columns at a time. Their elements are computed in stages, for what
is reduced within the block has to be known for all of it before the rest.

In the code x7 is the element %7, b7 the block's value, v7 that of a small vector, s7 a single number; q7 is %7 while
it is reduced along a block, a7 while it is reduced over a chunk; p0, p1, … are the leaf's arrays.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator

from fusedbun.compiler.cpp.text import (
    LANES,
    ONE,
    REDUCE,
    Arrays,
    Kind,
    Places,
    expression,
    indented,
    kind_of,
    scalar_name,
    singles,
)
from fusedbun.compiler.graph import Span, UnplannableError, Value
from fusedbun.compiler.schedule import WIDE, Pass, Schedule, Sweep

INLINED = "__attribute__((always_inline))"
HEAD = "void {}{}(const Work& w, Index begin, Index end) {{"


def has_blocks(sweep: Sweep) -> bool:
    """Whether codes are read or made in it that share an exponent."""
    return any(v.span == Span.BLOCK for v in sweep.full)


def each(*lines: str) -> str:
    """Lines for every k of a block."""
    return f"each<K>([&](auto k) {INLINED} {{ {' '.join(lines)} }});"


class Way(ABC):
    """A way of going over memory; the subclasses say how each part of the skeleton is written.

    Args:
        schedule: what is done.
        arrays: the leaf's arrays.
    """

    name: str
    block_kind: Kind = ONE  # of one number for each row or column of the blocks
    block_operand = "b{}[k]"

    def __init__(self, schedule: Schedule, arrays: Arrays) -> None:
        self.schedule, self.arrays, self.places = schedule, arrays, Places(schedule)
        self.blocks = f"w.leaf->{schedule.blocks}"  # how many numbers one for each row (column) of the blocks are

    def function(self, t: int) -> list[str]:
        work = self.schedule.passes[t]
        values = [v for sweep in work.sweeps for v in (*sweep.block, *sweep.full)] + work.after
        crossing = [v for sweep in work.sweeps for v in sweep.reductions if v in self.places.partial]
        lines = [*singles(self.schedule.program, values, self.arrays, self.places).values()]
        lines += self.before(work, self.small_vectors(work), crossing)
        lines += self.around([*self._block(work)])
        lines += self.behind(t, crossing)
        return [HEAD.format(self.name, t), *indented(lines), "}"]

    # ---- what the subclasses write

    @abstractmethod
    def before(self, work: Pass, vectors: list[Value], crossing: list[Value]) -> Iterator[str]:
        """What the function begins with: `v7_` points to small vectors, `a7_` to the reductions over the chunk."""

    @abstractmethod
    def around(self, block: list[str]) -> list[str]:
        """The loops over the blocks."""

    def behind(self, t: int, crossing: list[Value]) -> Iterator[str]:
        """What the function ends with."""
        return iter(())

    @abstractmethod
    def loop(self, arrays: list[str], body: list[str]) -> list[str]:
        """The loop of a sweep along a block."""

    def pointers(self, arrays: list[str]) -> Iterator[str]:
        """Pointers to arrays of full size, at the start of a block."""
        return iter(())

    def load_block(self, pointer: str) -> str:
        raise NotImplementedError  # not asked for: a flat leaf has no codes

    def store_block(self, pointer: str, text: str) -> str:
        raise NotImplementedError  # not asked for: likewise

    @abstractmethod
    def element(self, number: int) -> str:
        """A pointer to an element of an array."""

    def ask_ahead(self, number: int) -> str:
        """Asks for what is loaded from an array soon after this element; nothing where memory need not be asked."""
        return ""

    def ask_next(self, number: int) -> str:
        """Asks for this element of the next block, or nothing."""
        return ""

    def small(self, v: Value) -> str:
        """A small vector's number for this element."""
        raise NotImplementedError  # not asked for: a flat leaf is elementwise, without small vectors

    def place(self) -> str:
        """The places of these elements along the axis that lanes run along."""
        raise NotImplementedError  # not asked for: packed rows have none along a row

    def block_place(self) -> str:
        """The places of the block's rows, or columns."""
        raise NotImplementedError  # not asked for: columns and flat leaves have none

    def chunk(self, v: Value) -> str:
        """A pointer to a reduction over the chunk, for this element."""
        raise NotImplementedError  # not asked for: a flat leaf reduces nothing

    def saved(self, place: int) -> str:
        """A pointer into the block's buffer, for this element."""
        raise NotImplementedError  # not asked for: a flat leaf goes over its block once

    def reduction(self, v: Value) -> str:
        """A reduction along a block, before its sweep."""
        return f"Vector<T> q{v.number}[K]; {each(f'q{v.number}[k] = wide<Vector<T>>({REDUCE[v.detail]}::start<T>);')}"

    def take_up(self, v: Value) -> str:
        """Takes an element up in a reduction along a block."""
        q = f"q{v.number}[k]"
        return f"{q} = lanes.only({REDUCE[v.detail]}::of({q}, x{v.args[0].number}), {q});"

    def take_up_in_chunk(self, v: Value) -> str:
        return f"a{v.number} = {REDUCE[v.detail]}::of(a{v.number}, x{v.args[0].number});"

    def result(self, v: Value) -> str:
        """The text of a reduction along a block, after its sweep."""
        raise NotImplementedError  # not asked for: a flat leaf reduces nothing

    def total(self, v: Value) -> str:
        """The text of a block's value as one number."""
        return f"b{v.args[0].number}[k]"

    def buffer_size(self) -> str:
        """The body of the function that says how many bytes a chunk's buffer takes."""
        return "(void)leaf; return 0;"

    # ---- the skeleton

    def _block(self, work: Pass) -> Iterator[str]:
        yield from self.pointers(self._full_arrays(work.sweeps))
        asks = self._asks(work)
        for sweep, asked in zip(work.sweeps, asks, strict=True):
            yield from self._block_values(sweep.block, work)
            yield from self._sweep(work, sweep, asked)
        yield from self._block_values(work.after, work)
        for v in work.keeps:
            yield each(self.store_block(f"kept<T>(w, {self.places.kept[v]}, {self.blocks})", f"b{v.number}[k]"))
        for v in work.totals:
            yield f"T& a{v.number} = *{self.places.of_partial(v)};"
            yield each(f"a{v.number} = {REDUCE[v.detail]}::of(a{v.number}, {self.total(v)});")
        for name, v in work.stores:
            yield each(self.store_block(self.arrays.pointer(name), f"b{v.number}[k]"))

    def _asks(self, work: Pass) -> list[list[str]]:
        """The lines with which each sweep asks memory for what is needed soon.

        An array is asked for a little ahead of where it is first loaded. One that the first of several sweeps loads is
        asked for a block ahead in the last of them, which does the most with each element and so waits the least.
        """
        asks: list[list[str]] = [[] for _ in work.sweeps]
        first: dict[str, int] = {}
        for s, sweep in enumerate(work.sweeps):
            for v in sweep.full:
                is_long = v.op == "input" and self.arrays.has_every_element(v.detail)
                if is_long and first.setdefault(v.detail, s) == s:
                    number = self.arrays.number(v.detail)
                    if s == 0 and len(work.sweeps) > 1:
                        asks[-1].append(self.ask_next(number))
                    else:
                        asks[s].append(self.ask_ahead(number))
        return [[line for line in lines if line] for lines in asks]

    def _block_values(self, values: Iterable[Value], work: Pass) -> Iterator[str]:
        ended = {v for sweep in work.sweeps for v in sweep.reductions}
        for v in values:
            if v in ended:
                continue  # reduced in this pass: its sweep has left it
            if v.op == "input":
                text = self.load_block(self.arrays.pointer(v.detail))
            elif v in self.places.kept:
                text = self.load_block(f"kept<T>(w, {self.places.kept[v]}, {self.blocks})")
            elif v.op == "index":
                text = self.block_place()
            else:
                text = expression(
                    v, lambda a: f"b{a.number}[k]" if a.span > Span.SCALAR else scalar_name(a), self.block_kind
                )
            yield f"{kind_of(v, self.block_kind)} b{v.number}[K]; {each(f'b{v.number}[k] = {text};')}"

    def _sweep(self, work: Pass, sweep: Sweep, asked: list[str]) -> Iterator[str]:
        local = [v for v in sweep.reductions if v not in self.places.partial]
        for v in local:
            yield self.reduction(v)
        yield from self.gone_over(work, sweep, asked)
        for v in local:
            yield f"{self.block_kind[0]} b{v.number}[K]; {each(f'b{v.number}[k] = {self.result(v)};')}"

    def gone_over(self, work: Pass, sweep: Sweep, asked: list[str]) -> Iterator[str]:
        """The loop of a sweep."""
        if has_blocks(sweep):
            raise UnplannableError("codes that share an exponent are gone over row by row")
        crossing = self.crossing(sweep)
        body = [f"const auto v{v.number} = {self.small(v)};" for v in self.small_vectors(Pass([sweep]))]
        body += [f"auto a{v.number} = lanes.template load<T>({self.chunk(v)});" for v in crossing]
        body += [f"{kind_of(v, LANES)} o{self.arrays.number(name)}[K];" for name, v in self.stores(sweep)]
        body += [f"each<K>([&](auto k) {INLINED} {{", *indented(self._elements(work, sweep, asked)), "});"]
        body += [f"lanes.store({self.chunk(v)}, a{v.number});" for v in crossing]
        for name, _ in sweep.stores:  # when all is loaded: a store may be to what the compiler thinks is read next
            number = self.arrays.number(name)
            body.append(each(f"lanes.store({self.element(number)}, o{number}[k]);"))
        yield from self.loop(self._full_arrays([sweep]), body)

    def stores(self, sweep: Sweep) -> list[tuple[str, Value]]:
        """What a sweep stores. Of numbers made of words, bfloat16 takes the words' upper halves as they are."""
        is_rounded = {(name, v) for name, v in sweep.stores if v.op == "from_bits" and self.arrays.is_bfloat16(name)}
        return [(name, v.args[0] if (name, v) in is_rounded else v) for name, v in sweep.stores]

    def crossing(self, sweep: Sweep) -> list[Value]:
        """The reductions over the chunk that a sweep adds to."""
        return [v for v in sweep.reductions if v in self.places.partial]

    def operand(self, v: Value) -> str:
        """How an operand of an element is written."""
        small = Span.COLUMN if self.schedule.blocks == "rows" else Span.ROW
        if v.span in WIDE:
            return f"x{v.number}"
        if v.span == small:
            return f"v{v.number}"
        return scalar_name(v) if v.span <= Span.SCALAR else self.block_operand.format(v.number)

    def _elements(self, work: Pass, sweep: Sweep, asked: list[str]) -> Iterator[str]:
        yield from asked
        for v in sweep.full:
            yield f"const auto x{v.number} = {self.computed(v, work, sweep, self.operand)};"
            if v in sweep.saved:
                yield self.save(v, work, f"x{v.number}")
        for v in sweep.reductions:
            yield self.take_up_in_chunk(v) if v in self.places.partial else self.take_up(v)
        for name, v in self.stores(sweep):
            yield f"o{self.arrays.number(name)}[k] = x{v.number};"

    def computed(self, v: Value, work: Pass, sweep: Sweep, name: Callable[[Value], str]) -> str:
        """The text of an element: loaded, kept from an earlier sweep, or computed."""
        if v.op == "input":
            return f"lanes.template {'words' if v.is_word else 'load'}<T>({self.element(self.arrays.number(v.detail))})"
        if v.op == "index":
            return self.place()
        if v in work.buffer and v not in sweep.saved:
            load = f"lanes.template load<T>({self.saved(work.buffer.index(v))})"
            return f"(Words<T>){load}" if v.is_word else f"{load} != T(0)" if v.is_condition else load
        return expression(v, name, LANES)

    def save(self, v: Value, work: Pass, name: str) -> str:
        """Keeps an element for a later sweep."""
        number = f"select<Vector<T>>({name}, T(1), T(0))" if v.is_condition else name
        return f"lanes.store({self.saved(work.buffer.index(v))}, {f'(Vector<T>){number}' if v.is_word else number});"

    def small_vectors(self, work: Pass) -> list[Value]:
        small = Span.COLUMN if self.schedule.blocks == "rows" else Span.ROW
        found = {a for sweep in work.sweeps for v in sweep.full for a in v.args if a.span == small}
        return sorted(found, key=lambda v: v.number)

    def _full_arrays(self, sweeps: list[Sweep]) -> list[str]:
        read = {v.detail for sweep in sweeps for v in sweep.full if v.op == "input"}
        written = {name for sweep in sweeps for name, _ in sweep.stores}
        return [name for name in self.arrays.names if name in read | written]

    def _source(self, v: Value) -> str:
        """Where a small vector is read from."""
        return self.arrays.pointer(v.detail) if v.op == "input" else self.places.of_small(v)
