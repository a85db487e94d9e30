"""The ways of going over memory, by the shapes of leaves that they suit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from fusedbun.compiler.cpp.passes import INLINED, Way, reduced
from fusedbun.compiler.graph import Span, Value

SWEEP = f"sweep<T>({{}}, [&](auto lanes, Index j) {INLINED} {{{{"
BEGUN = f"Vector<T> q{{0}}[K]; each<K>([&](auto k) {INLINED} {{{{ q{{0}}[k] = wide<Vector<T>>({{1}}::start<T>); }}}});"
ROOM_OF_ROWS = "{1} * ROWS * up(leaf.columns, LANES<T>) * Index(sizeof(T))"


class Rows(Way):
    """Tiles of four rows, the lanes along the columns."""

    name = "rows"
    registers = (Span.FULL, Span.BLOCK, Span.COLUMN)
    spots: ClassVar = {Span.FULL: "[k] + j", Span.ROW: " + i + k", Span.COLUMN: " + j"}
    indices: ClassVar = {Span.FULL: "places<T>(j)", Span.ROW: "Word(i + k)"}
    opening = ("const Index n = w.leaf->columns;",)
    rows_of = "const RowsOf<{1}, K> p{0}(w, {0}, i);"
    loop = (SWEEP.format("n"), "});")
    ask_ahead = "if constexpr (K == ROWS) p{}.ask_ahead(k, j, n);"
    ask_next = "if constexpr (K == ROWS) p{}.ask_next(k, j);"
    saved = " + ({} * K + k) * width + j"
    buffer = f"return {ROOM_OF_ROWS};"
    crossing = "T* const a{0}_ = {2};"
    along = BEGUN
    along_ended = "fold<{1}>(q{0}[k])"
    over = "Vector<T> q{0} = wide<Vector<T>>({1}::start<T>);"

    @contextmanager
    def tiles(self, t: int) -> Iterator[None]:
        if self.work.buffer:
            self.line("T* const saved = (T*)w.buffer;", "const Index width = up(n, LANES<T>);")
        with self.within(f"const auto tile = [&](auto count, Index i) {INLINED} {{", "};"):
            self.line("constexpr int K = count;")
            self.point(self.work.sweeps)
            yield
        self.line("Index i = begin;")
        self.line("for (; i + ROWS <= end; i += ROWS) tile(Count<ROWS>{}, i);")
        self.line("for (; i < end; i++) tile(Count<1>{}, i);")


class PackedRows(Way):
    """Tiles of as many rows as a register has lanes, for rows shorter than two registers; the lanes along memory.

    Small vectors and the reductions over a chunk are repeated for every row of a tile, so that a register meets the
    columns that its elements belong to. A tile's values fill one register, a lane for each row. What is reduced along
    a row is kept for all rows, and reduced behind the sweep.
    """

    name = "packed"
    registers = (Span.FULL, Span.ROW, Span.COLUMN)
    spots: ClassVar = {Span.FULL: " + j", Span.ROW: " + i", Span.COLUMN: " + j"}
    indices: ClassVar = {Span.ROW: "places<T>(i)"}
    opening = (*Rows.opening, "Room room(w.buffer);", "const auto* const row_of = rows_of_lanes<T>(room, n);")
    vector = "const auto* const {0}_ = repeat<{2}>(room, {1}, n);"
    rows_of = "auto* const p{0} = {2} + i * n;"
    loop = ("for (Index j = 0; j < n * LANES<T>; j += LANES<T>) {", "}")
    ask_ahead = ask_next = "ask(p{} + j + LONG_AHEAD);"
    saved = " + {} * n * LANES<T> + j"
    # with the buffer of the rows that are left over
    buffer = f"return {{2}} * up(leaf.columns * LANES<T> * Index(sizeof(T)), ALIGNMENT) + {ROOM_OF_ROWS};"
    crossing = "T* const a{0}_ = start<{1}, T>(room, n * LANES<T>);"
    along_taken = "lanes.store(q{0}_ + j, {2});"
    along_ended = "fold_rows<{1}>(q{0}_, n)"
    total = "fold<{1}>({2})"

    @contextmanager
    def tiles(self, t: int) -> Iterator[None]:
        crossing = self.across_tiles(self.work.sweeps)
        for v in (v for sweep in self.work.sweeps for v in sweep.reductions if v not in crossing):
            self.line(f"T* const q{v.number}_ = room.take<T>(n * LANES<T>);")
        if self.work.buffer:
            self.line(f"T* const saved = room.take<T>({len(self.work.buffer)} * n * LANES<T>);")
        self.line("constexpr int K = 1;", "const Whole lanes;", "Index i = begin;")
        with self.within("for (; i + LANES<T> <= end; i += LANES<T>) {", "}"):
            self.point(self.work.sweeps)
            yield
        self.line(*(reduced("collapse<{1}>({2}, a{0}_, n);", v, self.places.partial[v]) for v in crossing))
        self.line(f"if (i < end) {Rows.name}{t}(w, i, end);")

    def operand(self, v: Value, of: Value) -> str:
        text = super().operand(v, of)
        return f"spread({text}, row_of + j)" if v.span == Span.ROW and of.span == Span.FULL else text


class Columns(Way):
    """Tiles of four registers of columns with all their rows, for few and very long rows."""

    name = "columns"
    registers = (Span.FULL, Span.COLUMN)
    spots: ClassVar = {Span.FULL: " + k * LANES<T>", Span.COLUMN: " + j + k * LANES<T>", Span.ROW: " + i"}
    indices: ClassVar = dict.fromkeys(registers, "places<T>(j + k * LANES<T>)")
    opening = ("const Index m = w.leaf->rows;", "Room room(w.buffer);")
    rows_of = "auto* const p{0} = row<{1}>(w, {0}, i) + j;"
    loop = ("for (Index i = 0; i < m; i++) {", "}")
    ask_ahead = "if constexpr (K == ROWS) ask(p{} + k * LANES<T> + AHEAD);"
    saved = " + (({} * m + i) * K + k) * LANES<T>"
    buffer = "return ({0} + {1} * ROWS) * up(leaf.rows * BYTES, ALIGNMENT);"
    crossing = "T* const a{0}_ = start<{1}, T>(room, m * LANES<T>);"
    chunk = " + i * LANES<T>"
    crossing_taken = "a{0} = lanes.only({1}::of(a{0}, {2}), a{0});"
    along = BEGUN

    @contextmanager
    def tiles(self, t: int) -> Iterator[None]:
        if self.work.buffer:
            self.line(f"T* const saved = room.take<T>({len(self.work.buffer)} * m * ROWS * LANES<T>);")
        with self.within(f"const auto tile = [&](auto count, auto lanes, Index j) {INLINED} {{", "};"):
            self.line("constexpr int K = count;")
            yield
        self.line("Index j = begin;")
        self.line("for (; j + ROWS * LANES<T> <= end; j += ROWS * LANES<T>) tile(Count<ROWS>{}, Whole{}, j);")
        self.line("for (; j + LANES<T> <= end; j += LANES<T>) tile(Count<1>{}, Whole{}, j);")
        self.line("if (j < end) tile(Count<1>{}, First{int(end - j)}, j);")
        ended = "for (Index i = 0; i < m; i++) {2} = {1}::of({2}, fold<{1}>(Whole::load<T>(a{0}_ + i * LANES<T>)));"
        for v in self.across_tiles(self.work.sweeps):
            self.line(reduced(ended, v, f"{self.places.partial[v]}[i]"))

    def enter(self) -> None:
        self.point([self.sweep])
        super().enter()


class Flat(Way):
    """Every element for itself: the leaf is one long row, and its elements are counted from the first."""

    name = "flat"
    registers = (Span.FULL,)
    spots: ClassVar = {Span.FULL: " + j"}
    indices: ClassVar = {Span.FULL: "places<T>(begin + j)"}
    rows_of = "auto* const p{0} = {2} + begin;"
    loop = (SWEEP.format("end - begin"), "});")
    ask_ahead = "ask(p{} + j + LONG_AHEAD);"

    @contextmanager
    def tiles(self, t: int) -> Iterator[None]:
        self.point(self.work.sweeps)
        self.line("constexpr int K = 1;")
        yield
