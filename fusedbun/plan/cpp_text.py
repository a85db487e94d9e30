"""The words of generated C++: names, types and expressions."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fusedbun.plan.graph import ARITHMETIC, COMPARISONS, Span, Value
from fusedbun.plan.schedule import Schedule
from fusedbun.plan.trace import GRAD, PARAM, Program

STORED = {"compute": "T", "int8": "int8_t", "int32": "int32_t"}  # by a slot's code
FUNCTION = {"abs": "absolute", "sqrt": "root", "sign": "sign", "expm1": "expm1_of", "log": "log_of"}
REDUCE = {"sum": "Sum", "max": "Max", "min": "Min"}


class Arrays:
    """A leaf's arrays as the code numbers and types them: the parameter, the gradient, and the slots in their order."""

    def __init__(self, program: Program) -> None:
        self.names = [PARAM, GRAD, *program.slots]
        self._types = {PARAM: "P", GRAD: "P"} | {key: STORED[slot.code] for key, slot in program.slots.items()}

    def type(self, name: str) -> str:
        return self._types[name]

    def number(self, name: str) -> int:
        return self.names.index(name)

    def pointer(self, name: str) -> str:
        return f"(({self._types[name]}*)w.arrays[{self.number(name)}])"


class Places:
    """Where a schedule's small values, and the reductions of a chunk, lie in memory."""

    def __init__(self, schedule: Schedule) -> None:
        self.program = schedule.program
        self.row = "rows" if schedule.blocks == "columns" else "columns"  # what a vector has a number for
        self.small = _numbered(schedule.small)
        self.partial = _numbered(schedule.partials)
        self.kept = {v: n for n, v in enumerate(schedule.kept)}
        self.buffered = max((len(p.buffer) for p in schedule.passes), default=0)

    def of_small(self, v: Value) -> str:
        return self._place("w.small", self.small, v)

    def of_partial(self, v: Value) -> str:
        return self._place("w.partial", self.partial, v)

    def counts(self, placed: dict[Value, int]) -> tuple[int, int]:
        """How many of them are vectors, and how many are single numbers."""
        vectors = sum(is_vector(v) for v in placed)
        return vectors, len(placed) - vectors

    def _place(self, memory: str, placed: dict[Value, int], v: Value) -> str:
        vectors, _ = self.counts(placed)
        if is_vector(v):
            return f"vector<T>({memory}, w.leaf->{self.row}, {placed[v]})"
        return f"single<T>({memory}, w.leaf->{self.row}, {vectors}, {placed[v]})"


def is_vector(v: Value) -> bool:
    """Whether a small value is more than one number."""
    return bool(v.axes)


def _numbered(values: Iterable[Value]) -> dict[Value, int]:
    """A number for each, counted among the vectors and among the single numbers apart."""
    counts = {True: 0, False: 0}
    placed = {}
    for v in values:
        placed[v] = counts[is_vector(v)]
        counts[is_vector(v)] += 1
    return placed


def expression(v: Value, name: Callable[[Value], str], kind: str) -> str:
    """The C++ for one operation, computed in `kind` (`T` or `Vector<T>`) of operands that `name` writes."""
    args = [name(a) for a in v.args]
    if v.op in ARITHMETIC or v.op in COMPARISONS:
        sign = ARITHMETIC.get(v.op) or COMPARISONS[v.op]
        return f"{args[0]} {sign} {args[1]}"
    if v.op == "neg":
        return f"-{args[0]}"
    if v.op == "where":  # a single number among its operands is repeated in every lane
        return f"select<{kind}>({', '.join(args)})"
    if v.op in ("minimum", "maximum"):
        return f"{v.op}<{kind}>({', '.join(args)})"
    return f"{FUNCTION[v.op]}({args[0]})"


def literal(number: float) -> str:
    """A number as C++ writes it, in the type that is computed with."""
    if number in (float("inf"), float("-inf")):
        return f"T({'-' if number < 0 else ''}INFINITY)"
    return f"T({number!r})"


def singles(program: Program, values: Iterable[Value], arrays: Arrays, places: Places) -> dict[Value, str]:
    """Declarations of the single numbers that these values are computed with."""
    found: dict[Value, str] = {}
    order = program.graph.order
    for v in sorted({a for v in values for a in v.args}, key=lambda v: v.number):
        if v.op == "const" or v.span not in (Span.HOST, Span.SCALAR):
            continue
        if v.span == Span.HOST:
            text = f"T(w.leaf->scalars[{program.scalars.index(v)}])"
        elif v.op == "count":
            text = "T(" + " * ".join(f"w.leaf->sizes[{order.index(axis)}]" for axis in v.detail) + ")"
        elif v.op == "input":
            text = f"number<T>({arrays.pointer(v.detail)})"
        else:
            text = f"*{places.of_small(v)}"
        found[v] = f"const T s{v.number} = {text};"
    return found


def scalar_name(v: Value) -> str:
    """How a single number is written in an expression."""
    if v.op == "const":
        return literal(v.detail)
    return f"(s{v.number} != T(0))" if v.is_condition else f"s{v.number}"


def indented(lines: Iterable[str], by: int = 1) -> list[str]:
    """Lines moved to the right."""
    return ["  " * by + line if line else line for line in lines]
