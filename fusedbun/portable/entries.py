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

from fusedbun.chain import Chain
from fusedbun.hyper import hints, is_structural, plain
from fusedbun.portable import file
from fusedbun.portable.file import DTYPES, Entry, Numbers, Opened
from fusedbun.storage import codes
from fusedbun.storage.codes import Stored
from fusedbun.storage.rounding import COUNTER
from fusedbun.transform import Shape, Slot

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
            that stochastic rounding keeps; None where it has not been stepped, so that all would be at the start.
    """

    name: str
    shape: Shape
    dtype: str
    group: int
    slots: Mapping[str, Slot] | None

    def arrays(self) -> dict[str, Stored]:
        """The arrays that its slots are stored in, by the slot's name and what follows."""
        slots = {} if self.slots is None else self.slots
        return {key + part: x for key, slot in slots.items() for part, x in codes.arrays(slot, self.dtype).items()}


def slots_of(chain: Chain, shape: Shape, dtype: str) -> dict[str, Slot]:
    """All that a chain keeps for such a parameter, as `Parameter` has it."""
    found = {key: Slot(slot.axes, codes.code_of(slot, dtype).name) for key, slot in chain.slots(shape).items()}
    return found | ({COUNTER: Slot((), "int32")} if chain.rounding.stochastic else {})


def group_of(
    chain: Chain,
    recipe: str | None,
    arguments: Mapping[str, Any],
    lr: Any,
    initial_lr: Any = None,
    maximize: bool = False,
) -> Group:
    """The group of parameters that a chain steps; see `Group`."""
    known = {name: value for name, value in ((n, portable(v)) for n, v in arguments.items()) if value is not UNKNOWN}
    rate, initial = (None if value is UNKNOWN else value for value in (portable(lr), portable(initial_lr)))
    chosen = {t.name: _choices(t) for t in chain}
    rounding = chain.rounding
    return Group(recipe, known, rate, initial, bool(maximize), rounding.stochastic, int(rounding.seed), chosen)


def _choices(transform: Any) -> dict[str, Any]:
    """The hyper-parameters that choose what is computed and are the same for every parameter.

    What state is stored in is not among them: that shows in the slots.
    """
    kind: Any = type(transform)
    declared = hints(kind)
    values = {name: portable(value) for name, value in vars(transform).items() if name in declared}
    return {
        name: value
        for name, value in values.items()
        if value is not UNKNOWN
        and not name.endswith("dtype")
        and not differs_by_parameter(declared[name])
        and is_structural(declared[name])
    }


def differs_by_parameter(hint: Any) -> bool:
    """Whether a hyper-parameter so annotated may be another one for each parameter, such as an axis of it."""
    return "or a rule" in getattr(hint, "__metadata__", ())


UNKNOWN = object()


def portable(value: Any) -> Any:
    """The value as JSON has it, tuples kept; `UNKNOWN` for a rule, a mapping and what else means nothing elsewhere."""
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


# ---- writing


def listed(parameters: Iterable[Parameter]) -> list[tuple[Parameter, str, Entry]]:
    """The arrays of the file: their parameters, their keys there and what they are called, the widest dtypes first."""
    found = [
        (p, key, Entry(f"{p.name}/{key}", stored.dtype, stored.shape(p.shape)))
        for p in parameters
        for key, stored in p.arrays().items()
    ]
    return sorted(found, key=lambda of: -int(DTYPES[of[2].dtype][1][-1]))


def write(
    path: Path,
    groups: Sequence[Group],
    parameters: Sequence[Parameter],
    content: Callable[[Parameter, str], Numbers],
    steps: int | None = None,
) -> None:
    """Writes the file; see `fusedbun.portable.file.write`.

    Args:
        path: the file.
        groups: the groups.
        parameters: the parameters.
        content: the numbers of a parameter's array, asked for in the order of `listed`.
        steps: how many steps a schedule has counted; None where nothing counts them.
    """
    metadata = {"format": FORMAT, "version": VERSION, "steps": json.dumps(steps)}
    metadata |= {f"group {i}": _dumped(asdict(group)) for i, group in enumerate(groups)}
    for p in parameters:
        if (key := f"parameter {p.name}") in metadata:
            raise ValueError(f"two parameters are called {p.name!r}; state is kept by name, so give each its own")
        slots = None if p.slots is None else {key: [slot.axes, slot.code] for key, slot in p.slots.items()}
        metadata[key] = _dumped({"shape": p.shape, "dtype": p.dtype, "group": p.group, "slots": slots})
    arrays = listed(parameters)
    file.write(path, metadata, [entry for *_, entry in arrays], lambda i: content(*arrays[i][:2]))


