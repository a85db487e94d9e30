"""What is in the file: parameters by name with their slots, and the hyper-parameters that groups of them share.

    arrays     "<parameter>/<transformation>.<slot>", and what the slot's code appends (`fusedbun.storage.codes`)
    metadata   "format", "version", "steps"; "group <n>" and "parameter <name>", each a small JSON text

All of it follows from what transformations declare; no optimizer is named here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from fusedbun.chain import Chain, arrays_of
from fusedbun.hyper import hints, is_structural, plain
from fusedbun.portable import file
from fusedbun.portable.file import DTYPES, Entry, Numbers, Opened
from fusedbun.storage import codes
from fusedbun.storage.codes import STEP, Stored
from fusedbun.transform import Shape, Slot, Transform

FORMAT, VERSION = "fusedbun optimizer state", "1"
_LARGEST_TEXT = 1 << 20  # of the JSON of one group or parameter, in characters


@dataclass(frozen=True)
class Group:
    """What the chains of some parameters are made of. What a framework cannot know of another's is left out.

    Args:
        recipe: the name of the recipe; None for a chain of the user's own.
        arguments: its arguments by name, those that are numbers, texts, flags or tuples of them.
        lr: the learning rate; None where it is a schedule.
        initial_lr: the one that the weight decay is meant for; None where the recipe asks for none.
        maximize: climb instead of descend.
        stochastic_rounding: of the parameters.
        seed: of all rounding.
        transformations: the chain's, in order, each with those of its hyper-parameters that choose what it computes.
    """

    recipe: str | None
    arguments: Mapping[str, Any]
    lr: float | None
    initial_lr: float | None
    maximize: bool
    stochastic_rounding: bool
    seed: int
    transformations: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Parameter:
    """A parameter and what is kept for it.

    Args:
        name: its name.
        shape: its shape.
        dtype: its dtype's name.
        group: the place of its group among the groups.
        slots: by `<transformation>.<slot>`, in the order of the chain, with their codes resolved, and with the counter
            of its steps where there is one; None where it has not been stepped, so that all would be at the start.
        stacked: how many of its leading axes are a stack's; the slots are those of a slice.
    """

    name: str
    shape: Shape
    dtype: str
    group: int
    slots: Mapping[str, Slot] | None
    stacked: int = 0

    def arrays(self) -> dict[str, Stored]:
        """The arrays that its slots are stored in, by the slot's name and what its code appends."""
        return arrays_of(self.slots or {}, self.dtype, stacked=self.stacked)


def slots_of(chain: Chain, shape: Shape, dtype: str) -> dict[str, Slot]:
    """All that a chain keeps for such a parameter, as `Parameter` has it."""
    slots = {key: Slot(slot.axes, codes.code_of(slot, dtype).name) for key, slot in chain.slots(shape).items()}
    return slots | ({STEP: Slot((), "int32")} if chain.counts(shape, dtype) else {})


def group_of(
    chain: Chain,
    recipe: str | None,
    arguments: Mapping[str, Any],
    lr: Any,
    initial_lr: Any = None,
    maximize: bool = False,
) -> Group:
    """The group of parameters that a chain steps; see `Group`."""
    rate, initial = (None if value is UNKNOWN else value for value in map(portable, (lr, initial_lr)))
    rounding, chosen = chain.rounding, {t.name: known(_choices(t)) for t in chain}
    seed = int(rounding.seed)
    return Group(recipe, known(arguments), rate, initial, bool(maximize), rounding.stochastic, seed, chosen)


def _choices(transform: Transform) -> dict[str, Any]:
    """The hyper-parameters that choose what is computed and are the same for every parameter.

    What state is stored in is not among them: that shows in the slots.
    """
    kind: Any = type(transform)
    declared = hints(kind)
    return {
        name: value
        for name, value in vars(transform).items()
        if name in declared
        and not name.endswith("dtype")
        and not differs_by_parameter(declared[name])
        and is_structural(declared[name])
    }


def differs_by_parameter(hint: Any) -> bool:
    """Whether a hyper-parameter so annotated may be another one for each parameter, such as an axis of it."""
    return "or a rule" in getattr(hint, "__metadata__", ())


UNKNOWN = object()


def portable(value: Any) -> Any:
    """The value as JSON has it, tuples kept; `UNKNOWN` for what a file cannot hold, such as a rule or a mapping."""
    value = plain(value)
    if hasattr(value, "dtype") and getattr(value, "shape", None) is not None and math.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, (tuple, list)):
        parts = tuple(map(portable, value))
        return UNKNOWN if any(part is UNKNOWN for part in parts) else parts
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) and math.isfinite(value) else UNKNOWN


