"""The ways of going over memory, by the shapes of leaves that they suit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from fusedbun.compiler.cpp.passes import INLINED, Way
from fusedbun.compiler.cpp.text import REDUCE
from fusedbun.compiler.graph import Span, Value
from fusedbun.compiler.printer import name_of
from fusedbun.compiler.schedule import Pass, Sweep


class Rows(Way):
    """Blocks of four rows, the lanes along the columns."""

    name = "pass"
    registers = (Span.FULL, Span.BLOCK, Span.COLUMN)
    spots: ClassVar = {Span.FULL: "[k] + j", Span.ROW: " + i + k", Span.COLUMN: " + j"}
    indices: ClassVar = {Span.FULL: "places<T>(j)", Span.ROW: "Word(i + k)"}
    rows_of = "const RowsOf<{1}, K> p{0}(w, {0}, i);"
    ask_ahead = "if constexpr (K == ROWS) p{}.ask_ahead(k, j, n);"
    ask_next = "if constexpr (K == ROWS) p{}.ask_next(k, j);"
    saved = " + ({} * K + k) * width + j"
    ended = "fold<{1}>(q{0}[k])"

    @contextmanager
    def blocks(self, t: int) -> Iterator[None]:
        self.line("const Index n = w.leaf->columns;")
        for v in self.small_vectors(self.work):
            self.line(f"const auto* const {name_of(v)}_ = {self.pointer(v)};")
        for v in self.crossing(self.work.sweeps):
            self.line(f"T* const a{v.number}_ = {self.places.of_partial(v)};")
        if self.work.buffer:
            self.line("T* const saved = (T*)w.buffer;", "const Index width = up(n, LANES<T>);")
        with self.braces(f"const auto block = [&](auto count, Index i) {INLINED} {{", "};"):
            self.line("constexpr int K = count;")
            self.point(self.work.sweeps)
            yield
        self.line("Index i = begin;")
        self.line("for (; i + ROWS <= end; i += ROWS) block(Count<ROWS>{}, i);")
        self.line("for (; i < end; i++) block(Count<1>{}, i);")

    @contextmanager
    def loop(self, sweep: Sweep) -> Iterator[None]:
        with self.braces(f"sweep<T>(n, [&](auto lanes, Index j) {INLINED} {{", "});"):
            yield

    def buffer_size(self) -> str:
        return f"return {self.places.buffered} * ROWS * up(leaf.columns, LANES<T>) * Index(sizeof(T));"


class PackedRows(Way):
    """Blocks of as many rows as a register has lanes, for rows shorter than two registers; the lanes along memory.

    Small vectors and the reductions over a chunk are repeated for every row of a block, so that a register meets the
    columns that its elements belong to. A block's values fill one register, a lane for each row.
    """

    name = "packed"
    registers = (Span.FULL, Span.ROW, Span.COLUMN)
    spots: ClassVar = {Span.FULL: " + j", Span.ROW: " + i", Span.COLUMN: " + j"}
    indices: ClassVar = {Span.ROW: "places<T>(i)"}
    rows_of = "auto* const p{0} = {2} + i * n;"
    ask_ahead = ask_next = "ask(p{} + j + LONG_AHEAD);"
    saved = " + {} * n * LANES<T> + j"
    ended = "fold_rows<{1}>(q{0}_, n)"
    total = "fold<{0}>({1})"

    @contextmanager
    def blocks(self, t: int) -> Iterator[None]:
        crossing = self.crossing(self.work.sweeps)
        self.line("const Index n = w.leaf->columns;", "Room room(w.buffer);")
        self.line("const auto* const row_of = rows_of_lanes<T>(room, n);")
        for v in self.small_vectors(self.work):
            kind = "Word" if v.is_word else "T"
            self.line(f"const auto* const {name_of(v)}_ = repeat<{kind}>(room, {self.pointer(v)}, n);")
        for v in crossing:
            self.line(f"T* const a{v.number}_ = start<{REDUCE[v.detail]}, T>(room, n * LANES<T>);")
        for v in (v for sweep in self.work.sweeps for v in sweep.reductions if v not in crossing):
            self.line(f"T* const q{v.number}_ = room.take<T>(n * LANES<T>);")
        if self.work.buffer:
            self.line(f"T* const saved = room.take<T>({len(self.work.buffer)} * n * LANES<T>);")
        self.line("constexpr int K = 1;", "const Whole lanes;", "Index i = begin;")
        with self.braces("for (; i + LANES<T> <= end; i += LANES<T>) {"):
            self.point(self.work.sweeps)
            yield
        for v in crossing:
            self.line(f"collapse<{REDUCE[v.detail]}>({self.places.of_partial(v)}, a{v.number}_, n);")
        self.line(f"if (i < end) {Rows.name}{t}(w, i, end);")

    @contextmanager
    def loop(self, sweep: Sweep) -> Iterator[None]:
        with self.braces("for (Index j = 0; j < n * LANES<T>; j += LANES<T>) {"):
            yield

    def start(self, v: Value) -> None:
        """There is nothing to start: all elements are kept, and reduced behind the sweep."""

    def take_up(self, v: Value) -> None:
        self.line(f"lanes.store(q{v.number}_ + j, {self.read(v.args[0])});")

    def operand(self, v: Value, of: Value) -> str:
        text = super().operand(v, of)
        return f"spread({text}, row_of + j)" if v.span == Span.ROW and of.span == Span.FULL else text

    def buffer_size(self) -> str:
        sweeps = [sweep for work in self.schedule.passes for sweep in work.sweeps]
        vectors = self.small_vectors(Pass(sweeps))
        blocks = 1 + len(vectors) + sum(len(sweep.reductions) for sweep in sweeps) + self.places.buffered
        block = "up(leaf.columns * LANES<T> * Index(sizeof(T)), ALIGNMENT)"
        # and for the rows that are left over
        rows = f"{self.places.buffered} * ROWS * up(leaf.columns, LANES<T>) * Index(sizeof(T))"
        return f"return {blocks} * {block} + {rows};"


class Columns(Way):
    """Blocks of four registers of columns with all their rows, for few and very long rows."""

    name = "pass"
    registers = (Span.FULL, Span.COLUMN)
    spots: ClassVar = {Span.FULL: " + k * LANES<T>", Span.COLUMN: " + j + k * LANES<T>", Span.ROW: " + i"}
    indices: ClassVar = dict.fromkeys(registers, "places<T>(j + k * LANES<T>)")
    rows_of = "auto* const p{0} = row<{1}>(w, {0}, i) + j;"
    ask_ahead = "if constexpr (K == ROWS) ask(p{} + k * LANES<T> + AHEAD);"
    chunk = " + i * LANES<T>"
    saved = " + (({} * m + i) * K + k) * LANES<T>"
    taken = "{0} = lanes.only({1}::of({0}, {2}), {0});"

    @contextmanager
    def blocks(self, t: int) -> Iterator[None]:
        crossing = self.crossing(self.work.sweeps)
        self.line("const Index m = w.leaf->rows;", "Room room(w.buffer);")
        for v in self.small_vectors(self.work):
            self.line(f"const auto* const {name_of(v)}_ = {self.pointer(v)};")
        for v in crossing:
            self.line(f"T* const a{v.number}_ = start<{REDUCE[v.detail]}, T>(room, m * LANES<T>);")
        if self.work.buffer:
            self.line(f"T* const saved = room.take<T>({len(self.work.buffer)} * m * ROWS * LANES<T>);")
        with self.braces(f"const auto block = [&](auto count, auto lanes, Index j) {INLINED} {{", "};"):
            self.line("constexpr int K = count;")
            yield
        self.line("Index j = begin;")
        self.line("for (; j + ROWS * LANES<T> <= end; j += ROWS * LANES<T>) block(Count<ROWS>{}, Whole{}, j);")
        self.line("for (; j + LANES<T> <= end; j += LANES<T>) block(Count<1>{}, Whole{}, j);")
        self.line("if (j < end) block(Count<1>{}, First{int(end - j)}, j);")
        for v in crossing:
            function, into = REDUCE[v.detail], f"{self.places.of_partial(v)}[i]"
            folded = f"fold<{function}>(Whole::load<T>(a{v.number}_ + i * LANES<T>))"
            self.line(f"for (Index i = 0; i < m; i++) {into} = {function}::of({into}, {folded});")

    @contextmanager
    def loop(self, sweep: Sweep) -> Iterator[None]:
        with self.braces("for (Index i = 0; i < m; i++) {"):
            self.point([sweep])
            yield

    def buffer_size(self) -> str:
        registers = f"({len(self.schedule.partials)} + {self.places.buffered} * ROWS)"
        return f"return {registers} * up(leaf.rows * BYTES, ALIGNMENT);"


class Flat(Way):
    """Every element for itself: the leaf is one long row, and its elements are counted from the first."""

    name = "pass"
    registers = (Span.FULL,)
    spots: ClassVar = {Span.FULL: " + j"}
    indices: ClassVar = {Span.FULL: "places<T>(begin + j)"}
    rows_of = "auto* const p{0} = {2} + begin;"
    ask_ahead = "ask(p{} + j + LONG_AHEAD);"

    @contextmanager
    def blocks(self, t: int) -> Iterator[None]:
        self.point(self.work.sweeps)
        self.line("constexpr int K = 1;")
        yield

    @contextmanager
    def loop(self, sweep: Sweep) -> Iterator[None]:
        with self.braces(f"sweep<T>(end - begin, [&](auto lanes, Index j) {INLINED} {{", "});"):
            yield
