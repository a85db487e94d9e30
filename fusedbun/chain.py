"""A chain of transformations, and one step of it on one parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Annotated, Any

from fusedbun.hyper import PerParam, Whole, check, plain
from fusedbun.storage import codes
from fusedbun.storage.codes import STEP, Stored
from fusedbun.storage.rounding import PARAM, TO_NEAREST, Rounding
from fusedbun.storage.storage import Storage
from fusedbun.transform import Array, Shape, Signal, Slot, State, Transform

Axes = Annotated[int, Whole(0)]
Stacked = PerParam[Axes]


@dataclass(frozen=True)
class Chain:
    """Transformations in the order in which they are applied. Build it with `chain(...)`.

    Args:
        transforms: the transformations.
        rounding: how their results are rounded.
        stacked: how many of a parameter's leading axes make it a stack of several of one kind, such as layers under
            `scan` or experts: each slice is stepped as a parameter of its own. A number, or a rule
            `(path, param) -> number`.

    Raises:
        TypeError: something in it is not a transformation.
        ValueError: two have one name, or one reads a second moment that the one before it does not make.
    """

    transforms: tuple[Transform, ...]
    rounding: Rounding = TO_NEAREST
    stacked: Stacked = 0

    def __post_init__(self) -> None:
        check("a chain", {"stacked": Stacked}, {"stacked": self.stacked})
        for i, transform in enumerate(self.transforms):
            before = self.transforms[i - 1] if i else None
            if not isinstance(transform, Transform):
                kind = "type" if isinstance(transform, type) else type(transform).__name__
                raise TypeError(f"a chain is made of fusedbun's transformations, but {transform!r} is a {kind}")
            if transform.name == STEP:
                raise ValueError(
                    f"a chain keeps its counter of steps as {STEP!r}, so no transformation may be called so; subclass "
                    f"it with another name"
                )
            if transform.name in (t.name for t in self.transforms[:i]):
                raise ValueError(
                    f"a chain takes one transformation of each name, for state is kept by name, "
                    f"but {transform.name!r} stands in it twice; subclass it with another name"
                )
            if transform.reads_second_moment and not (before and before.makes_second_moment):
                raise ValueError(
                    f"{transform.name} reads the second moment of the transformation directly before it, but that is "
                    f"{before.name if before else 'nothing'}; put an accumulator such as sm3_accumulate there"
                )

    def __iter__(self) -> Iterator[Transform]:
        return iter(self.transforms)

    def slots(self, shape: Shape) -> dict[str, Slot]:
        """The state kept for a parameter of this shape, by `<transformation>.<slot>`, in the order of the chain.

        Of a stack, that of a slice.
        """
        of = slice_shape(shape, self.stacked)
        return {f"{t.name}.{name}": slot for t in self for name, slot in slots_of(t, of).items()}

    def arrays(self, shape: Shape, dtype: str) -> dict[str, Stored]:
        """The arrays that the state of such a parameter is stored in, by `<transformation>.<slot>` and what follows.

        Where its steps are counted, the counter is the last of them (`codes.STEP`).

        Args:
            shape: the parameter's shape.
            dtype: its dtype's name.
        """
        counts = self.rounding.stochastic or any(t.counts for t in self)
        return arrays_of(self.slots(shape), dtype, counts, self.stacked)

    def counts(self, shape: Shape, dtype: str) -> bool:
        """Whether the steps of such a parameter are counted."""
        return STEP in self.arrays(shape, dtype)

    def at(self, path: tuple[str, ...], param: Any, name: str | None = None) -> Chain:
        """The chain for one parameter; see `Transform.at`. How it is rounded depends on its dtype.

        Args:
            path: the names that lead to the parameter; empty where it has none.
            param: the parameter.
            name: the name that decides the noise of its rounding; None: the path's.
        """
        chain = self._without_rules(path, param) if self.has_rules else self
        if (rounding := self.rounding.at(param)) is not self.rounding:
            chain = replace(chain, rounding=rounding)
        if not (keys := chain.noisy(tuple(param.shape))):
            return chain
        return replace(chain, rounding=rounding.of(".".join(path) if name is None else name, keys))

    def _without_rules(self, path: tuple[str, ...], param: Any) -> Chain:
        stacked = stacked_at(self.stacked, path, param)
        of = slice_of(param, stacked)
        return replace(self, stacked=stacked, transforms=tuple(t.at(path, of) for t in self))

    def named_as(self, other: Chain) -> Chain:
        """This chain with the rounding and place of the parameter that `other` was made for; they have one state."""
        was, keys = other.rounding, [key for key, _ in other.rounding.starts]
        if not keys and (self.stacked, self.rounding.stochastic) == (other.stacked, was.stochastic):
            return self
        rounding = replace(self.rounding.of(was.name, keys), stochastic=was.stochastic, place=was.place)
        return replace(self, rounding=rounding, stacked=other.stacked)

    def slice(self, place: tuple[Any, ...]) -> Chain:
        """The chain for one slice of a stack that it is for: `at` has been asked."""
        if not self.rounding.starts:  # which are there where there is noise, that alone sees the whole stack
            return replace(self, stacked=0)
        return replace(self, stacked=0, rounding=replace(self.rounding, place=place))

    def noisy(self, shape: Shape) -> list[str]:
        """The arrays of such a parameter, its own among them, that may be rounded with noise."""
        slots = [key for key, slot in self.slots(shape).items() if codes.declared(slot).is_noisy]
        return [*([PARAM] if self.rounding.stochastic else []), *slots]

    def for_rows(self) -> Chain:
        """The chain that steps the rows a sparse gradient touches; see `Transform.for_rows`."""
        if self.stacked:
            raise TypeError(f"it is a stack (stacked={self.stacked}), whose gradient must be dense")
        return replace(chain(*(t.for_rows() for t in self)), rounding=self.rounding)

    @cached_property
    def has_rules(self) -> bool:
        """Whether a hyper-parameter is a rule, so that `at` gives another chain."""
        return callable(self.stacked) or any(callable(value) for t in self for value in vars(t).values())

    def hyperparameters(self) -> dict[str, Any]:
        """Every field of every transformation, by `<transformation>.<field>`."""
        return {f"{t.name}.{f.name}": getattr(t, f.name) for t in self for f in fields(t)}

    def with_hyperparameters(self, **values: Any) -> Chain:
        """The same chain with other hyper-parameters, by the names that `hyperparameters` gives."""
        return replace(self, transforms=tuple(replace(t, **entries_of(t, values)) for t in self))


def stacked_at(stacked: Stacked, path: tuple[str, ...], param: Any) -> int:
    """How many of a parameter's axes are a stack's: the number, or what the rule says.

    Raises:
        TypeError, ValueError: what it says is no number of axes.
    """
    number: int = plain(stacked(path, param) if callable(stacked) else stacked)
    check("the rule", {"stacked": Axes}, {"stacked": number})
    return number


def slice_shape(shape: Shape, stacked: int) -> Shape:
    """The shape of a slice of a stack of this shape; of what is no stack, its own."""
    if stacked > len(shape):
        raise ValueError(
            f"stacked={stacked} says how many leading axes are a stack's, but a parameter of shape {shape} has "
            f"{len(shape)}; give a rule (path, param) -> number where parameters differ"
        )
    return shape[stacked:]


def slice_of(param: Any, stacked: int) -> Any:
    """What a rule is shown of a parameter: of a stack, a slice."""
    return Slice(param, slice_shape(tuple(param.shape), stacked)) if stacked else param


class Slice:
    """What a rule is shown of a stack: the parameter with the shape of one slice."""

    def __init__(self, stack: Any, shape: Shape) -> None:
        self._stack, self.shape, self.ndim = stack, shape, len(shape)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stack, name)


def chain(*transforms: Transform | None) -> Chain:
    """A chain of transformations, applied from left to right; `None` stands for one that is left out.

    >>> from fusedbun.transforms import Decay, RMSScale, SM3Accumulate
    >>> sorted(chain(SM3Accumulate(), RMSScale(), Decay(0.1)).slots((3, 4)))
    ['sm3_accumulate.axis0', 'sm3_accumulate.axis1']
    """
    return Chain(tuple(t for t in transforms if t is not None))


def slots_of(transform: Transform, shape: Shape) -> Mapping[str, Slot]:
    """What a transformation declares for such a parameter; a ValueError where it calls a slot as the counter."""
    slots = transform.slots(shape)
    if STEP in slots:
        raise ValueError(
            f"{transform.name}: a slot may not be called {STEP!r}, for the counter of steps is; where that is what it "
            f"is for, set `counts` and read state[{STEP!r}]"
        )
    return slots


def arrays_of(slots: Mapping[str, Slot], dtype: str, counts: bool = False, stacked: int = 0) -> dict[str, Stored]:
    """The arrays of slots of a parameter of this dtype, by the slot's name and what its code appends.

    The counter of steps is the last of them, where it is asked for or where codes have noise. A stack of so many axes
    has them in front of each.
    """
    counts = counts or any(codes.code_of(slot, dtype).is_noisy for slot in slots.values())
    arrays = {key + part: x for key, slot in slots.items() for part, x in codes.arrays(slot, dtype).items()}
    arrays |= {STEP: codes.COUNT} if counts else {}
    return {key: x._replace(stacked=stacked) for key, x in arrays.items()} if stacked else arrays


def entries_of(transform: Transform, named: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `named` that are this transformation's, without its name in front."""
    prefix = f"{transform.name}."
    return {key.removeprefix(prefix): value for key, value in named.items() if key.startswith(prefix)}


