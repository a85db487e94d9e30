"""Loading a torch `state_dict`: checked as a whole before anything changes, and kept in its declared precision.

torch casts every floating-point state tensor to the parameter's dtype, which would round the float32 state of a
bfloat16 parameter. Here a state tensor gets the dtype that is declared for it, and one that was saved in another is
converted when that is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fusedbun.chain import Chain
from fusedbun.hyper import plain
from fusedbun.storage import codes
from fusedbun.storage.codes import Stored
from fusedbun.storage.rounding import COUNTER, Rounding
from fusedbun.storage.storage import Storage
from fusedbun.torch import namespace as xp
from fusedbun.torch.checks import chain_at
from fusedbun.torch.leaf import Owner
from fusedbun.torch.sharding.placement import local, places_of, put
from fusedbun.torch.state import State, compute_dtype, dtype_name, stored_dtype, zeros
from fusedbun.transform import Shape, Slot

Saved = dict[Tensor, Mapping[str, Tensor]]


def without_rules(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Leaves the rules among the hyper-parameters out of a dict that `state_dict` is about to return."""
    for group in state_dict["param_groups"]:
        for name in optimizer.defaults:
            if callable(group.get(name)):
                del group[name]


def with_own(optimizer: Owner, state_dict: dict[str, Any], convert: bool) -> dict[str, Any]:
    """A saved dict with what the optimizer's groups keep of their own: rules, and what state is stored in.

    Raises:
        ValueError: it is no optimizer's state, its groups are of other sizes, or its state is stored otherwise and is
            not to be converted.
    """
    owner = type(optimizer).__name__
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            f"{owner}: an optimizer's saved state has the keys 'state' and 'param_groups', "
            f"but this one has {', '.join(map(repr, state_dict)) or 'none'}"
        )
    ours, theirs = optimizer.param_groups, state_dict["param_groups"]
    sizes = [[len(group["params"]) for group in groups] for groups in (theirs, ours)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{owner}: the saved param groups have {sizes[0]} parameters, but this optimizer's have {sizes[1]}; "
            f"make it with the same groups as the one that was saved"
        )
    groups = []
    for mine, saved in zip(ours, theirs, strict=True):
        rules = {name: mine[name] for name in optimizer.defaults if callable(mine[name])}
        stored = {name: mine[name] for name in optimizer.defaults if chooses_storage(name)}
        for name, value in stored.items():
            if not convert and plain(saved.get(name, value)) != plain(value):
                raise ValueError(
                    f"{owner}: the saved state has {name}={saved[name]!r}, but this optimizer has {value!r}; make it "
                    f"with {name}={saved[name]!r}, or have the state converted: load_state_dict(…, convert=True)"
                )
        groups.append({**rules, **saved, **stored})
    return {**state_dict, "param_groups": groups}


def chooses_storage(name: str) -> bool:
    """Whether a hyper-parameter chooses what a parameter or its state is stored in."""
    return name.endswith("dtype") or name == "stochastic_rounding"


def saved_state(optimizer: Owner, state_dict: Mapping[str, Any], convert: bool) -> Saved:
    """The saved state of each parameter, once all of it is known to fit, as this optimizer stores it.

    Args:
        optimizer: the optimizer.
        state_dict: the saved dict.
        convert: convert what was stored in another dtype, with a warning; otherwise it is an error.

    Raises:
        ValueError: an entry is not one of this optimizer's, or has another shape or dtype.
        TypeError, ValueError: a saved hyper-parameter is not valid.
    """
    converted: dict[str, int] = {}
    owner = type(optimizer).__name__
    saved: Saved = {}
    ours, theirs = optimizer.param_groups, state_dict["param_groups"]
    for g, (group, saved_group) in enumerate(zip(ours, theirs, strict=True)):
        rules = {name: value for name, value in group.items() if callable(value)}
        given = {**optimizer.defaults, **rules, **saved_group}
        was = replace(optimizer.chain(given), rounding=Rounding(seed=given["seed"]))
        chain = optimizer.chain(given | {name: group[name] for name in optimizer.defaults if chooses_storage(name)})
        names = {t.name for t in chain}
        for i, (param, index) in enumerate(zip(group["params"], saved_group["params"], strict=True)):
            entries, shape = dict(state_dict["state"].get(index, {})), tuple(param.shape)
            counted = {COUNTER: entries.pop(COUNTER)} if COUNTER in entries else {}
            dtype = dtype_name(param.dtype)
            before, now = chain_at(was, ours, g, i), chain_at(chain, ours, g, i)
            found, wanted = before.arrays(shape, dtype), now.arrays(shape, dtype)
            for key, value in entries.items():
                if key not in found and key.partition(".")[0] not in names:
                    raise ValueError(
                        f"{owner}: the saved state of parameter {index} has {key!r}, which no transformation of "
                        f"{owner} keeps ({', '.join(found) or 'it keeps none'}); was it saved by another optimizer?"
                    )
                if key in found:
                    _check(owner, index, key, value, found[key], shape, convert)
            entries = {key: value for key, value in entries.items() if key in found}
            _check_parts(owner, index, before.slots(shape), dtype, entries)
            if any(_is_other(entries[key], found[key]) for key in entries) or (
                entries and {key: x for key, x in wanted.items() if key != COUNTER} != found
            ):
                for name, slot in now.slots(shape).items():
                    parts = [name + part for part in codes.arrays(slot, dtype)]
                    if any(wanted[key] != found.get(key) or _is_other(entries.get(key), wanted[key]) for key in parts):
                        converted[name] = converted.get(name, 0) + 1
                entries = _converted(before, now, param, entries)
            saved[param] = entries | {key: value for key, value in counted.items() if key in wanted}
    if converted:
        optimizer.warn_once(
            "the saved state is converted to what this optimizer stores it in: "
            + ", ".join(f"{name} of {count} parameters" for name, count in converted.items())
        )
    return saved


