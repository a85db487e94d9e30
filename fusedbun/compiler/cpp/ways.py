"""The ways of going over memory, by the shapes of leaves that they suit."""

from __future__ import annotations

from collections.abc import Iterator

from fusedbun.compiler.cpp.blocks import by_blocks
from fusedbun.compiler.cpp.passes import INLINED, Way, has_blocks
from fusedbun.compiler.cpp.text import LANES, REDUCE, indented, loaded
from fusedbun.compiler.graph import Value
from fusedbun.compiler.schedule import Pass, Sweep


class Rows(Way):
    """Blocks of four rows, the lanes along the columns."""

    name = "pass"

    def before(self, work: Pass, vectors: list[Value], crossing: list[Value]) -> Iterator[str]:
        yield "const Index n = w.leaf->columns;"
        yield from (f"const auto* const v{v.number}_ = {self._source(v)};" for v in vectors)
        yield from (f"T* const a{v.number}_ = {self.places.of_partial(v)};" for v in crossing)
        if work.buffer:
            yield "T* const saved = (T*)w.buffer;"
            yield "const Index width = up(n, LANES<T>);"

    def around(self, block: list[str]) -> list[str]:
        return [
            f"const auto block = [&](auto count, Index i) {INLINED} {{",
            *indented(["constexpr int K = count;", *block]),
            "};",
            "Index i = begin;",
            "for (; i + ROWS <= end; i += ROWS) block(Count<ROWS>{}, i);",
            "for (; i < end; i++) block(Count<1>{}, i);",
        ]

    def pointers(self, arrays: list[str]) -> Iterator[str]:
        for number in map(self.arrays.number, arrays):
            yield f"const RowsOf<{self.arrays.type(self.arrays.names[number])}, K> p{number}(w, {number}, i);"

    def loop(self, arrays: list[str], body: list[str]) -> list[str]:
        return [f"sweep<T>(n, [&](auto lanes, Index j) {INLINED} {{", *indented(body), "});"]

    def load_block(self, pointer: str) -> str:
        return f"number<T>({pointer} + i + k)"

    def store_block(self, pointer: str, text: str) -> str:
        return f"put({pointer} + i + k, {text});"

    def element(self, number: int) -> str:
        return f"p{number}[k] + j"

    def ask_ahead(self, number: int) -> str:
        return f"if constexpr (K == ROWS) p{number}.ask_ahead(k, j, n);"

    def ask_next(self, number: int) -> str:
        return f"if constexpr (K == ROWS) p{number}.ask_next(k, j);"

    def small(self, v: Value) -> str:
        return f"lanes.template {'words' if v.is_word else 'load'}<T>(v{v.number}_ + j)"

    def place(self) -> str:
        return "places<T>(j)"

    def block_place(self) -> str:
        return "Word(i + k)"

    def gone_over(self, work: Pass, sweep: Sweep, asked: list[str]) -> Iterator[str]:
        return by_blocks(self, work, sweep, asked) if has_blocks(sweep) else super().gone_over(work, sweep, asked)

    def chunk(self, v: Value) -> str:
        return f"a{v.number}_ + j"

    def saved(self, place: int) -> str:
        return f"saved + ({place} * K + k) * width + j"

    def result(self, v: Value) -> str:
        return f"fold<{REDUCE[v.detail]}>(q{v.number}[k])"

    def buffer_size(self) -> str:
        return f"return {self.places.buffered} * ROWS * up(leaf.columns, LANES<T>) * Index(sizeof(T));"