def advance(
    transform: Transform, storage: Storage, signal: Signal, stored: State, param: Array | None
) -> tuple[Signal, State]:
    """One transformation of a step: its state decoded, updated, encoded and committed, slot by slot.

    Args:
        transform: the transformation.
        storage: how the parameter is stored.
        signal: what the transformation before it hands on.
        stored: the state's arrays, by `<transformation>.<slot>` and what its code appends.
        param: the parameter before the step, in the precision that is computed in.

    Returns:
        What it hands on, and the state's arrays after it.
    """
    slots = {f"{transform.name}.{name}": slot for name, slot in slots_of(transform, tuple(storage.like.shape)).items()}
    before = entries_of(transform, {key: storage.decode(key, slot, stored) for key, slot in slots.items()})
    if transform.counts:
        before[STEP] = storage.number(stored)
    signal, after = transform.update(storage.xp, signal, before, param)
    for key, slot in slots.items():
        value = after[key.removeprefix(f"{transform.name}.")]
        stored = storage.commit(stored, storage.encode(key, slot, value, stored))
    return signal, stored


def step(
    transforms: Chain, storage: Storage, lr: Any, param: Array, grad: Array, stored: State, as_update: bool = False
) -> tuple[Array, State]:
    """One step of one parameter: the update from the chain, then `p = p - lr*u`, rounded.

    Args:
        transforms: the chain.
        storage: how the parameter is stored.
        lr: the learning rate.
        param: the parameter, in the precision that is computed in.
        grad: its gradient, likewise.
        stored: the state's arrays, by the names of `Chain.arrays`.
        as_update: give in the new parameter's place what is to be added to the parameter, as optax does.

    Returns:
        The new parameter, ready to be cast to its dtype, and the state's arrays after the step.
    """
    signal = Signal(grad)
    del grad  # what the driver made of it is free after the first transformation
    for transform in transforms:
        signal, stored = advance(transform, storage, signal, stored, param)
    if as_update:
        param = storage.update(param, -lr * signal.update, stored)
    else:
        param = storage.round(storage.subtract(param, lr * signal.update), stored)
    return param, storage.commit(stored, counted(stored))


def counted(stored: State) -> dict[str, Array]:
    """The counter among a state's arrays after the step; nothing where there is none."""
    return {STEP: stored[STEP] + 1} if STEP in stored else {}