def _dumped(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    if len(text) > _LARGEST_TEXT:
        raise ValueError(f"what is to be saved of a parameter or a group takes {len(text):,} characters: {text:.100}…")
    return text


# ---- reading


@dataclass(frozen=True)
class Saved:
    """A file, checked and open.

    Args:
        path: where it is.
        groups: the groups.
        parameters: the parameters by name.
        steps: how many steps a schedule had counted; None where nothing counted them.
        opened: the file itself.
    """

    path: Path
    groups: Sequence[Group]
    parameters: Mapping[str, Parameter]
    steps: int | None
    opened: Opened

    def read(self, parameter: Parameter, key: str) -> Numbers:
        """The numbers of one array; those of bfloat16 as words of 16 bits."""
        return self.opened.read(f"{parameter.name}/{key}")


@contextmanager
def saved(path: Path) -> Iterator[Saved]:
    """Opens a file, checks its bytes, and that its arrays are those of the slots that it says it has.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, is damaged, or is of a later version.
    """
    with file.opened(path) as opened:
        found = opened.metadata
        if found.get("format") != FORMAT:
            raise ValueError(f"{path} is of the format {found.get('format')!r:.100}, but {FORMAT!r} is read")
        if found.get("version") != VERSION:
            raise ValueError(
                f"{path} is of version {found.get('version')!r:.100} of the format, but this fusedbun reads version "
                f"{VERSION}; install a later one"
            )
        try:
            steps = _checked(_loaded(found["steps"]), lambda n: n is None or (_is_whole(n) and n >= 0))
            groups = [_group(text) for key, text in found.items() if key.startswith("group ")]
            of = {key.removeprefix("parameter "): x for key, x in found.items() if key.startswith("parameter ")}
            parameters = {name: _parameter(name, text, len(groups)) for name, text in of.items()}
            wanted = {entry.name: entry for *_, entry in listed(parameters.values())}
            if wanted != {name: entry for name, (entry, _) in opened.entries.items()}:
                raise ValueError("its arrays are not those of its slots")
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            reason = error if isinstance(error, ValueError) else type(error).__name__
            raise ValueError(f"{path} says of itself what fusedbun does not write: {reason!s:.300}") from None
        yield Saved(path, groups, parameters, steps, opened)


def _group(text: str) -> Group:
    content = _checked(_loaded(text), lambda x: isinstance(x, dict))
    group = Group(**{name: content.pop(name) for name in Group.__dataclass_fields__})
    texts = (group.recipe is None or isinstance(group.recipe, str)) and not content
    flags = isinstance(group.maximize, bool) and isinstance(group.stochastic_rounding, bool)
    rates = all(rate is None or _is_number(rate) for rate in (group.lr, group.initial_lr))
    mappings = [group.arguments, group.transformations]
    mappings += group.transformations.values() if isinstance(group.transformations, dict) else []
    are_mappings = all(isinstance(x, dict) for x in mappings)
    _checked(group, lambda _: texts and flags and rates and _is_whole(group.seed) and are_mappings)
    tuples = {name: _tuples(value) for name, value in group.arguments.items()}
    chosen = {name: {k: _tuples(v) for k, v in of.items()} for name, of in group.transformations.items()}
    lr, initial = (None if rate is None else float(rate) for rate in (group.lr, group.initial_lr))
    return replace(group, arguments=tuples, transformations=chosen, lr=lr, initial_lr=initial)


def _parameter(name: str, text: str, groups: int) -> Parameter:
    content = _checked(_loaded(text), lambda x: isinstance(x, dict))
    shape = tuple(_checked(content["shape"], lambda x: isinstance(x, list) and all(_is_size(n) for n in x)))
    dtype = _checked(content["dtype"], lambda x: x in ("float64", "float32", "float16", "bfloat16"))
    group = _checked(content["group"], lambda x: _is_whole(x) and 0 <= x < groups)
    if content["slots"] is None:
        return Parameter(name, shape, dtype, group, None)
    slots = {}
    for key, (axes, code) in _checked(content["slots"], lambda x: isinstance(x, dict)).items():
        _checked(axes, lambda x: isinstance(x, list) and all(_is_size(n) for n in x) and len(set(x)) == len(x))
        known = codes.CODES.get(code) if isinstance(code, str) else None
        if known is None or known.of(dtype) is not known or not known.fits(tuple(axes), len(shape)):
            raise ValueError(f"a slot is stored as {code!r:.100}")
        slots[key] = Slot(tuple(axes), code)
    return Parameter(name, shape, dtype, group, slots)


def _loaded(text: str) -> Any:
    if len(text) > _LARGEST_TEXT:
        raise ValueError(f"a text has {len(text):,} characters: {text:.50}…")
    return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key stands twice among {', '.join(key for key, _ in pairs):.100}")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _checked(value: Any, is_right: Callable[[Any], bool]) -> Any:
    if not is_right(value):
        raise ValueError(f"there is {value!r:.100}")
    return value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is_whole(value) and 0 <= value < 1 << 62


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
