"""The C++ that computes a schedule's small values: one number for each column, or one in all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fusedbun.compiler.cpp.dialect import REDUCE, Cpp
from fusedbun.compiler.graph import REDUCTIONS, Value


class Between(Cpp):
    """A function of those that run before each pass and, the last of them, at the end; see `Cpp`."""

    def function(self, t: int) -> list[str]:
        for v in self.schedule.between[t]:
            with self.within(f"{{  // %{v.number}", "}"):
                self._place(v)
        if t == len(self.schedule.passes):
            self._moves([(name, v) for name, v in self.schedule.stores if v.op == "input"])
            for name, v in self.schedule.stores:
                if v.op != "input":
                    self.line(f"copy({self.array(name)}, {self.pointer(v)}, {self._count(v.axes)});")
        if not self.lines:
            self.line("(void)w;")
        return [f"void between{t}(const Work& w) {{", *self.lines, "}"]

    def _place(self, v: Value) -> None:
        kind = "Word" if v.is_word else "T"
        self.line(f"{kind}* const out = {self.pointer(v)};")
        if v in self.places.partial:
            count = f"w.leaf->{self.places.row}" if v.axes else "1"
            partial = self.places.partial[v]
            self.line(f"combine<{REDUCE[v.detail]}>(out, {partial}, {count}, w.chunks, w.partial_bytes);")
            return
        self.hoist(v.args, lambda a: not a.axes)
        if v.op in REDUCTIONS:
            self._reduction(v, *v.args)
        else:
            with self._nest(v.axes):
                text = self.computed(v)
                self.line(f"{f'out[{self._at(v)}]' if v.axes else '*out'} = {kind}({text});")

    def _reduction(self, v: Value, x: Value) -> None:
        function = REDUCE[v.detail]
        if v.axes:
            with self._nest(v.axes):
                self.line(f"out[{self._at(v)}] = {function}::start<T>;")
            with self._nest(x.axes):
                text = self.read(x)
                self.line(f"T& into = out[{self._at(v)}];", f"into = {function}::of(into, T({text}));")
        else:  # one number is added up in double precision
            self.line(f"double total = {function}::start<double>;")
            with self._nest(x.axes):
                text = self.read(x)
                self.line(f"total = {function}::of(total, double({text}));")
            self.line("*out = T(total);")

    def _moves(self, moved: list[tuple[str, Value]]) -> None:
        """Slots become what other slots were: of each element all are read before any is written."""
        for axes in dict.fromkeys(v.axes for _, v in moved):
            group = [(name, v) for name, v in moved if v.axes == axes]
            with self.within(f"for (Index j = 0; j < {self._count(axes)}; j++) {{", "}"):
                for v in dict.fromkeys(v for _, v in group):
                    self.line(f"const T m{v.number} = number<T>({self.pointer(v)} + j);")
                self.line(*(f"put({self.array(name)} + j, m{v.number});" for name, v in group))

    def _count(self, axes: frozenset[int]) -> str:
        return " * ".join(map(self.size, sorted(axes))) or "1"

    def is_loaded(self, v: Value) -> bool:
        return v.op != "index" and super().is_loaded(v)

    def read(self, v: Value) -> str:
        """Inside a loop over its axes, what is loaded is read where it is needed, and so are the loop's own numbers."""
        return self.text(v) if v.axes and (self.is_loaded(v) or v.op == "index") else super().read(v)

    def loaded(self, v: Value) -> str:
        if not v.axes:
            return super().loaded(v)
        at = self._at(v)
        return self.load(v, f"{self.pointer(v)} + {at}") if v.op == "input" else f"{self.pointer(v)}[{at}]"

    def index(self, v: Value) -> str:
        return f"Word(i{v.detail})"

    @contextmanager
    def _nest(self, axes: frozenset[int]) -> Iterator[None]:
        """Loops over some of the parameter's axes."""
        for axis in self._ordered(axes):
            self.line(f"for (Index i{axis} = 0; i{axis} < {self.size(axis)}; i{axis}++)")
        if axes:
            with self.within("{", "}"):
                yield
        else:
            yield

    def _at(self, v: Value) -> str:
        """The place of an element in an array that spans the value's axes."""
        slowest, *others = self._ordered(v.axes)
        text = f"i{slowest}"
        for axis in others:
            text = f"({text} * {self.size(axis)} + i{axis})"
        return text

    def _ordered(self, axes: frozenset[int]) -> list[int]:
        return sorted(axes, key=self.program.graph.order.index)
