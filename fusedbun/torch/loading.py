"""Loading a torch `state_dict`: checked as a whole before anything changes, and kept in its declared precision.

torch casts every floating-point state tensor to the parameter's dtype, which would round the float32 state of a
bfloat16 parameter. Here a state tensor gets the dtype that is declared for it, and one that was saved in another is
converted when that is asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fusedbun.chain import Chain
from fusedbun.hyper import plain
from fusedbun.storage import codes
from fusedbun.storage.codes import Stored
from fusedbun.storage.rounding import TO_NEAREST
from fusedbun.storage.storage import Storage
from fusedbun.torch import namespace as xp
from fusedbun.torch.flat import is_of_fsdp1
from fusedbun.torch.leaf import Owner, chain_at, name_of
from fusedbun.torch.sharding.placement import local, places_of
from fusedbun.torch.state import State, arrays_of, compute_dtype, dtype_name, filled, stored_dtype, zeros

Saved = dict[Tensor, dict[str, tuple[Stored, Tensor]]]
_LISTED = 50  # names in one message


def without_rules(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Leaves the rules among the hyper-parameters out of a dict that `state_dict` is about to return."""
    for group in state_dict["param_groups"]:
        for name in optimizer.defaults:
            if callable(group.get(name)):
                del group[name]


def in_place(optimizer: Owner, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A saved dict whose parameters stand where this optimizer has those of the same names.

    Where one of both has no names, all stand in their places. So do those that are not saved under numbers:
    torch.distributed.checkpoint has named them itself, and FSDP1 numbered, and put them in their places. A group is the
    saved one with its parameters; where these were in several, the one in its place.

    Raises:
        ValueError: it is no optimizer's state, is of parameters with other names, or its groups are of other sizes.
    """
    owner = type(optimizer).__name__
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            f"{owner}: an optimizer's saved state has the keys 'state' and 'param_groups', "
            f"but this one has {', '.join(map(repr, state_dict)) or 'none'}"
        )
    ours, theirs = optimizer.param_groups, state_dict["param_groups"]
    places = _places(optimizer, theirs)
    sizes = [[len(group["params"]) for group in groups] for groups in (theirs, ours)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{owner}: the saved param groups have {sizes[0]} parameters, but this optimizer's have {sizes[1]}; "
            f"make it with the same groups as the one that was saved"
        )
    if places is None:
        return state_dict
    groups = []
    for mine, saved in zip(ours, theirs, strict=True):
        found = [places[name] for name in mine.get("param_names", ())]
        homes = {g for g, _ in found}
        of = theirs[homes.pop()] if len(homes) == 1 else saved
        groups.append({**of, "params": [number for _, number in found]})
    return {**state_dict, "param_groups": groups}


def _places(optimizer: Owner, groups: list[dict[str, Any]]) -> dict[str, tuple[int, Any]] | None:
    """By name, which saved group each parameter is in, and its number; None where they stand in their places."""
    owner, ours = type(optimizer).__name__, optimizer.param_groups
    names, saved = _names(ours), _names(groups)
    numbers = [(g, number) for g, group in enumerate(groups) for number in group["params"]]
    are_named = names and saved and all(isinstance(number, int) for _, number in numbers)
    if not are_named or any(is_of_fsdp1(param) for group in ours for param in group["params"]):
        return None
    here, there = Counter(names), Counter(saved)
    differing = {"missing in it": [*(here - there).elements()], "unexpected": [*(there - here).elements()]}
    if problems := [f"{what}: {_listed(of)}" for what, of in differing.items() if of]:
        raise ValueError(
            f"{owner}: the saved state is of parameters with other names ({'; '.join(problems)}); make the optimizer "
            f"from the named_parameters() of the same model, or rename the saved 'param_names' in a hook "
            f"(register_load_state_dict_pre_hook)"
        )
    if names == saved:
        return None
    if twice := [name for name, count in here.items() if count > 1]:
        raise ValueError(
            f"{owner}: several parameters are called {_listed(twice)}, and they were saved in another order; rename "
            f"them, or give them in the order that was saved"
        )
    return dict(zip(saved, numbers, strict=True))


def _names(groups: list[dict[str, Any]]) -> list[str]:
    """The names of all parameters, group by group; none where not all have one."""
    names = [name for group in groups for name in group.get("param_names", ())]
    return names if len(names) == sum(len(group["params"]) for group in groups) else []


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(repr, names[:_LISTED])) + more


def with_own_settings(optimizer: Owner, state_dict: dict[str, Any], convert: bool) -> dict[str, Any]:
    """A saved dict `in_place` with what the optimizer's groups keep of their own: rules, names, storage of state.

    Raises:
        ValueError: its state is stored otherwise and is not to be converted.
    """
    owner = type(optimizer).__name__
    groups = []
    for mine, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        names = optimizer.recipe.other_names  # a group may have been saved with one that was not read
        saved = {name: x for name, x in saved.items() if names.get(name) not in saved and name != "param_names"}
        rules = {name: mine[name] for name in optimizer.defaults if callable(mine[name])}
        stored = {name: mine[name] for name in optimizer.defaults if chooses_storage(name)}
        for name, value in stored.items():
            if not convert and plain(saved.get(name, value)) != plain(value):
                raise ValueError(
                    f"{owner}: the saved state has {name}={saved[name]!r}, but this optimizer has {value!r}; make it "
                    f"with {name}={saved[name]!r}, or have the state converted: load_state_dict(…, convert=True)"
                )
        groups.append({**optimizer.defaults, **rules, **saved, **stored})
    return {**state_dict, "param_groups": groups}


def chooses_storage(name: str) -> bool:
    """Whether a hyper-parameter chooses what a parameter or its state is stored in."""
    return name.endswith("dtype") or name == "stochastic_rounding"


def saved_state(optimizer: Owner, state_dict: dict[str, Any], merged: dict[str, Any], convert: bool) -> Saved:
    """The saved state of each parameter, once all of it is known to fit, as this optimizer stores it.

    The merged dict is the saved one `with_own_settings`. What was stored in another dtype is converted, with a warning,
    if that is asked for.

    Raises:
        ValueError: an entry is not one of this optimizer's, or has another shape or dtype.
        TypeError, ValueError: a saved hyper-parameter is not valid.
    """
    owner, ours = type(optimizer).__name__, optimizer.param_groups
    saved: Saved = {}
    converted: Counter[str] = Counter()
    for g, (theirs, group) in enumerate(zip(state_dict["param_groups"], merged["param_groups"], strict=True)):
        rules = {name: value for name, value in group.items() if callable(value)}
        as_saved = {**optimizer.defaults, **rules, **theirs}
        chain_then = replace(optimizer.chain(as_saved), rounding=TO_NEAREST)  # what was saved is only decoded
        chain_now = optimizer.chain(group)
        for i, (param, index) in enumerate(zip(ours[g]["params"], theirs["params"], strict=True)):
            if index not in state_dict["state"]:
                continue
            if is_lazy(param):
                raise ValueError(
                    f"{owner}: there is saved state of {name_of(ours[g], g, i)}, which has no shape yet; run the model "
                    f"once before it is loaded"
                )
            optimizer.check_parameter(name_of(ours[g], g, i), param)
            then, now = chain_at(chain_then, ours, g, i), chain_at(chain_now, ours, g, i)
            entries = dict(state_dict["state"].get(index, {}))
            _check_entries(owner, index, then, param, entries, convert)
            counter = entries.pop(codes.STEP, None)
            declared, arrays = (_without_counter(arrays_of(chain, param)) for chain in (then, now))
            entries = {key: value for key, value in entries.items() if key in declared}
            changed = [key for key in declared | arrays if arrays.get(key) != declared.get(key)]
            changed += [key for key, x in arrays.items() if _is_other(entries.get(key), x)]
            if entries and changed:
                converted.update([*dict.fromkeys(map(codes.slot_of, changed))])
                entries = _converted(then, now, param, entries)
            if (entries or counter is not None) and now.counts(tuple(param.shape), dtype_name(param.dtype)):
                arrays[codes.STEP] = count = codes.COUNT._replace(stacked=now.stacked)
                entries[codes.STEP] = zeros(count, param) if counter is None else counter
            saved[param] = {key: (arrays[key], value) for key, value in entries.items()}
    if converted:
        optimizer.warn_once(
            "the saved state is converted to what this optimizer stores it in: "
            + ", ".join(f"{name} of {count} parameters" for name, count in converted.items())
        )
    return saved


def _check_entries(
    owner: str, index: Any, chain: Chain, param: Tensor, entries: Mapping[str, Any], convert: bool
) -> None:
    """Raises a ValueError where a parameter's saved arrays are not those that the chain kept."""
    shape, arrays, names = tuple(param.shape), arrays_of(chain, param), {t.name for t in chain} | {codes.STEP}
    for key in entries:
        if key not in arrays and key.partition(".")[0] not in names:
            raise ValueError(
                f"{owner}: the saved state of parameter {index} has {key!r}, which no transformation of "
                f"{owner} keeps ({', '.join(arrays) or 'it keeps none'}); was it saved by another optimizer?"
            )
    for key, value in entries.items():
        if key not in arrays:
            continue
        found, wanted = tuple(value.shape) if isinstance(value, Tensor) else None, arrays[key].shape(shape)
        if found != wanted:
            raise ValueError(
                f"{owner}: the saved {key!r} of parameter {index} has shape {found}, but a "
                f"parameter of shape {shape} keeps {wanted}"
            )
        are_real = value.is_floating_point() and stored_dtype(arrays[key]).is_floating_point
        if _is_other(value, arrays[key]) and not (convert and are_real):
            raise ValueError(
                f"{owner}: the saved {key!r} of parameter {index} is {dtype_name(value.dtype)}, but it is stored in "
                f"{arrays[key].dtype}; to have it converted, load_state_dict(…, convert=True)"
            )
    for slot in dict.fromkeys(map(codes.slot_of, arrays)):  # codes need what they stand for
        needed = [key for key in arrays if codes.slot_of(key) == slot]
        missing = [key for key in needed if key not in entries]
        is_uncounted = slot == codes.STEP and entries and any(t.counts for t in chain)
        if missing and (is_uncounted or len(missing) < len(needed)):
            raise ValueError(f"{owner}: the saved state of parameter {index} lacks {missing[0]!r}; it is damaged")


def _without_counter(arrays: dict[str, Stored]) -> dict[str, Stored]:
    return {key: stored for key, stored in arrays.items() if key != codes.STEP}


def _is_other(value: Tensor | None, stored: Stored) -> bool:
    return value is not None and value.dtype != stored_dtype(stored)


def _converted(then: Chain, now: Chain, param: Tensor, entries: Mapping[str, Tensor]) -> State:
    """The state as it is stored now, from how it was; of a DTensor each process converts its part."""
    dtype, name, shape = compute_dtype(param.dtype), dtype_name(param.dtype), tuple(param.shape)
    slots, arrays, n = now.slots(shape), arrays_of(then, param), now.stacked
    whole, places = local(param).shape, places_of(param) or []
    like = torch.zeros((), dtype=dtype, device=param.device).expand(whole[n:])
    state = {key: zeros(stored, param) for key, stored in _without_counter(arrays_of(now, param)).items()}
    parts = {key: local(x) for key, x in state.items()}
    counter = {codes.STEP: torch.zeros((), dtype=torch.int32, device=param.device)}  # noise as before the first step
    as_saved = {key: arrays[key]._replace(dtype=dtype_name(x.dtype)) for key, x in entries.items()}
    old_parts = {key: local(filled(as_saved[key], param, x)) for key, x in entries.items()}
    behind = [along[(0,) * n] for along in places[n:]] or None  # without the stack's axes
    for place in product(*map(range, whole[:n])) if like.numel() else ():
        at = tuple(int(along.flatten()[i]) for along, i in zip(places, place, strict=False)) or place
        storage_then, storage_now = (Storage(xp, chain.slice(at).rounding, like, name, behind) for chain in (then, now))
        old, new = ({key: x[place] for key, x in of.items()} for of in (old_parts, parts))
        for key, slot in then.slots(shape).items():
            if key in slots and key in entries:
                numbers = storage_then.decode(key, slot, old)
                for part, value in storage_now.encode(key, slots[key], numbers, counter).items():
                    new[part].copy_(value)
    return state
