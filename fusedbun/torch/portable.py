"""Saving the state of torch's optimizers to a file that JAX reads too, and loading it (`fusedbun.portable`)."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusedbun.chain import Chain
from fusedbun.hyper import hints
from fusedbun.portable import entries
from fusedbun.portable.entries import UNKNOWN, Group, Parameter, Saved, portable
from fusedbun.portable.file import Numbers
from fusedbun.portable.match import Match, Names, Pair, compare_groups, matched, pairs, refuse
from fusedbun.torch.checks import chain_at, check_state
from fusedbun.torch.driver import FIRST_LR, TransformOptimizer
from fusedbun.torch.loading import chooses_storage
from fusedbun.torch.sharding.placement import is_sharded, put
from fusedbun.torch.state import State, dtype_name, zeros
from fusedbun.transform import Slot

NamedParameters = Iterable[tuple[str, Tensor]]


class Place(NamedTuple):
    """A parameter, its name, and its place among the param groups."""

    name: str
    param: Tensor
    group: int
    at: int


def save_state(
    optimizer: TransformOptimizer, path: str | os.PathLike[str], *, names: NamedParameters | None = None
) -> None:
    """Saves an optimizer's state and hyper-parameters to a safetensors file that torch and JAX go on from.

    The file is written beside its place and moved there when it is whole. It holds the state by parameter name and
    slot, but not the parameters. A rule among the hyper-parameters is code, and a schedule is not the optimizer's:
    both are left out. Where parameters are DTensors every process must call it: one array at a time is gathered, the
    first process writes, and all return when the file is there. Otherwise the process that calls it writes.

    Args:
        optimizer: one of fusedbun's, made from `model.named_parameters()` or `param_groups(model)`.
        path: the file; one that is there is replaced.
        names: `model.named_parameters()`, for an optimizer that was made without names. Noise, which depends on the
            name that the optimizer knows, does not go on then.

    Raises:
        TypeError: the optimizer is not fusedbun's.
        ValueError: a parameter has no name, or two have the same.
        OSError: the file cannot be written.
    """
    places = _places("save_state", optimizer, names)
    groups = [_group(optimizer, group, optimizer.chain(group)) for group in optimizer.param_groups]
    kept: dict[str, tuple[Tensor, State]] = {}
    parameters = []
    for place in places:
        slots, state = _kept(optimizer, place)
        shape, dtype = tuple(place.param.shape), dtype_name(place.param.dtype)
        parameters.append(Parameter(place.name, shape, dtype, place.group, slots))
        kept[place.name] = place.param, state

    def content(parameter: Parameter, key: str) -> Numbers:
        param, state = kept[parameter.name]
        return _numbers(state[key] if key in state else zeros(parameter.arrays()[key], param))

    if any(is_sharded(place.param) for place in places):
        _write_from_all(Path(path), groups, parameters, content)
    else:
        entries.write(Path(path), groups, parameters, content)


def load_state(
    optimizer: TransformOptimizer,
    path: str | os.PathLike[str],
    mapping: Names | None = None,
    *,
    partial: bool = False,
    names: NamedParameters | None = None,
) -> None:
    """Loads what `fusedbun.save_state` or `fusedbun_jax.save_state` wrote: the next steps are those of the saved run.

    As with `load_state_dict`, the param groups take the saved hyper-parameters, the learning rate among them. What
    belongs to this model they keep: rules, mappings, axes such as `channel_axis`, what state is stored in, and, where
    the file knows none because it was scheduled in JAX, the learning rate. Noise goes on where names and seed are the
    same; under a mapping that renames parameters it is another, as good. Everything is checked before anything changes.

    Args:
        optimizer: one of fusedbun's, made from named parameters, as the saved one but for layouts.
        path: the file.
        mapping: where parameters are called or laid out otherwise: `{name in the file: name here}` or `{name in the
            file: (name here, axes)}`, the axes as numpy.transpose takes them: (1, 0) for the kernel (in, out) of a
            Dense layer that becomes the weight (out, in) of a Linear, (3, 2, 0, 1) for that of a convolution. Or a
            rule from a name in the file to either. Names that are not in it stay as they are. Codes of 8 and 4 bits
            stay what they are bit for bit in one layout; from one to another they are rounded to the nearest.
        partial: load the parameters that are both here and in the file, and leave the others as they are.
        names: `model.named_parameters()`, for an optimizer that was made without names.

    Raises:
        TypeError: the optimizer is not fusedbun's.
        ValueError: the file is damaged or none of fusedbun's, or something does not fit: all of it is listed by name.
        OSError: the file cannot be read.
    """
    owner, places = type(optimizer).__name__, _places("load_state", optimizer, names)
    with entries.saved(Path(path)) as file:
        problems: list[str] = []
        found = pairs(file, [place.name for place in places], mapping, partial, problems)
        taken = [
            _taken(optimizer, group, _groups_of(file, g, places, found), problems)
            for g, group in enumerate(optimizer.param_groups)
        ]
        matches = _matches(optimizer, file, taken, places, found, problems)
        refuse(file.path, owner, problems)
        state: defaultdict[Tensor, Any] = defaultdict(dict, optimizer.state)
        for place in places:
            if match := matches.get(place.name):
                state.pop(place.param, None)
                if match.slots is not None:
                    state[place.param] = _loaded(place.param, match, file)
    optimizer.__setstate__({"state": state, "param_groups": taken})


def _places(owner: str, optimizer: TransformOptimizer, names: NamedParameters | None) -> list[Place]:
    """The parameters with their names."""
    if not isinstance(optimizer, TransformOptimizer):
        raise TypeError(
            f"{owner}: optimizer must be one of fusedbun's, such as fusedbun.SM3, but it is a "
            f"{type(optimizer).__name__}"
        )
    given = None if names is None else {param: name for name, param in names}
    found = []
    for g, group in enumerate(optimizer.param_groups):
        for i, param in enumerate(group["params"]):
            name = given.get(param) if given is not None else (group.get("param_names") or {i: None})[i]
            if name is None:
                raise ValueError(
                    f"{owner}: state is kept by name, but parameter {i} of group {g}, of shape {tuple(param.shape)}, "
                    f"has none; make the optimizer from model.named_parameters(), or give "
                    f"names=model.named_parameters()"
                )
            found.append(Place(name, param, g, i))
    twice = sorted(name for name, count in Counter(place.name for place in found).items() if count > 1)
    if twice:
        raise ValueError(f"{owner}: several parameters are called {', '.join(map(repr, twice))}; rename them")
    return found


def _group(optimizer: TransformOptimizer, group: Mapping[str, Any], chain: Chain) -> Group:
    """A param group as the file has it."""
    arguments = {name: group[name] for name in optimizer._hyperparameters}
    initial = float(group.get(FIRST_LR, group["lr"])) if optimizer.recipe.wants_initial_lr else None
    return entries.group_of(chain, _recipe(optimizer), arguments, group["lr"], initial, group["maximize"])


def _recipe(optimizer: TransformOptimizer) -> str | None:
    """The recipe's name; None where it is a chain with its own hyper-parameters."""
    make = optimizer.recipe.make
    return None if isinstance(getattr(make, "__self__", None), Chain) else make.__name__