class PackedRows(Way):
    """Blocks of as many rows as a register has lanes, for rows shorter than two registers; the lanes along memory.

    Small vectors and the reductions over a chunk are repeated for every row of a block, so that a register meets the
    columns that its elements belong to. A block's values fill one register, a lane for each row.
    """

    name = "packed"
    block_kind = LANES
    block_operand = "spread(b{}[k], row_of + j)"

    def before(self, work: Pass, vectors: list[Value], crossing: list[Value]) -> Iterator[str]:
        yield "const Index n = w.leaf->columns;"
        yield "Room room(w.buffer);"
        yield "const auto* const row_of = rows_of_lanes<T>(room, n);"
        for v in vectors:
            kind = "Word" if v.is_word else "T"
            yield f"const auto* const v{v.number}_ = repeat<{kind}>(room, {self._source(v)}, n);"
        for v in crossing:
            yield f"T* const a{v.number}_ = start<{REDUCE[v.detail]}, T>(room, n * LANES<T>);"
        local = [v for sweep in work.sweeps for v in sweep.reductions if v not in self.places.partial]
        yield from (f"T* const q{v.number}_ = room.take<T>(n * LANES<T>);" for v in local)
        if work.buffer:
            yield f"T* const saved = room.take<T>({len(work.buffer)} * n * LANES<T>);"

    def around(self, block: list[str]) -> list[str]:
        return [
            "constexpr int K = 1;",
            "const Whole lanes;",
            "Index i = begin;",
            "for (; i + LANES<T> <= end; i += LANES<T>) {",
            *indented(block),
            "}",
        ]

    def behind(self, t: int, crossing: list[Value]) -> Iterator[str]:
        for v in crossing:
            yield f"collapse<{REDUCE[v.detail]}>({self.places.of_partial(v)}, a{v.number}_, n);"
        yield f"if (i < end) pass{t}(w, i, end);"

    def pointers(self, arrays: list[str]) -> Iterator[str]:
        for name in arrays:
            yield f"auto* const p{self.arrays.number(name)} = {self.arrays.pointer(name)} + i * n;"

    def loop(self, arrays: list[str], body: list[str]) -> list[str]:
        return ["for (Index j = 0; j < n * LANES<T>; j += LANES<T>) {", *indented(body), "}"]

    def load_block(self, pointer: str) -> str:
        return f"lanes.template load<T>({pointer} + i)"

    def store_block(self, pointer: str, text: str) -> str:
        return f"lanes.store({pointer} + i, {text});"

    def element(self, number: int) -> str:
        return f"p{number} + j"

    def ask_ahead(self, number: int) -> str:
        return f"ask(p{number} + j + LONG_AHEAD);"

    def ask_next(self, number: int) -> str:
        return self.ask_ahead(number)

    def small(self, v: Value) -> str:
        return f"lanes.template {'words' if v.is_word else 'load'}<T>(v{v.number}_ + j)"

    def block_place(self) -> str:
        return "places<T>(i)"

    def chunk(self, v: Value) -> str:
        return f"a{v.number}_ + j"

    def saved(self, place: int) -> str:
        return f"saved + {place} * n * LANES<T> + j"

    def reduction(self, v: Value) -> str:
        return ""

    def take_up(self, v: Value) -> str:
        return f"lanes.store(q{v.number}_ + j, x{v.args[0].number});"

    def result(self, v: Value) -> str:
        return f"fold_rows<{REDUCE[v.detail]}>(q{v.number}_, n)"

    def total(self, v: Value) -> str:
        return f"fold<{REDUCE[v.detail]}>(b{v.args[0].number}[k])"

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
    block_kind = LANES

    def before(self, work: Pass, vectors: list[Value], crossing: list[Value]) -> Iterator[str]:
        yield "const Index m = w.leaf->rows;"
        yield "Room room(w.buffer);"
        yield from (f"const auto* const v{v.number}_ = {self._source(v)};" for v in vectors)
        for v in crossing:
            yield f"T* const a{v.number}_ = start<{REDUCE[v.detail]}, T>(room, m * LANES<T>);"
        if work.buffer:
            yield f"T* const saved = room.take<T>({len(work.buffer)} * m * ROWS * LANES<T>);"

    def around(self, block: list[str]) -> list[str]:
        return [
            f"const auto block = [&](auto count, auto lanes, Index j) {INLINED} {{",
            *indented(["constexpr int K = count;", *block]),
            "};",
            "Index j = begin;",
            "for (; j + ROWS * LANES<T> <= end; j += ROWS * LANES<T>) block(Count<ROWS>{}, Whole{}, j);",
            "for (; j + LANES<T> <= end; j += LANES<T>) block(Count<1>{}, Whole{}, j);",
            "if (j < end) block(Count<1>{}, First{int(end - j)}, j);",
        ]

    def behind(self, t: int, crossing: list[Value]) -> Iterator[str]:
        for v in crossing:
            function, into = REDUCE[v.detail], f"{self.places.of_partial(v)}[i]"
            folded = f"fold<{function}>(Whole::load<T>(a{v.number}_ + i * LANES<T>))"
            yield f"for (Index i = 0; i < m; i++) {into} = {function}::of({into}, {folded});"

    def loop(self, arrays: list[str], body: list[str]) -> list[str]:
        numbers = [(self.arrays.number(name), self.arrays.type(name)) for name in arrays]
        pointers = [f"auto* const p{number} = row<{kind}>(w, {number}, i) + j;" for number, kind in numbers]
        return ["for (Index i = 0; i < m; i++) {", *indented([*pointers, *body]), "}"]

    def load_block(self, pointer: str) -> str:
        return f"lanes.template load<T>({pointer} + j + k * LANES<T>)"

    def store_block(self, pointer: str, text: str) -> str:
        return f"lanes.store({pointer} + j + k * LANES<T>, {text});"

    def element(self, number: int) -> str:
        return f"p{number} + k * LANES<T>"

    def ask_ahead(self, number: int) -> str:
        return f"if constexpr (K == ROWS) ask(p{number} + k * LANES<T> + AHEAD);"

    def small(self, v: Value) -> str:
        return loaded(v, f"v{v.number}_ + i")

    def place(self) -> str:
        return "places<T>(j + k * LANES<T>)"

    block_place = place

    def chunk(self, v: Value) -> str:
        return f"a{v.number}_ + i * LANES<T>"

    def saved(self, place: int) -> str:
        return f"saved + (({place} * m + i) * K + k) * LANES<T>"

    def take_up_in_chunk(self, v: Value) -> str:
        a = f"a{v.number}"
        return f"{a} = lanes.only({REDUCE[v.detail]}::of({a}, x{v.args[0].number}), {a});"

    def result(self, v: Value) -> str:
        return f"q{v.number}[k]"

    def buffer_size(self) -> str:
        registers = f"({len(self.schedule.partials)} + {self.places.buffered} * ROWS)"
        return f"return {registers} * up(leaf.rows * BYTES, ALIGNMENT);"


class Flat(Way):
    """Every element for itself: the leaf is one long row, and its elements are counted from the first."""

    name = "pass"

    def before(self, work: Pass, vectors: list[Value], crossing: list[Value]) -> Iterator[str]:
        for number in map(self.arrays.number, self._full_arrays(work.sweeps)):
            yield f"auto* const p{number} = {self.arrays.pointer(self.arrays.names[number])} + begin;"

    def around(self, block: list[str]) -> list[str]:
        return ["constexpr int K = 1;", *block]

    def loop(self, arrays: list[str], body: list[str]) -> list[str]:
        return [f"sweep<T>(end - begin, [&](auto lanes, Index j) {INLINED} {{", *indented(body), "});"]

    def element(self, number: int) -> str:
        return f"p{number} + j"

    def ask_ahead(self, number: int) -> str:
        return f"ask(p{number} + j + LONG_AHEAD);"

    def place(self) -> str:
        return "places<T>(begin + j)"
