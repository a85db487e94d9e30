"""A chain of transformations, and one step of it on one parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from fusedbun.transform import Array, Namespace, Shape, Signal, Slot, State, Transform


@dataclass(frozen=True)
class Chain:
    """Transformations in the order in which they are applied. Build it with `chain(...)`.

    Raises:
        TypeError: something in it is not a transformation.
        ValueError: two have one name, or one reads a second moment that the one before it does not make.
    """

    transforms: tuple[Transform, ...]

    def __post_init__(self) -> None:
        before: Transform | None = None
        names: set[str] = set()
        for transform in self.transforms:
            if not isinstance(transform, Transform):
                raise TypeError(
                    f"a chain is made of fusedbun's transformations, but {transform!r} is a {type(transform).__name__}"
                )
            if transform.name in names:
                raise ValueError(
                    f"a chain takes one transformation of each name, for state is kept by name, "
                    f"but {transform.name!r} stands in it twice; subclass it with another name"
                )
            if transform.reads_second_moment and not (before and before.makes_second_moment):
                raise ValueError(
                    f"{transform.name} reads the second moment of the transformation directly before it, but that is "
                    f"{before.name if before else 'nothing'}; put an accumulator such as sm3_accumulate there"
                )
            names.add(transform.name)
            before = transform

    def __iter__(self) -> Iterator[Transform]:
        return iter(self.transforms)

    def slots(self, shape: Shape) -> dict[str, Slot]:
        """The state kept for a parameter of this shape, by `<transformation>.<slot>`, in the order of the chain."""
        return {f"{t.name}.{name}": slot for t in self for name, slot in t.slots(shape).items()}

    def at(self, path: tuple[str, ...], param: Any) -> Chain:
        """The chain for one parameter; see `Transform.at`."""
        return Chain(tuple(t.at(path, param) for t in self)) if self.has_rules else self

    def for_rows(self) -> Chain:
        """The chain that steps the rows a sparse gradient touches; see `Transform.for_rows`."""
        return chain(*(t.for_rows() for t in self))

    @cached_property
    def has_rules(self) -> bool:
        """Whether a hyper-parameter is a rule, so that `at` gives another chain."""
        return any(callable(value) for t in self for value in vars(t).values())

    def hyperparameters(self) -> dict[str, Any]:
        """Every field of every transformation, by `<transformation>.<field>`."""
        return {f"{t.name}.{f.name}": getattr(t, f.name) for t in self for f in fields(t)}

    def with_hyperparameters(self, **values: Any) -> Chain:
        """The same chain with other hyper-parameters, by the names that `hyperparameters` gives."""
        return Chain(tuple(replace(t, **own(t, values)) for t in self))


def chain(*transforms: Transform | None) -> Chain:
    """A chain of transformations, applied from left to right; `None` stands for one that is left out.

    >>> from fusedbun.transforms import Decay, RMSScale, SM3Accumulate
    >>> sorted(chain(SM3Accumulate(), RMSScale(), Decay(0.1)).slots((3, 4)))
    ['sm3_accumulate.axis0', 'sm3_accumulate.axis1']
    """
    return Chain(tuple(t for t in transforms if t is not None))


def own(transform: Transform, named: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `named` that are this transformation's, without its name in front."""
    prefix = f"{transform.name}."
    return {key.removeprefix(prefix): value for key, value in named.items() if key.startswith(prefix)}


def step(
    xp: Namespace,
    transforms: Chain,
    lr: Any,
    param: Array,
    grad: Array,
    state: State,
) -> tuple[Array, dict[str, Array]]:
    """One step for one leaf: the update from the chain, then `p = p - lr*u`.

    Args:
        xp: the array functions.
        transforms: the chain.
        lr: the learning rate.
        param: the parameter.
        grad: its gradient, of its shape.
        state: what `Chain.slots` declares, by the same names.

    Returns:
        The new parameter and the new state. Nothing is written to.
    """
    signal, new = Signal(grad), dict(state)
    for t in transforms:
        signal, changed = t.update(xp, signal, own(t, state), param)
        new |= {f"{t.name}.{name}": value for name, value in changed.items()}
    return param - lr * signal.update, new
