"""Saving the state of torch's optimizers to a file that JAX reads too, and loading it (`fusedbun.portable`)."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedbun.chain import Chain, stacked_at
from fusedbun.hyper import hints
from fusedbun.portable import entries
from fusedbun.portable.entries import UNKNOWN, Group, Parameter, portable
from fusedbun.portable.file import Numbers
from fusedbun.portable.match import Loading, Names
from fusedbun.torch.driver import FIRST_LR, TransformOptimizer
from fusedbun.torch.leaf import chain_at, check_state, is_real, path_of
from fusedbun.torch.loading import chooses_storage
from fusedbun.torch.sharding.placement import is_sharded
from fusedbun.torch.state import State, dtype_name, filled, zeros
from fusedbun.transform import Slot

NamedParameters = Iterable[tuple[str, Tensor]]


class Place(NamedTuple):
    """A parameter, which of its param group's it is, and what the file says of it before it is stepped."""

    param: Tensor
    place: int
    unstepped: Parameter


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
    chains = [optimizer.chain(group) for group in optimizer.param_groups]
    groups = [_group(optimizer, *of) for of in zip(optimizer.param_groups, chains, strict=True)]
    parameters = [_as_kept(optimizer, place, chains) for place in places]
    tensors = {place.unstepped.name: place.param for place in places}

    def content(parameter: Parameter, key: str) -> Numbers:
        param = tensors[parameter.name]
        state: State = optimizer.state.get(param, {})
        x = state[key] if key in state else zeros(parameter.arrays()[key], param)
        # to mypy a DTensor is a Tensor
        whole = (x.full_tensor() if is_sharded(x) else x).detach().cpu().contiguous()  # type: ignore[attr-defined]  # a DTensor's
        numbers: Numbers = (whole.view(torch.uint16) if whole.dtype == torch.bfloat16 else whole).numpy()
        return numbers

    write = _write_from_all if any(map(is_sharded, tensors.values())) else entries.write
    write(Path(path), groups, parameters, content)


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
    places = {place.unstepped.name: place for place in _places("load_state", optimizer, names)}
    parameters = [place.unstepped for place in places.values()]
    with entries.saved(Path(path)) as file:
        loading = Loading(file, [*places], mapping, partial)
        taken = []
        for g, group in enumerate(optimizer.param_groups):
            saved = loading.groups(p.name for p in parameters if p.group == g)
            taken.append(_taken(optimizer, group, saved, loading.problems))
        merged = [new or old for old, new in zip(optimizer.param_groups, taken, strict=True)]
        chains = [optimizer.chain(group) for group in merged]
        groups = [_group(optimizer, new, chain) if new else None for new, chain in zip(taken, chains, strict=True)]
        matches = loading.matches(parameters, groups, lambda p: _choices(chains, merged, places[p.name]))
        loading.refuse(type(optimizer).__name__)
        state: defaultdict[Tensor, Any] = defaultdict(dict, optimizer.state)
        for name, match in matches.items():
            param, unstepped = places[name].param, places[name].unstepped
            state.pop(param, None)
            if match.slots is not None:
                stored = replace(unstepped, slots=match.slots).arrays()
                state[param] = {key: filled(stored[key], param, _tensor(x)) for key, x in match.arrays(file)}
    optimizer.__setstate__({"state": state, "param_groups": taken})


def _places(owner: str, optimizer: TransformOptimizer, names: NamedParameters | None) -> list[Place]:
    """All parameters that can be stepped, with their names."""
    if not isinstance(optimizer, TransformOptimizer):
        raise TypeError(
            f"{owner}: optimizer must be one of fusedbun's, such as fusedbun.SM3, but it is a "
            f"{type(optimizer).__name__}"
        )
    by_param = None if names is None else {param: name for name, param in names}
    places = []
    for g, group in enumerate(optimizer.param_groups):
        chain = optimizer.chain(group)
        for i, param in enumerate(group["params"]):
            if not is_real(param):
                continue  # it has never been stepped
            name = by_param.get(param) if by_param is not None else (group.get("param_names") or {i: None})[i]
            if name is None:
                raise ValueError(
                    f"{owner}: state is kept by name, but parameter {i} of group {g}, of shape {tuple(param.shape)}, "
                    f"has none; make the optimizer from model.named_parameters(), or give "
                    f"names=model.named_parameters()"
                )
            shape, stacked = tuple(param.shape), stacked_at(chain.stacked, path_of(group, i), param)
            places.append(Place(param, i, Parameter(name, shape, dtype_name(param.dtype), g, None, stacked)))
    counts = Counter(place.unstepped.name for place in places)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise ValueError(f"{owner}: several parameters are called {', '.join(map(repr, twice))}; rename them")
    return places


def _group(optimizer: TransformOptimizer, group: Mapping[str, Any], chain: Chain) -> Group:
    """A param group as the file has it."""
    arguments = {name: group[name] for name in optimizer._hyperparameters}
    initial = float(group.get(FIRST_LR, group["lr"])) if optimizer.recipe.wants_initial_lr else None
    return entries.group_of(chain, _recipe(optimizer), arguments, group["lr"], initial, group["maximize"])


