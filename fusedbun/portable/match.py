"""From the parameters of a file to those of an optimizer: by name, and from one layout to the other.

Where a parameter's axes are laid out in another order, the slots that are declared for some of its axes belong to
others: for each slot here that of the file is sought whose declared axes are the same ones, and its numbers are
permuted. Codes of blocks are decoded, permuted and encoded to the nearest, for a block holds other numbers then. Of
each number this is half a code's step at most (`2^(e - 126 - bits)`, `e` being the new block's exponent).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fusedbun import namespace as in_numpy
from fusedbun.portable.entries import Group, Parameter, Saved
from fusedbun.portable.file import Numbers
from fusedbun.storage import codes
from fusedbun.storage.codes import Code
from fusedbun.transform import Shape, Slot

Target = str | tuple[str, Sequence[int]]
Names = Mapping[str, Target] | Callable[[str], Target]
_LISTED = 100  # problems in one message


@dataclass(frozen=True)
class Match:
    """A parameter here, and what it takes of the file.

    Args:
        saved: the parameter in the file.
        axes: for each axis here the axis in the file, as `numpy.transpose` takes them; None: they are the same.
        slots: what is kept for it here; None: nothing.
        origins: for each of these slots the one in the file.
    """

    saved: Parameter
    axes: tuple[int, ...] | None
    slots: Mapping[str, Slot] | None = None
    origins: Mapping[str, str] = field(default_factory=dict)

    def arrays(self, file: Saved) -> Iterator[tuple[str, Numbers]]:
        """The arrays of its state by name, in its layout; one at a time is held."""
        for key, slot in (self.slots or {}).items():
            code = codes.code_of(slot, self.saved.dtype)
            arrays = code.arrays(slot.axes)
            parts = {part: file.opened.read(f"{self.saved.name}/{self.origins[key]}{part}") for part in arrays}
            if self.axes is not None and any(x.is_by_blocks for x in arrays.values()):
                parts |= self._recoded(parts, code)
            elif self.axes is not None:
                parts = {part: np.ascontiguousarray(x.transpose(self.axes)) for part, x in parts.items()}
            yield from ((key + part, numbers) for part, numbers in parts.items())

    def _recoded(self, parts: Mapping[str, Numbers], code: Code) -> dict[str, Numbers]:
        """Codes of blocks in the other layout; of a stack slice by slice."""
        assert self.axes is not None
        n, shape = self.saved.stacked, self.saved.shape
        axes = _of_slice(self.axes, n)
        slices = [
            recoded({part: x[place] for part, x in parts.items()}, shape[n:], axes, code)
            for place in np.ndindex(shape[:n])
        ]
        stacks = {part: [one[part] for one in slices] for part in slices[0]} if slices else {}
        return {part: np.reshape(x, (*shape[:n], *x[0].shape)) for part, x in stacks.items()}


def inverse(mapping: Mapping[str, Target]) -> dict[str, Target]:
    """The mapping that leads back.

    >>> inverse({"0.weight": ("dense.kernel", (1, 0)), "0.bias": "dense.bias"})
    {'dense.kernel': ('0.weight', (1, 0)), 'dense.bias': '0.bias'}

    Args:
        mapping: from names to names, or to names and axes, as for `load_state`.
    """
    back: dict[str, Target] = {}
    for name, target in mapping.items():
        to, axes = (target, None) if isinstance(target, str) else target
        back[to] = name if axes is None else (name, tuple(map([*axes].index, range(len(axes)))))
    return back


class Loading:
    """A file that an optimizer is to go on from: what belongs together, and the problems with what does not fit.

    Args:
        file: the file.
        names: the names of the optimizer's parameters.
        mapping: see `load_state`.
        partial: what is only in the file or only here is no problem.
    """

    def __init__(self, file: Saved, names: Sequence[str], mapping: Names | None, partial: bool) -> None:
        self.file = file
        self.pairs: dict[str, Match] = {}  # by the name here; their slots are not looked at yet
        self.problems: list[str] = []
        here = set(names)
        if isinstance(mapping, Mapping) and not partial:
            unknown = mapping.keys() - file.parameters
            self.problems += [f"{name!r} is in the mapping, but not in the file" for name in unknown]
        for name, parameter in file.parameters.items():
            target = mapping(name) if callable(mapping) else (mapping or {}).get(name, name)
            to, axes = _target(name, target, len(parameter.shape))
            if to in self.pairs:
                both = f"{self.pairs[to].saved.name!r} and {name!r}"
                self.problems.append(f"{both} of the file are both to be {to!r}")
            elif to in here:
                self.pairs[to] = Match(parameter, axes)
            elif not partial:
                self.problems.append(f"{name!r} is in the file, but {f'{to!r} is ' if to != name else ''}not here")
        if not partial:
            self.problems += [f"{name!r} is here, but not in the file" for name in names if name not in self.pairs]

    def groups(self, names: Iterable[str]) -> list[Group]:
        """The groups that parameters of these names here have in the file."""
        indices = dict.fromkeys(self.pairs[name].saved.group for name in names if name in self.pairs)
        return [self.file.groups[index] for index in indices]

    def matches(
        self,
        parameters: Sequence[Parameter],
        groups: Sequence[Group | None],
        choices: Callable[[Parameter], Sequence[Mapping[str, Slot]]],
    ) -> dict[str, Match]:
        """What each parameter here takes of the file, by its name.

        Args:
            parameters: the optimizer's.
            groups: their groups; None for one whose parameters take nothing.
            choices: what may be kept for a parameter that was stepped (`entries.slots_of`); the first that fits is.
        """
        by_groups: dict[tuple[int, int], list[Parameter]] = {}
        for p in parameters:
            if p.name in self.pairs:
                by_groups.setdefault((self.pairs[p.name].saved.group, p.group), []).append(p)
        matches: dict[str, Match] = {}
        for (there, here), members in by_groups.items():
            group = groups[here]
            if group and self._compare(self.file.groups[there], group, [p.name for p in members]):
                matches |= {p.name: match for p in members if (match := self._matched(p, choices))}
        return matches

    def _compare(self, saved: Group, here: Group, names: Sequence[str]) -> bool:
        """Whether two chains compute the same for these parameters, hyper-parameters that are numbers apart."""
        of = f" (of {', '.join(map(repr, names[:3]))}{f' and {len(names) - 3} more' if len(names) > 3 else ''})"
        if [*saved.transformations] != [*here.transformations]:
            was, now = (" → ".join(x.transformations) or "none" for x in (saved, here))
            self.problems.append(f"the transformations in the file are {was:.300}, but here {now}{of}")
            return False
        differing = [
            f"{transform}.{name} is {there[name]!r:.100} in the file, but {value!r} here{of}"
            for (transform, there), values in zip(
                saved.transformations.items(), here.transformations.values(), strict=True
            )
            for name, value in values.items()
            if name in there and there[name] != value
        ]
        self.problems += differing
        return not differing

    def _matched(self, here: Parameter, choices: Callable[[Parameter], Sequence[Mapping[str, Slot]]]) -> Match | None:
        """What a parameter here takes of the file; None, and a problem more, where it cannot."""
        pair = self.pairs[here.name]
        saved, axes = pair.saved, pair.axes
        shape = saved.shape if axes is None else tuple(saved.shape[axis] for axis in axes)
        if shape != here.shape:
            order = "" if axes is None else f" and {shape} in the order {axes} of its axes"
            self.problems.append(f"{here.name!r} has shape {saved.shape} in the file{order}, but {here.shape} here")
            return None
        if saved.dtype != here.dtype:
            self.problems.append(f"{here.name!r} is {saved.dtype} in the file, but {here.dtype} here")
            return None
        n = here.stacked
        if saved.stacked != n or (axes is not None and axes[:n] != tuple(range(n))):
            self.problems.append(
                f"{here.name!r} is kept with stacked={saved.stacked} in the file, but with stacked={n} here"
                + (f", and the order {axes} must leave a stack's axes in front" if n and axes else "")
            )
            return None
        if saved.slots is None:
            return pair
        of_slice = None if axes is None else _of_slice(axes, n)
        tried = [(slots, *_origins(here.name, saved.slots, slots, of_slice)) for slots in choices(here)]
        for slots, origins, problems in tried:
            if not problems:
                return replace(pair, slots=slots, origins=origins)
        self.problems += tried[0][2]
        return None

    def refuse(self, owner: str) -> None:
        """Raises a ValueError that lists the problems, if there are any."""
        if not self.problems:
            return
        more = [f"… and {len(self.problems) - _LISTED} more"] if len(self.problems) > _LISTED else []
        raise ValueError(
            f"{self.file.opened.path} does not fit this {owner}, so nothing was loaded:\n  "
            + "\n  ".join([*self.problems[:_LISTED], *more])
            + "\nMake the optimizer with the hyper-parameters that the saved one had; mapping= is for other names and "
            "layouts, and partial=True loads the parameters that are both here and in the file."
        )


def _target(name: str, target: Target, ndim: int) -> tuple[str, tuple[int, ...] | None]:
    """The name and the axes that a mapping gives a parameter; the axes are None where they stay as they are."""
    if isinstance(target, str):
        return target, None
    try:
        to, order = target
        axes = tuple(int(axis) for axis in order)
    except (TypeError, ValueError):
        to, axes = None, ()
    if not isinstance(to, str) or sorted(axes) != [*range(ndim)]:
        raise ValueError(
            f"the mapping of {name!r} must be a name, or a name and the order of its {ndim} axes such as "
            f"('dense.kernel', {(*reversed(range(ndim)),)}), but it is {target!r}"
        )
    return to, None if axes == (*range(ndim),) else axes


def _of_slice(axes: tuple[int, ...], stacked: int) -> tuple[int, ...]:
    """The order of a slice's axes, where that of its stack's is this."""
    return tuple(axis - stacked for axis in axes[stacked:])


def _origins(
    name: str, saved: Mapping[str, Slot], here: Mapping[str, Slot], order: tuple[int, ...] | None
) -> tuple[dict[str, str], list[str]]:
    """For each slot here the one in the file that the same transformation declares for the same axes; and problems.

    In another order of axes the names of slots say nothing: where there are several for the same axes, such as two
    moments, the n-th here is the n-th there.
    """
    origins: dict[str, str] = {}
    problems = []
    for key, slot in here.items():
        if order is None:
            candidates = [key] if key in saved and {*saved[key].axes} == {*slot.axes} else []
        else:
            axes = {order[i] if i < len(order) else i for i in slot.axes}
            candidates = _alike(saved, key, axes)[_alike(here, key, {*slot.axes}).index(key) :]
        if not candidates:
            problems.append(f"{key!r} of {name!r} is kept here, but not in the file")
        elif (code := saved[candidates[0]].code) != slot.code:
            problems.append(f"{key!r} of {name!r} is stored as {code} in the file, but as {slot.code} here")
        else:
            origins[key] = candidates[0]
    extra = saved.keys() - origins.values() - here.keys()
    problems += [f"{key!r:.200} of {name!r} is in the file, but not kept here" for key in saved if key in extra]
    return origins, problems


def _alike(slots: Mapping[str, Slot], key: str, axes: set[int]) -> list[str]:
    """The slots for these axes of the transformation that the key names."""
    owner = key.partition(".")[0]
    return [name for name, slot in slots.items() if name.partition(".")[0] == owner and {*slot.axes} == axes]


def recoded(parts: Mapping[str, Numbers], shape: Shape, axes: Sequence[int], code: Code) -> dict[str, Numbers]:
    """Codes of blocks in another layout: decoded, permuted, and encoded to the nearest.

    A block of the new layout in which one number is NaN is NaN, as blocks are.

    Args:
        parts: the arrays of a slot, by what follows its name.
        shape: the parameter's shape in the old layout.
        axes: the order of its axes in the new one.
        code: how the slot is stored.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        numbers = np.ascontiguousarray(code.decode(in_numpy, parts, shape, np.float32).transpose(axes))
        middle = np.full(numbers.shape, 2.0**15 - 0.5, np.float32)  # of the noise: it rounds to the nearest
        new = code.encode(in_numpy, numbers, middle)
    return {part: x.astype(parts[part].dtype) for part, x in new.items()}
