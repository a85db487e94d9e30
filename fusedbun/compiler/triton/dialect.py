"""The dialect of generated Triton, and the lines of one kernel."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fusedbun.compiler.graph import Span, Value
from fusedbun.compiler.printer import Printer
from fusedbun.compiler.triton.text import HELPERS, NUMBER, WORD, Kernel, Table
from fusedbun.operations import OPERATIONS
from fusedbun.storage.noise import word

START = {"sum": "0.0", "max": 'float("-inf")', "min": 'float("inf")'}
COMBINE = {"max": "maximum", "min": "minimum"}
# Operations that are written as calls, which would round a number among their operands to float32.
CALLS = {operation.name for operation in OPERATIONS.values() if "(" in operation.triton}


class Writer(Printer):
    """The lines of one kernel.

    Args:
        name: the kernel's.
        table: where things are.
        spots: where a value of each span lies in its array, and masked by what; others are single numbers.
        along: what is called the elements' place along each axis.
    """

    tab = "    "
    declaration = "{} = {}"

    def __init__(
        self, name: str, table: Table, spots: Mapping[Span, tuple[str, str]], along: Mapping[int, str]
    ) -> None:
        super().__init__(table.place)
        self.name, self.table, self._spots, self._along = name, table, spots, along
        self._head: dict[int, str] = {}  # by the column of the table
        self._helpers: set[str] = set()

    def finish(self, work: str) -> Kernel:
        """The kernel, of which a program has this much."""
        head = [f"    leaf = leaves + tl.load(work + 2 * tl.program_id(0)) * {len(self.table.names)}"]
        head += ["    stretch = tl.load(work + 2 * tl.program_id(0) + 1)"] if work != "leaf" else []
        head += [self._head[column] for column in sorted(self._head)]
        signature = "leaves, work, P: tl.constexpr, T: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr"
        lines = ["@triton.jit", f"def {self.name}({signature}):", *head, "", *self.lines]
        return Kernel(self.name, work, "\n".join(lines), frozenset(self._helpers))

    def size(self, *names: str) -> str:
        """A size, or the product of some, made known at the kernel's head."""
        for name in names:
            self._known(name, f"{name} = tl.load(leaf + {{}})")
        return " * ".join(names)

    def pointer(self, name: str) -> str:
        """The address of an array, made known at the kernel's head."""
        pointer = f"{self.table.identifiers[self.table.names.index(name)]}_at"
        dtype = self.table.dtype.get(name, NUMBER)
        self._known(name, f"{pointer} = tl.load(leaf + {{}}).to(tl.pointer_type({dtype}))")
        return pointer

    def _known(self, name: str, text: str) -> None:
        column = self.table.names.index(name)
        self._head[column] = f"    {text.format(column)}"

    def helper(self, name: str) -> str:
        """The name of a helper, which the module then has."""
        self._helpers.add(name)
        return name

    def spot(self, v: Value) -> tuple[str, str]:
        """Where a value lies in its array, and masked by what."""
        return self._spots.get(v.span, ("", ""))

    def compute(self, v: Value) -> None:
        """Computes and keeps a value that has a place in memory."""
        self.declare(v, self.computed(v))
        self.keep(v)

    def keep(self, v: Value) -> None:
        """Stores a value that has just been computed in its place."""
        self._write(self.placed[v], v, ".to(T)" if v.is_condition else "")

    def store(self, name: str, v: Value) -> None:
        """Stores a value in one of the leaf's own arrays."""
        self._write(name, v, _cast(_type(v), self.table.dtype[name]))

    def _write(self, name: str, v: Value, cast: str) -> None:
        index, mask = self.spot(v)
        self.line(f"tl.store({self.pointer(name)}{index}, {self.read(v)}{cast}{mask})")

    def start(self, v: Value, shape: str) -> None:
        """Starts a reduction, element by element of a tile."""
        self.line(f"q{v.number} = tl.full({shape}, {START[v.detail]}, T)")

    def accumulate(self, v: Value, x: str, mask: str) -> None:
        """Takes `x` up in it."""
        q = f"q{v.number}"
        x = f"tl.where({mask}, {x}, {START[v.detail]})"
        self.line(f"{q} = {f'{q} + {x}' if v.detail == 'sum' else f'{self.helper(COMBINE[v.detail])}({q}, {x})'}")

    def end(self, v: Value, axis: int | None) -> None:
        """Ends it, and keeps the result."""
        self.declare(v, self.reduced(v, f"q{v.number}", axis))
        self.keep(v)

    def reduced(self, v: Value, x: str, axis: int | None) -> str:
        """A reduction of a tile along one axis of it, or to one number."""
        keep = "" if axis is None else ", keep_dims=True"
        if v.detail == "sum":
            return f"tl.sum({x}, {axis}{keep})"
        return f"tl.reduce({x}, {axis}, {self.helper(COMBINE[v.detail])}{keep})"

    def literal(self, v: Value) -> str:
        number = word(v.detail) if v.is_word else v.detail
        if not np.isfinite(number):
            return f'float("{number}")'
        return repr(number) if number >= 0 else f"({number!r})"

    def expression(self, v: Value, args: list[str]) -> str:
        written = OPERATIONS[v.op].triton
        self._helpers |= HELPERS.keys() & {written.partition("(")[0]}
        return written.format(*args)

    def operand(self, v: Value, of: Value) -> str:
        is_inexact = v.op == "const" and not v.is_word and float(np.float32(v.detail)) != v.detail
        return f"tl.full((), {self.literal(v)}, T)" if of.op in CALLS and is_inexact else self.read(v)

    def index(self, v: Value) -> str:
        return f"{self._along[v.detail]}.to({WORD})"

    def loaded(self, v: Value) -> str:
        if v.op == "count":
            sizes = self.table.sizes(v.detail)
            return f"({self.size(*sizes)}).to(T)" if len(sizes) > 1 else f"{self.size(*sizes)}.to(T)"
        if v in self.table.words:
            return f"tl.load(leaf + {self.table.names.index(v.detail)}).to({WORD})  # {v.detail}"
        if v.span == Span.HOST:
            decode = " != 0" if v.is_condition else ""
            return f"tl.load({self.pointer('scalars')} + {self.table.numbers.index(v)}){decode}  # {_formula(v)}"
        return self.load(v, v.detail if v.op == "input" else self.placed[v])

    def load(self, v: Value, name: str) -> str:
        """The text of a value that is in memory."""
        index, mask = self.spot(v)
        decode = " != 0" if v.is_condition else _cast(self.table.dtype[name], _type(v))
        return f"tl.load({self.pointer(name)}{index}{mask}){decode}"


def _formula(v: Value) -> str:
    """A number made of hyper-parameters, as it is computed from them."""
    if v.op in ("const", "input"):
        return f"{v.detail:g}" if v.op == "const" else str(v.detail)
    args = [_formula(a) for a in v.args]
    if sign := OPERATIONS[v.op].sign:
        a, b = (f"({text})" if x.args else text for x, text in zip(v.args, args, strict=True))
        return f"{a} {sign} {b}"
    return f"{v.op}({', '.join(args)})"


def _type(v: Value) -> str:
    return WORD if v.is_word else NUMBER


def _cast(source: str, target: str) -> str:
    return "" if source == target else f".to({target})"