def _kept(optimizer: TransformOptimizer, place: Place) -> tuple[dict[str, Slot] | None, State]:
    """The slots that a parameter has, None where it was not stepped yet, and its arrays."""
    group, param = optimizer.param_groups[place.group], place.param
    chain = chain_at(optimizer.chain(group), optimizer.param_groups, place.group, place.at)
    state: State = optimizer.state.get(param, {})
    shape, dtype = tuple(param.shape), dtype_name(param.dtype)
    choices = _choices(chain, shape, dtype)
    if not state and choices[0]:
        return None, {}
    arrays = [Parameter("", shape, dtype, 0, slots).arrays() for slots in choices]
    chosen = next((i for i, declared in enumerate(arrays) if declared.keys() == state.keys()), 0)
    check_state(chain, f"parameter {place.name!r}", param, state, arrays[chosen])
    return choices[chosen], state


def _choices(chain: Chain, shape: tuple[int, ...], dtype: str) -> list[dict[str, Slot]]:
    """What may be kept for a parameter: for dense gradients, or, where the chain takes them, for sparse ones."""
    found = [entries.slots_of(chain, shape, dtype)]
    with suppress(TypeError, ValueError):  # of what needs every row
        found.append(entries.slots_of(chain.for_rows(), shape, dtype))
    return found


def _numbers(x: Tensor) -> Numbers:
    """A tensor's numbers, gathered from all processes; those of bfloat16 as words."""
    whole = x.full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]
    whole = whole.detach().cpu().contiguous()
    numbers: Numbers = (whole.view(torch.int16) if whole.dtype == torch.bfloat16 else whole).numpy()
    return numbers.view(np.uint16) if whole.dtype == torch.bfloat16 else numbers


