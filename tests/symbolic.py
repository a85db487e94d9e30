"""A minimal symbolic `xp`: a rule called with it yields an expression graph instead of numbers.

It accepts only what a plan can schedule: `xp`'s functions and operators, no branch on a value, and reductions over the
leading axis, all axes but the leading one, all but one, or all.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from fusedbun.chain import Chain, step

NUMPY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "neg": np.negative,
    "eq": np.equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@dataclass(frozen=True, eq=False)
class Node:
    """A value: the operation that makes it, and which of the parameter's axes it spans."""

    op: str
    args: tuple[Any, ...]
    axes: frozenset[int]
    ndim: int
    keywords: tuple[tuple[str, Any], ...] = ()

    @property
    def shape(self) -> tuple[None, ...]:
        return (None,) * self.ndim

    def __bool__(self) -> bool:
        raise TypeError("a rule branched on an array's value")

    def evaluate(self, values: dict[str, Any], done: dict[int, Any]) -> Any:
        if id(self) not in done:
            if self.op == "input":
                done[id(self)] = values[self.args[0]]
            else:
                args = [a.evaluate(values, done) if isinstance(a, Node) else a for a in self.args]
                done[id(self)] = (NUMPY.get(self.op) or getattr(np, self.op))(*args, **dict(self.keywords))
        return done[id(self)]

    def walk(self) -> list[Node]:
        return [self, *(n for a in self.args if isinstance(a, Node) for n in a.walk())]


def _elementwise(op: str, reflected: bool = False) -> Any:
    def apply(*args: Any) -> Node:
        ndim = max(a.ndim for a in args if isinstance(a, Node))
        axes = frozenset().union(*(a.axes for a in args if isinstance(a, Node)))
        return Node(op, args[::-1] if reflected else args, axes, ndim)

    return apply


for operator in ("add", "sub", "mul"):
    setattr(Node, f"__{operator}__", _elementwise(operator))
    setattr(Node, f"__r{operator}__", _elementwise(operator, reflected=True))
for operator in ("eq", "lt", "le", "gt", "ge", "neg"):
    setattr(Node, f"__{operator}__", _elementwise(operator))
Node.__truediv__ = _elementwise("div")
Node.__rtruediv__ = _elementwise("div", reflected=True)
Node.__hash__ = object.__hash__


class Symbolic:
    """The namespace."""

    abs, sign, sqrt, expm1, log, minimum, maximum, where = map(
        staticmethod, map(_elementwise, ("abs", "sign", "sqrt", "expm1", "log", "minimum", "maximum", "where"))
    )

    def __getattr__(self, name: str) -> Any:
        if name not in ("mean", "sum", "max", "min"):
            raise AttributeError(f"a rule used xp.{name}, which is not in the namespace")
        return lambda x, /, *, axis, keepdims: _reduce(name, x, axis, keepdims)


def _reduce(name: str, x: Node, axis: tuple[int, ...], keepdims: bool) -> Node:
    assert isinstance(axis, tuple), "axes are given as a tuple"
    assert keepdims is True, "reductions keep their axes"
    if not axis:
        return x
    every = set(range(x.ndim))
    allowed = [{0}, every, *({*every} - {i} for i in every)]
    assert set(axis) in allowed, f"a plan cannot express {name} over axes {axis} of {x.ndim}"
    return Node(name, (x,), x.axes - set(axis), x.ndim, (("axis", axis), ("keepdims", True)))


class Scalar(Node):
    """A number that is known only when the step runs: a 0-d array to the declaration's eyes."""

    shape = ()


def trace(chain: Chain, ndim: int) -> tuple[Node, dict[str, Node], dict[str, float]]:
    """The graph of one step: the new parameter, the new state, and the hyper-parameters as run-time inputs."""
    every = frozenset(range(ndim))
    numbers: dict[str, float] = {}

    def symbolic(transform: Any) -> Any:
        named = {
            f.name: getattr(transform, f.name) for f in fields(transform) if type(getattr(transform, f.name)) is float
        }
        numbers.update({f"{transform.name}.{name}": value for name, value in named.items()})
        return replace(
            transform, **{name: Scalar("input", (f"{transform.name}.{name}",), frozenset(), 0) for name in named}
        )

    traced = Chain(tuple(map(symbolic, chain)))
    param, grad = (Node("input", (name,), every, ndim) for name in ("param", "grad"))
    slots = chain.slots((None,) * ndim)
    state = {key: Node("input", (key,), every & set(slot.axes), ndim) for key, slot in slots.items()}
    new_param, new_state = step(Symbolic(), traced, Scalar("input", ("lr",), frozenset(), 0), param, grad, state)
    return new_param, new_state, numbers
