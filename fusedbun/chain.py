"""A chain of transformations, and one step of it on one parameter."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from fusedbun.storage import codes
from fusedbun.storage import noise as rounding
from fusedbun.storage.codes import Stored
from fusedbun.transform import Array, Namespace, Shape, Signal, Slot, State, Transform


@dataclass(frozen=True)
class Rounding:
    """How a step's results are rounded where they are stored in fewer bits than they are computed in.

    Args:
        stochastic: round a bfloat16 parameter to either neighbour, without a bias, instead of to the nearest.
        seed: any integer; with the parameter's name and the number of steps it decides the noise of all rounding.
        name: the parameter's name; `Chain.at` puts it here.
        starts: where the noise of arrays begins, by name, as far as it is known already.
    """

    stochastic: bool = False
    seed: int = 0
    name: str = ""
    starts: tuple[tuple[str, int], ...] = ()

    def start(self, key: str) -> int:
        """Where the noise of an array begins, the parameter's or a slot's (`fusedbun.storage.noise`)."""
        for known, start in self.starts:
            if known == key:
                return start
        stream = rounding.PARAM_STREAM if key == PARAM else zlib.crc32(key.encode())
        return rounding.start(self.seed, self.name, stream)

    def of(self, name: str, keys: Iterable[str]) -> Rounding:
        """The same for a parameter of this name, where the noise of these arrays begins being looked up at once."""
        named = replace(self, name=name, starts=())
        return replace(named, starts=tuple((key, named.start(key)) for key in keys))


PARAM = "param"
COUNTER = "rounding.step"  # the state that stochastic rounding keeps: how many steps came before


@dataclass(frozen=True)
class Chain:
    """Transformations in the order in which they are applied. Build it with `chain(...)`.

    Args:
        transforms: the transformations.
        rounding: how their results are rounded.

    Raises:
        TypeError: something in it is not a transformation.
        ValueError: two have one name, or one reads a second moment that the one before it does not make.
    """

    transforms: tuple[Transform, ...]
    rounding: Rounding = Rounding()

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

    def arrays(self, shape: Shape, dtype: str) -> dict[str, Stored]:
        """The arrays that the state of such a parameter is stored in, by `<transformation>.<slot>` and what follows.

        Args:
            shape: the parameter's shape.
            dtype: its dtype's name.

        Raises:
            ValueError: a parameter of this dtype cannot be rounded so.
        """
        found = {
            key + part: array
            for key, slot in self.slots(shape).items()
            for part, array in codes.arrays(slot, dtype).items()
        }
        if self.rounding.stochastic:
            if dtype != "bfloat16":
                raise ValueError(
                    f"stochastic rounding is for bfloat16 parameters, but this one is {dtype}; step it in a group, or "
                    f"with an optimizer, that has stochastic_rounding=False"
                )
            found[COUNTER] = Stored("int32", ())
        return found

    def at(self, path: tuple[str, ...], param: Any, name: str | None = None) -> Chain:
        """The chain for one parameter; see `Transform.at`.

        Args:
            path: the names that lead to the parameter; empty where it has none.
            param: the parameter.
            name: the name that decides the noise of its rounding; None: the path's.
        """
        here = Chain(tuple(t.at(path, param) for t in self), self.rounding) if self.has_rules else self
        if not (keys := here.noisy(tuple(param.shape))):
            return here
        return Chain(here.transforms, self.rounding.of(".".join(path) if name is None else name, keys))

    def named_as(self, other: Chain) -> Chain:
        """This chain for the parameter that the other one, of the same slots, is for."""
        keys = [key for key, _ in other.rounding.starts]
        return Chain(self.transforms, self.rounding.of(other.rounding.name, keys)) if keys else self

    def noisy(self, shape: Shape) -> list[str]:
        """The arrays of such a parameter, its own among them, that may be rounded with noise."""
        slots = [key for key, slot in self.slots(shape).items() if codes.may_be_noisy(slot.code)]
        return [*([PARAM] if self.rounding.stochastic else []), *slots]

    def for_rows(self) -> Chain:
        """The chain that steps the rows a sparse gradient touches; see `Transform.for_rows`."""
        return replace(chain(*(t.for_rows() for t in self)), rounding=self.rounding)

    @cached_property
    def has_rules(self) -> bool:
        """Whether a hyper-parameter is a rule, so that `at` gives another chain."""
        return any(callable(value) for t in self for value in vars(t).values())

    def hyperparameters(self) -> dict[str, Any]:
        """Every field of every transformation, by `<transformation>.<field>`."""
        return {f"{t.name}.{f.name}": getattr(t, f.name) for t in self for f in fields(t)}

    def with_hyperparameters(self, **values: Any) -> Chain:
        """The same chain with other hyper-parameters, by the names that `hyperparameters` gives."""
        return Chain(tuple(replace(t, **own(t, values)) for t in self), self.rounding)


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