def _tensor(numbers: Numbers) -> Tensor:
    """The tensor of numbers as a file has them."""
    if numbers.dtype == np.uint16:
        return torch.from_numpy(numbers.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(numbers)


def _write_from_all(
    path: Path, groups: list[Group], parameters: list[Parameter], content: Callable[[Parameter, str], Numbers]
) -> None:
    """Writes the file in the first process, while all of them gather what is in it."""
    import torch.distributed as dist

    arrays, done = entries.listed(parameters), 0
    error: Exception | None = None
    named: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(named, [f"{parameter.name} {key}" for parameter, key, _ in arrays])
    if other := [rank for rank, names in enumerate(named) if names != named[0]]:
        raise ValueError(
            f"save_state: processes {other} have other parameters than the first, as under pipeline parallelism; save "
            f"the state of each stage to a file of its own, from a process group of its own"
        )

    def gathered(parameter: Parameter, key: str) -> Numbers:
        nonlocal done
        done += 1
        return content(parameter, key)

    if dist.get_rank() == 0:
        try:
            entries.write(path, groups, parameters, gathered)
        except Exception as caught:
            error = caught
    for parameter, key, _ in arrays[done:]:  # the others wait for every one of them, whatever became of the file
        content(parameter, key)
    outcome = [f"{type(error).__name__}: {error}" if error else None]
    dist.broadcast_object_list(outcome, src=0)
    if error:
        raise error
    if outcome[0]:
        raise OSError(f"the first process could not write {path}: {outcome[0]}")


def _groups_of(file: Saved, g: int, places: list[Place], found: Mapping[str, Pair]) -> list[Group]:
    """The groups that the parameters of a param group had in the file."""
    indices = {found[p.name].saved.group: None for p in places if p.group == g and p.name in found}
    return [file.groups[index] for index in indices]


def _taken(
    optimizer: TransformOptimizer, group: Mapping[str, Any], saved: list[Group], problems: list[str]
) -> dict[str, Any] | None:
    """The param group with the saved hyper-parameters; None, and problems more, where it cannot take them."""
    names = ", ".join(map(repr, group.get("param_names", ())[:3])) or f"{len(group['params'])} parameters"
    wrong = []
    declared = _declared(optimizer, group)
    new: dict[str, Any] = {}
    for one in saved:
        if one.recipe != _recipe(optimizer):
            wrong.append(f"the recipe in the file is {one.recipe!r:.100}, but here {_recipe(optimizer)!r}")
            continue
        own = {"lr": one.lr, "maximize": one.maximize, "seed": one.seed, FIRST_LR: one.initial_lr}
        values = {name: value for name, value in own.items() if value is not None}
        for name in optimizer._hyperparameters:
            is_own = chooses_storage(name) or entries.differs_by_parameter(declared.get(name))
            if name in one.arguments and not is_own and portable(group[name]) is not UNKNOWN:
                values[name] = one.arguments[name]
        for name, value in values.items():
            if name in new and new[name] != value:
                wrong.append(f"{name} of these parameters is {new[name]!r:.100} and {value!r:.100} in the file")
            new[name] = value
    if isinstance(group["lr"], Tensor) and "lr" in new:
        new["lr"] = torch.full_like(group["lr"], new["lr"])
    merged = {**group, **new}
    if not wrong:
        try:
            optimizer.chain(merged)
        except (TypeError, ValueError, OverflowError) as error:
            wrong.append(f"a saved hyper-parameter is not valid: {error}")
    problems += [f"{text} (param group of {names})" for text in dict.fromkeys(wrong)]
    return None if wrong else merged


def _declared(optimizer: TransformOptimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """The annotations of an optimizer's hyper-parameters."""
    if _recipe(optimizer) is not None:
        return hints(optimizer.recipe.make)
    kinds: dict[str, Any] = {t.name: type(t) for t in optimizer.chain(group)}
    return {f"{title}.{name}": hint for title, kind in kinds.items() for name, hint in hints(kind).items()}


def _matches(
    optimizer: TransformOptimizer,
    file: Saved,
    taken: list[dict[str, Any] | None],
    places: list[Place],
    found: Mapping[str, Pair],
    problems: list[str],
) -> dict[str, Match]:
    """What each parameter takes of the file, by its name; those of groups that take nothing are left out."""
    groups = [own if new is None else new for own, new in zip(optimizer.param_groups, taken, strict=True)]
    chains = [optimizer.chain(group) for group in groups]
    here = [_group(optimizer, group, chain) for group, chain in zip(groups, chains, strict=True)]
    together: dict[tuple[int, int], list[str]] = {}
    for place in places:
        if place.name in found and taken[place.group] is not None:
            together.setdefault((found[place.name].saved.group, place.group), []).append(place.name)
    alike = {both: compare_groups(file.groups[both[0]], here[both[1]], of, problems) for both, of in together.items()}
    matches = {}
    for place in places:
        pair = found.get(place.name)
        if pair is None or not alike.get((pair.saved.group, place.group)):
            continue
        chain = chain_at(chains[place.group], groups, place.group, place.at)
        shape, dtype = tuple(place.param.shape), dtype_name(place.param.dtype)
        match = matched(pair, shape, dtype, _choices(chain, shape, dtype), problems)
        if match is not None:
            matches[place.name] = match
    return matches


def _loaded(param: Tensor, match: Match, file: Saved) -> State:
    """The state of a parameter, laid out and placed as its slots' starts are."""
    arrays = Parameter("", tuple(param.shape), dtype_name(param.dtype), 0, match.slots).arrays()
    return {key: put(zeros(arrays[key], param), _tensor(numbers)) for key, numbers in match.arrays(file)}