def _is_other(value: Tensor | None, stored: Stored) -> bool:
    return value is not None and value.dtype != stored_dtype(stored)


def _check(owner: str, index: Any, key: str, value: Any, stored: Stored, shape: Shape, convert: bool) -> None:
    """Raises a ValueError where a saved array is not what was to be saved."""
    found = tuple(value.shape) if isinstance(value, Tensor) else None
    if found != stored.shape(shape):
        raise ValueError(
            f"{owner}: the saved {key!r} of parameter {index} has shape {found}, but a "
            f"parameter of shape {shape} keeps {stored.shape(shape)}"
        )
    dtype = stored_dtype(stored)
    if value.dtype != dtype and not (convert and value.is_floating_point() and dtype.is_floating_point):
        raise ValueError(
            f"{owner}: the saved {key!r} of parameter {index} is {dtype_name(value.dtype)}, but it is stored in "
            f"{stored.dtype}; to have it converted, load_state_dict(…, convert=True)"
        )


def _check_parts(owner: str, index: Any, slots: Mapping[str, Slot], dtype: str, entries: Mapping[str, Any]) -> None:
    """Raises a ValueError where codes were saved without what they stand for; a count of steps begins anew."""
    for name, slot in slots.items():
        needed = [name + part for part in codes.arrays(slot, dtype) if part != codes.STEP]
        missing = [key for key in needed if key not in entries]
        if 0 < len(missing) < len(needed):
            raise ValueError(f"{owner}: the saved state of parameter {index} lacks {missing[0]!r}; it is damaged")


def _converted(before: Chain, now: Chain, param: Tensor, entries: Mapping[str, Tensor]) -> State:
    """The state as it is stored now, from how it was; of a DTensor each process converts its part."""
    dtype, name, shape = compute_dtype(param.dtype), dtype_name(param.dtype), tuple(param.shape)
    like, places = torch.zeros((), dtype=dtype, device=param.device).expand(local(param).shape), places_of(param)
    was, will = (Storage(xp, chain.rounding, like, name, places) for chain in (before, now))
    slots, found = now.slots(shape), before.arrays(shape, name)
    state = {key: zeros(stored, param) for key, stored in now.arrays(shape, name).items() if key != COUNTER}
    parts = {key: local(x) for key, x in state.items()}
    kept = {}
    for key, value in entries.items():
        as_saved = found[key]._replace(dtype=dtype_name(value.dtype))
        kept[key] = local(put(zeros(as_saved, param), value))
    for key, slot in before.slots(shape).items():
        if key in slots and key in kept and like.numel():
            changed = will.encode(key, slots[key], was.decode(key, slot, kept), parts)
            for part, value in changed.items():
                parts[part].copy_(value)
    return state


def restore(optimizer: Owner, saved: Saved) -> None:
    """Puts copies of the saved state in place, each laid out as its slot's start: device, dtype and strides."""
    for g, group in enumerate(optimizer.param_groups):
        chain = optimizer.chain(group)
        for i, param in enumerate(group["params"]):
            if param in optimizer.state:
                here = chain_at(chain, optimizer.param_groups, g, i)
                arrays = here.arrays(tuple(param.shape), dtype_name(param.dtype))
                state: State = {key: put(zeros(arrays[key], param), value) for key, value in saved[param].items()}
                optimizer.state[param] = state