def _recipe(optimizer: TransformOptimizer) -> str | None:
    """The recipe's name; None where it is a chain with its own hyper-parameters."""
    make = optimizer.recipe.make
    return None if isinstance(getattr(make, "__self__", None), Chain) else make.__name__


def _as_kept(optimizer: TransformOptimizer, place: Place, chains: list[Chain]) -> Parameter:
    """A parameter with the slots that it has."""
    state: State = optimizer.state.get(place.param, {})
    if not state and not place.param.requires_grad:
        return place.unstepped
    slots = _choices(chains, optimizer.param_groups, place)
    if not state and slots[0]:
        return place.unstepped
    choices = [replace(place.unstepped, slots=of) for of in slots]
    chosen = next((choice for choice in choices if choice.arrays().keys() == state.keys()), choices[0])
    chain = chain_at(chains[chosen.group], optimizer.param_groups, chosen.group, place.place)
    check_state(chain, f"parameter {chosen.name!r}", place.param, state, chosen.arrays())
    return chosen


def _choices(chains: list[Chain], groups: list[dict[str, Any]], place: Place) -> list[dict[str, Slot]]:
    """What may be kept for a parameter: for dense gradients, or, where the chain takes them, for sparse ones."""
    p = place.unstepped
    chain = chain_at(chains[p.group], groups, p.group, place.place)
    choices = [entries.slots_of(chain, p.shape, p.dtype)]
    with suppress(TypeError, ValueError):  # of what needs every row
        choices.append(entries.slots_of(chain.for_rows(), p.shape, p.dtype))
    return choices


def _tensor(numbers: Numbers) -> Tensor:
    """The tensor of numbers as a file has them."""
    x = torch.from_numpy(numbers)
    return x.view(torch.bfloat16) if x.dtype == torch.uint16 else x


def _write_from_all(
    path: Path, groups: list[Group], parameters: list[Parameter], content: Callable[[Parameter, str], Numbers]
) -> None:
    """Writes the file in the first process, while all of them gather what is in it."""
    import torch.distributed as dist

    arrays = entries.listed(parameters)
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, [f"{parameter.name} {key}" for parameter, key, _ in arrays])
    if other := [rank for rank, of_rank in enumerate(names) if of_rank != names[0]]:
        raise ValueError(
            f"save_state: processes {other} have other parameters than the first, as under pipeline parallelism; save "
            f"the state of each stage to a file of its own, from a process group of its own"
        )
    waiting = iter(arrays)

    def gathered(parameter: Parameter, key: str) -> Numbers:
        next(waiting)
        return content(parameter, key)

    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            entries.write(path, groups, parameters, gathered)
        except Exception as caught:
            error = caught
    for parameter, key, _ in waiting:  # the others wait for every one of them, whatever became of the file
        content(parameter, key)
    outcome = [f"{type(error).__name__}: {error}" if error else None]
    dist.broadcast_object_list(outcome, src=0)
    if error:
        raise error
    if outcome[0]:
        raise OSError(f"the first process could not write {path}: {outcome[0]}")


def _taken(
    optimizer: TransformOptimizer, group: Mapping[str, Any], saved: list[Group], problems: list[str]
) -> dict[str, Any] | None:
    """The param group with saved hyper-parameters; None, and problems more, where it cannot take them."""
    recipe, declared = _recipe(optimizer), hints(optimizer.recipe.make)
    if recipe is None:  # a chain with its own hyper-parameters
        kinds: dict[str, Any] = {t.name: type(t) for t in optimizer.chain(group)}
        declared = {f"{title}.{name}": hint for title, kind in kinds.items() for name, hint in hints(kind).items()}
    taking = [
        name
        for name in optimizer._hyperparameters
        if not chooses_storage(name)
        and not entries.differs_by_parameter(declared.get(name))
        and portable(group[name]) is not UNKNOWN
    ]
    wrong = []
    new: dict[str, Any] = {}
    for in_file in saved:
        if in_file.recipe != recipe:
            wrong.append(f"the recipe in the file is {in_file.recipe!r:.100}, but here {recipe!r}")
            continue
        values = {"lr": in_file.lr, "maximize": in_file.maximize, "seed": in_file.seed, FIRST_LR: in_file.initial_lr}
        values = {name: value for name, value in values.items() if value is not None}
        values |= {name: in_file.arguments[name] for name in taking if name in in_file.arguments}
        wrong += [
            f"{name} of these parameters is {new[name]!r:.100} and {value!r:.100} in the file"
            for name, value in values.items()
            if name in new and new[name] != value
        ]
        new |= values
    if isinstance(group["lr"], Tensor) and "lr" in new:
        new["lr"] = torch.full_like(group["lr"], new["lr"])
    merged = {**group, **new}
    if not wrong:
        try:
            optimizer.chain(merged)
        except (TypeError, ValueError, OverflowError) as error:
            wrong.append(f"a saved hyper-parameter is not valid: {error}")
    names = ", ".join(map(repr, group.get("param_names", ())[:3])) or f"{len(group['params'])} parameters"
    problems += [f"{text} (param group of {names})" for text in dict.fromkeys(wrong)]
    return None if wrong else merged
