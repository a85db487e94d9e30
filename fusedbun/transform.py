"""The vocabulary of the definition: a transformation is a frozen record of hyper-parameters with a pure rule.

A rule sees one parameter tensor at a time and knows no framework. It is written over `xp`, a namespace of a few array
functions that NumPy, jax.numpy and a small table of torch's all satisfy (`Namespace` lists them). So that a rule can
also be traced, scheduled and printed as a kernel it keeps to these habits:

- pure: it writes to no argument, and returns its new state;
- only `xp`'s functions and operators, and no branch on an array's values;
- a reduction is `xp.mean / max / min / sum(x, axis=(…), keepdims=True)` over the leading axis, all axes but the
  leading one, all but one, or all; over no axes it is the identity;
- what a size decides is chosen by `fusedbun.hyper.choose`, for sizes are not known where a kernel is made;
- products and minima start from the small operands.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol, Self

from fusedbun.hyper import Scalar, check, hints, log, plain
from fusedbun.operations import Functions

Array = Any  # numpy.ndarray, jax.Array, torch.Tensor, or a node of a traced expression
State = Mapping[str, Array]
Shape = tuple[int, ...]


class Namespace(Functions, Protocol):
    """The array functions that a rule may use: those of the table `fusedbun.operations`, and these."""

    def astype(self, x: Array, dtype: Any, /) -> Array: ...
    def mean(self, x: Array, /, *, axis: Shape, keepdims: bool) -> Array: ...
    def sum(self, x: Array, /, *, axis: Shape, keepdims: bool) -> Array: ...
    def max(self, x: Array, /, *, axis: Shape, keepdims: bool) -> Array: ...
    def min(self, x: Array, /, *, axis: Shape, keepdims: bool) -> Array: ...


@dataclass(frozen=True)
class Slot:
    """One state array, declared: from this follow its shape, its bytes, its sharding and its place in a file.

    Args:
        axes: the array has the parameter's size along these axes and size 1 along the others.
        code: how it is stored between steps (`fusedbun.storage.codes`): "compute" as it is computed, in float32
            (float64 for float64 parameters), or as something else, such as "int8" for votes.
    """

    axes: tuple[int, ...]
    code: str = "compute"

    def shape(self, parameter: Shape) -> Shape:
        return tuple(n if axis in self.axes else 1 for axis, n in enumerate(parameter))

    @staticmethod
    def full(ndim: int, code: str = "compute") -> Slot:
        """A slot of the parameter's own shape."""
        return Slot(tuple(range(ndim)), code)


class Signal(NamedTuple):
    """What one transformation hands to the next: the running update and, from an accumulator only, its second moment.

    The second moment estimates the mean square of every element. It is never stored: a transformation that returns
    `Signal(update)` drops it, so only the one directly after an accumulator sees it. What is a product of vectors is
    handed on as its root in its place, which takes a root for each of their elements and none for each of the update's.
    """

    update: Array
    second_moment: Array | None = None
    root: Array | None = None


@dataclass(frozen=True)
class Transform(ABC):
    """A step of an optimizer: hyper-parameters as fields, the state as `slots`, the rule as `update`.

    Subclass it as a frozen dataclass, give it a `name`, and annotate each field with a type of `fusedbun.hyper`. A
    field that may differ between parameters also takes a rule, `(path, param) -> value`.
    """

    name: ClassVar[str]
    makes_second_moment: ClassVar[bool] = False
    reads_second_moment: ClassVar[bool] = False
    reads_param: ClassVar[bool] = False

    @property
    def counts(self) -> bool:
        """Whether the rule needs the number of the step: it finds it in the state as `state["step"]`, from 1 on.

        The driver counts it, once for all that count.
        """
        return False

    def __post_init__(self) -> None:
        kind: Any = type(self)
        check(self.name, hints(kind), vars(self))
        for name, value in vars(self).items():
            object.__setattr__(self, name, plain(value))

    def at(self, path: tuple[str, ...], param: Any) -> Self:
        """This transformation for one parameter: rules among its hyper-parameters are asked for their value there.

        Args:
            path: the names that lead to the parameter; empty where it has none.
            param: the parameter.
        """
        rules = {name: rule for name, rule in vars(self).items() if callable(rule)}
        return replace(self, **{name: rule(path, param) for name, rule in rules.items()}) if rules else self

    def for_rows(self) -> Transform | None:
        """What stands in its place where a gradient touches few rows of a parameter, and no other may change.

        It sees those rows as the parameter. None leaves it out; a TypeError says that it needs them all.
        """
        raise TypeError(f"{self.name} needs every row of a gradient")

    def slots(self, shape: Shape) -> Mapping[str, Slot]:
        """The state kept for a parameter of this shape, by name. All of it starts at zero.

        Raises a ValueError where the transformation cannot work on such a parameter.
        """
        return {}

    @abstractmethod
    def update(self, xp: Namespace, signal: Signal, state: State, param: Array) -> tuple[Signal, State]:
        """The rule for one leaf: maps (signal, state) to (signal, state) and writes to neither.

        Args:
            xp: the array functions.
            signal: the running update, of `param`'s shape, and perhaps the second moment.
            state: this transformation's slots by name, decoded, and where it counts the number of the step.
            param: the parameter before the step, in the precision that is computed in.
        """


def check_channel_axis(name: str, axis: int, shape: Shape) -> None:
    """Raises a ValueError where a parameter of more than one axis does not have this one."""
    k = len(shape)
    if k > 1 and not -k <= axis < k:
        raise ValueError(
            f"{name}: channel_axis must lie in [{-k}, {k}) for a parameter of shape {tuple(shape)}, but it is {axis}"
        )


def others(x: Array, axis: int) -> Shape:
    """Every axis of `x` but this one."""
    return tuple(i for i in range(x.ndim) if i != axis % x.ndim)


def count(x: Array, axes: Shape) -> Scalar:
    """How many elements `x` has along these axes: for a kernel or a shard a number that is known when it runs."""
    return math.prod([x.shape[i] for i in axes])  # a list, which torch's compiler takes


def from_start(xp: Namespace, beta: Scalar, n: Array) -> Array:
    """`1 - beta**n`, the weight of n steps in a running mean, without float32's cancellation."""
    return -xp.expm1(n * log(xp, beta))