def known(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a file can hold, by name; see `portable`."""
    return {name: x for name, value in values.items() if (x := portable(value)) is not UNKNOWN}


# ---- writing


def listed(parameters: Iterable[Parameter]) -> list[tuple[Parameter, str, Entry]]:
    """The arrays of the file: their parameters, their keys there and what they are called, the widest dtypes first."""
    arrays = [
        (p, key, Entry(f"{p.name}/{key}", stored.dtype, stored.shape(p.shape)))
        for p in parameters
        for key, stored in p.arrays().items()
    ]
    return sorted(arrays, key=lambda array: -int(DTYPES[array[2].dtype][1][-1]))


def write(
    path: Path,
    groups: Sequence[Group],
    parameters: Sequence[Parameter],
    content: Callable[[Parameter, str], Numbers],
    steps: int | None = None,
) -> None:
    """Writes the file (`fusedbun.portable.file.write`).

    Args:
        path: the file.
        groups, parameters: what is in it.
        content: the numbers of a parameter's array, asked for in the order of `listed`.
        steps: how many steps a schedule has counted; None where nothing counts them.
    """
    metadata = {"format": FORMAT, "version": VERSION, "steps": _text(steps)}
    metadata |= {f"group {i}": _text(asdict(group)) for i, group in enumerate(groups)}
    for p in parameters:
        if (key := f"parameter {p.name}") in metadata:
            raise ValueError(f"two parameters are called {p.name!r}; state is kept by name, so give each its own")
        metadata[key] = _text_of_parameter(p)
    arrays = listed(parameters)
    file.write(path, metadata, [entry for *_, entry in arrays], lambda i: content(*arrays[i][:2]))


def _text(content: Any) -> str:
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    if len(text) > _LARGEST_TEXT:
        raise ValueError(f"what is to be saved of a parameter or a group takes {len(text):,} characters: {text:.100}…")
    return text


def _text_of_parameter(p: Parameter) -> str:
    slots = None if p.slots is None else {key: [slot.axes, slot.code] for key, slot in p.slots.items()}
    stack = {"stacked": p.stacked} if p.stacked else {}
    return _text({"shape": p.shape, "dtype": p.dtype, "group": p.group, "slots": slots, **stack})


# ---- reading


@dataclass(frozen=True)
class Saved:
    """A file, checked and open: what is in it, and the file itself, whose arrays are called as `listed` calls them."""

    groups: Sequence[Group]
    parameters: Mapping[str, Parameter]  # by name
    steps: int | None  # that a schedule had counted; None where nothing counted them
    opened: Opened


@contextmanager
def saved(path: Path) -> Iterator[Saved]:
    """Opens a file, checks its bytes, and that its arrays are those of the slots that it says it has.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, is damaged, or is of a later version.
    """
    with file.opened(path) as opened:
        metadata = opened.metadata
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is of the format {metadata.get('format')!r:.100}, but {FORMAT!r} is read")
        if metadata.get("version") != VERSION:
            raise ValueError(
                f"{path} is of version {metadata.get('version')!r:.100} of the format, but this fusedbun reads version "
                f"{VERSION}; install a later one"
            )
        try:
            steps = _read(metadata["steps"])
            _check(steps is None or _is_size(steps), steps)
            groups = [_group(text) for key, text in metadata.items() if key.startswith("group ")]
            parameters = {
                (name := key.removeprefix("parameter ")): _parameter(name, text, len(groups))
                for key, text in metadata.items()
                if key.startswith("parameter ")
            }
            declared = {entry.name: entry for *_, entry in listed(parameters.values())}
            if declared != {name: entry for name, (entry, _) in opened.entries.items()}:
                raise ValueError("its arrays are not those of its slots")
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            reason = error if isinstance(error, ValueError) else type(error).__name__
            raise ValueError(f"{path} says of itself what fusedbun does not write: {reason!s:.300}") from None
        yield Saved(groups, parameters, steps, opened)


_RATE = (int, float, type(None))
_FIELDS = ((str, type(None)), (dict,), _RATE, _RATE, (bool,), (bool,), (int,), (dict,))  # of `Group`, as they are read


def _group(text: str) -> Group:
    group = Group(**_read(text))
    for value, kinds in zip(vars(group).values(), _FIELDS, strict=True):
        _check(type(value) in kinds, value)
    for values in group.transformations.values():
        _check(type(values) is dict, values)
    _check(_text(asdict(group)) == text, text)
    lr, initial_lr = (None if rate is None else float(rate) for rate in (group.lr, group.initial_lr))
    return replace(group, lr=lr, initial_lr=initial_lr)


def _parameter(name: str, text: str, groups: int) -> Parameter:
    content = _read(text)
    shape, dtype, group, slots = (content[field] for field in ("shape", "dtype", "group", "slots"))
    _check(_are_sizes(shape), shape)
    _check(dtype in ("float64", "float32", "float16", "bfloat16"), dtype)
    _check(_is_size(group) and group < groups, group)
    _check(slots is None or type(slots) is dict, slots)
    stacked = content.get("stacked", 0)
    _check(_is_size(stacked) and stacked <= len(shape), stacked)
    if slots is not None:
        slots = {key: _slot(axes, code, dtype, len(shape) - stacked) for key, (axes, code) in slots.items()}
    parameter = Parameter(name, shape, dtype, group, slots, stacked)
    _check(_text_of_parameter(parameter) == text, text)
    return parameter


def _slot(axes: Any, code: Any, dtype: str, ndim: int) -> Slot:
    _check(_are_sizes(axes) and len(set(axes)) == len(axes), axes)
    known = codes.CODES.get(code) if type(code) is str else None
    _check(known is not None and known.of(dtype) is known and known.fits(axes, ndim), code)
    return Slot(axes, code)


def _read(text: str) -> Any:
    """What a text of the metadata says, with tuples for lists. That it is what is written, its caller checks."""
    _check(len(text) <= _LARGEST_TEXT, text)
    return _with_tuples(json.loads(text))


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tuples(x) for key, x in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _check(is_right: bool, value: Any) -> None:
    if not is_right:
        raise ValueError(f"there is {value!r:.100}")


def _are_sizes(values: Any) -> bool:
    return type(values) is tuple and all(map(_is_size, values))


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62
