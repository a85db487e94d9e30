"""Loading a torch `state_dict`: checked as a whole before anything changes, and kept in its declared precision.

torch casts every floating-point state tensor to the parameter's dtype, which would round the float32 state of a
bfloat16 parameter. Here a state tensor gets the dtype that is declared for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedbun.optim.checks import chain_at
from fusedbun.optim.state import State, name_of_dtype, zeros

if TYPE_CHECKING:
    from fusedbun.optim.driver import TransformOptimizer

Saved = dict[Tensor, Mapping[str, Tensor]]


def without_rules(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Leaves the rules among the hyper-parameters out of a dict that `state_dict` is about to return."""
    for group in state_dict["param_groups"]:
        for name in optimizer.defaults:
            if callable(group.get(name)):
                del group[name]


def with_rules(optimizer: TransformOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A saved dict with the rules that the optimizer's groups have where the saved ones have nothing.

    Raises:
        ValueError: it is no optimizer's state, or its groups are of other sizes.
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
    rules = [{name: group[name] for name in optimizer.defaults if callable(group[name])} for group in ours]
    return {**state_dict, "param_groups": [{**mine, **saved} for mine, saved in zip(rules, theirs, strict=True)]}


def saved_state(optimizer: TransformOptimizer, state_dict: Mapping[str, Any]) -> Saved:
    """The saved state of each parameter, once all of it is known to fit.

    Raises:
        ValueError: an entry is not one of this optimizer's or has another shape.
        TypeError, ValueError: a saved hyper-parameter is not valid.
    """
    owner = type(optimizer).__name__
    saved: Saved = {}
    ours, theirs = optimizer.param_groups, state_dict["param_groups"]
    for g, (group, saved_group) in enumerate(zip(ours, theirs, strict=True)):
        chain = optimizer.chain({**optimizer.defaults, **saved_group})
        names = {t.name for t in chain}
        for i, (param, index) in enumerate(zip(group["params"], saved_group["params"], strict=True)):
            entries = state_dict["state"].get(index, {})
            arrays = chain_at(chain, ours, g, i).arrays(tuple(param.shape), name_of_dtype(param.dtype))
            for key, value in entries.items():
                if key.partition(".")[0] not in names:
                    raise ValueError(
                        f"{owner}: the saved state of parameter {index} has {key!r}, which no transformation of "
                        f"{owner} keeps ({', '.join(arrays) or 'it keeps none'}); was it saved by another optimizer?"
                    )
                found = tuple(value.shape) if isinstance(value, Tensor) else None
                if key in arrays and found != arrays[key].shape(tuple(param.shape)):
                    raise ValueError(
                        f"{owner}: the saved {key!r} of parameter {index} has shape {found}, but a "
                        f"parameter of shape {tuple(param.shape)} keeps {arrays[key].shape(tuple(param.shape))}"
                    )
            saved[param] = {key: value for key, value in entries.items() if key in arrays}
    return saved


def restore(optimizer: TransformOptimizer, saved: Saved) -> None:
    """Puts copies of the saved state in place, each laid out as its slot's start: device, dtype and strides."""
    for g, group in enumerate(optimizer.param_groups):
        chain = optimizer.chain(group)
        for i, param in enumerate(group["params"]):
            if param in optimizer.state:
                here = chain_at(chain, optimizer.param_groups, g, i)
                arrays = here.arrays(tuple(param.shape), name_of_dtype(param.dtype))
                state: State = {
                    key: zeros(arrays[key], param).copy_(value.detach()) for key, value in saved[param].items()
                }
                optimizer.state[param] = state
