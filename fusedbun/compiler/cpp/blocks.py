"""The C++ of a sweep along rows whose codes share an exponent: 32 columns at a time, in stages.

What is reduced within a block of codes is known at the end of a stage, for all of the block's registers; the next one
uses it. Each stage goes over all rows, for one row's chain of operations is long and leaves the processor waiting.

Of the block's elements x7 is a register, or x7[k][r] where a later stage needs it: register r of row k. A number that
the block has once, in every lane, is b7 or b7[k].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fusedbun.compiler.cpp.passes import INLINED, reduced
from fusedbun.compiler.cpp.ways import Rows
from fusedbun.compiler.graph import Span, Value
from fusedbun.compiler.printer import has_blocks, name_of
from fusedbun.compiler.schedule import Schedule

EACH_ROW = ("for (int k = 0; k < K; k++) {", "}")
PLACE = "const auto lanes = lanes_of(r); const Index j = b * BLOCK + r * LANES<T>; (void)lanes; (void)j;"
TAKEN = "a{0}[r] = lanes.only({1}::of(a{0}[r], {2}), a{0}[r]);"


class CodedRows(Rows):
    """Tiles of rows, some of whose sweeps read or make codes."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule)
        self._held: set[Value] = set()  # what a later stage needs

    def go_over(self, asks: list[str]) -> None:
        if not has_blocks(self.program, [self.sweep]):
            super().go_over(asks)
            return
        full, stage = self.sweep.full, _stages(self.sweep.full)
        crossing = self.across_tiles([self.sweep])
        self._held = {a for v in full for a in v.args if stage.get(a, stage[v]) < stage[v]}
        self._held |= {v for _, v in self.stores()}
        with self.within(f"blocks<T>(n, [&](auto lanes_of, Index b) {INLINED} {{", "});"):
            self.line("constexpr int R = BLOCK / LANES<T>;")
            self._load(self.small_vectors([self.sweep]), crossing)
            for v in sorted(self._held, key=lambda v: v.number):
                self.line(f"{self.type(v)} {name_of(v)}[K]{'[R]' if v.span == Span.FULL else ''};")
            for s in range(max(stage.values()) + 1):
                with self.within(*EACH_ROW):
                    self._stage([v for v in full if stage[v] == s], asks if s == 0 else [])
            with self.within(*EACH_ROW):
                for name, v in self.stores():
                    self._put(name, v)
            if crossing:
                with self._registers():
                    self.line(*(f"lanes.store(a{v.number}_ + j, a{v.number}[r]);" for v in crossing))
        self._held = set()

    def _load(self, vectors: list[Value], crossing: list[Value]) -> None:
        """What there is of the block's columns, for all rows."""
        self.line(*(f"{self.type(v)} {name_of(v)}[R];" for v in vectors))
        self.line(*(f"Vector<T> a{v.number}[R];" for v in crossing))
        if vectors or crossing:
            with self._registers():
                self.line(*(f"{name_of(v)}[r] = {self.loaded(v)};" for v in vectors))
                self.line(*(f"a{v.number}[r] = lanes.template load<T>(a{v.number}_ + j);" for v in crossing))
        self.names |= {v: f"{name_of(v)}[r]" for v in vectors}

    @contextmanager
    def _registers(self) -> Iterator[None]:
        with self.within(f"each<R>([&](auto r) {INLINED} {{", "});"):
            self.line(PLACE)
            yield

    def _stage(self, values: list[Value], asks: list[str]) -> None:
        full = [v for v in values if v.span == Span.FULL]
        for v in values:
            if v.span == Span.BLOCK:
                self._assign(v)
        if full:
            with self._registers():
                self.line(*asks)
                for v in full:
                    self._assign(v)
                    self.save(v)
                for v in (v for v in self.sweep.reductions if v.args[0] in full):
                    of = self.read(v.args[0])
                    self.line(reduced(TAKEN, v, of) if v in self.places.partial else self.taken(v, of))

    def _assign(self, v: Value) -> None:
        if v in self._held:
            self.line(f"{self.read(v)} = {self.text(v)};")
        else:
            self.read(v)

    def _put(self, name: str, v: Value) -> None:
        p, bits = f"p{self.numbers[name]}", self.arrays[name].bits
        if v.span == Span.BLOCK:
            self.line(f"{p}[k][b] = {self.stored(name)}({self.read(v)}[0]);")
        elif bits:
            self.line(f"to_packed<T, {bits}>({p}[k], b, {name_of(v)}[k], lanes_of);")
        else:
            with self._registers():
                self.line(f"lanes.store({self.element(name)}, {self.read(v)});")

    def read(self, v: Value) -> str:
        if v in self._held:
            return f"{name_of(v)}[k][r]" if v.span == Span.FULL else f"{name_of(v)}[k]"
        return super().read(v)

    def loaded(self, v: Value) -> str:
        if v.span == Span.BLOCK:
            return f"wide<Words<T>>(Word(p{self.numbers[v.detail]}[k][b]))"
        if v.span == Span.FULL and v.op == "input" and (bits := self.arrays[v.detail].bits):
            return f"from_packed<T, {bits}>(p{self.numbers[v.detail]}[k], b, r)"
        return super().loaded(v)

    def computed(self, v: Value) -> str:
        return f"largest<T>({name_of(v.args[0])}[k], lanes_of)" if v.op == "block_max" else super().computed(v)


def _stages(values: list[Value]) -> dict[Value, int]:
    """After how many reductions within a block each value is ready."""
    found: dict[Value, int] = {}
    for v in values:
        found[v] = max((found.get(a, 0) for a in v.args), default=0) + (v.op == "block_max")
    return found
