"""What the torch driver refuses and warns of, and the names by which its messages call parameters."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedbun.chain import Chain, entries_of
from fusedbun.storage.codes import Stored
from fusedbun.torch.state import State, dtype_name, stored_dtype

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def path_of(group: Mapping[str, Any], index: int) -> tuple[str, ...]:
    """The names that lead to a parameter of a group; empty where it has none."""
    return tuple(group["param_names"][index].split(".")) if "param_names" in group else ()


def chain_at(chain: Chain, groups: Sequence[Mapping[str, Any]], g: int, i: int) -> Chain:
    """The chain of a param group for one of its parameters.

    Where parameters have no names, their place among all decides the noise of their rounding.

    Args:
        chain: the chain of group `g`.
        groups: all param groups.
        g: which of them.
        i: which of its parameters.
    """
    names = groups[g].get("param_names")
    name = names[i] if names else str(sum(len(group["params"]) for group in groups[:g]) + i)
    return chain.at(path_of(groups[g], i), groups[g]["params"][i], name)


def name_of(group: Mapping[str, Any], group_index: int, index: int) -> str:
    """What a message calls the parameter."""
    names = group.get("param_names")
    return f"parameter {names[index]!r}" if names else f"parameter {index} of group {group_index}"


def check_parameter(owner: str, name: str, param: Tensor) -> None:
    """Raises a TypeError for a parameter that is not made of real numbers."""
    if param.dtype not in FLOATING:
        raise TypeError(
            f"{name} is {param.dtype}, but {owner} steps real floating-point parameters only "
            f"({', '.join(map(str, FLOATING))}); a complex one can be given as torch.view_as_real(param)"
        )


def check_gradient(owner: str, name: str, param: Tensor) -> None:
    """Raises a TypeError or ValueError for a gradient that does not fit its parameter."""
    grad = param.grad
    assert grad is not None
    if grad.dtype not in FLOATING:
        raise TypeError(
            f"the gradient of {name} is {grad.dtype}, but {owner} takes real floating-point gradients: "
            f"{', '.join(map(str, FLOATING))}"
        )
    meshes = [getattr(x, "device_mesh", None) for x in (grad, param)]
    if meshes[0] != meshes[1]:
        raise ValueError(
            f"the gradient of {name} is on {meshes[0] or 'no mesh'}, but the parameter is on {meshes[1] or 'no mesh'}; "
            f"{owner} takes both as plain tensors, or both as DTensors on one mesh"
        )
    if grad.shape != param.shape:
        raise ValueError(
            f"the gradient of {name} has shape {tuple(grad.shape)}, but the parameter has {tuple(param.shape)}"
        )


def check_state(chain: Chain, name: str, param: Tensor, state: State, arrays: Mapping[str, Stored]) -> None:
    """Raises a ValueError where the state was kept for a parameter of another shape or for gradients of another kind.

    Args:
        chain: what steps the parameter.
        name: what a message calls it.
        param: the parameter.
        state: what is kept for it.
        arrays: what the chain declares for it.
    """
    shape = tuple(param.shape)
    for key, stored in state.items():
        if key not in arrays:
            continue
        if stored.shape != arrays[key].shape(shape):
            raise ValueError(
                f"the state {key!r} of {name} has shape {tuple(stored.shape)}, but a parameter of shape {shape} keeps "
                f"{arrays[key].shape(shape)}; its shape has changed, so delete its entry of the optimizer's state"
            )
        if stored.dtype != stored_dtype(arrays[key]):
            raise ValueError(
                f"the state {key!r} of {name} is {dtype_name(stored.dtype)}, but {arrays[key].dtype} is stored now; "
                f"what it is stored in must not change in a run: load its state_dict into a new optimizer with "
                f"convert=True"
            )
    for transform in chain:
        kept, wanted = entries_of(transform, state).keys(), entries_of(transform, arrays).keys()
        if kept and wanted and kept != wanted:
            raise ValueError(
                f"the state of {name} has {', '.join(kept)} for {transform.name}, but this step needs "
                f"{', '.join(wanted)}; a parameter's gradients must be all dense or all sparse, and what chooses its "
                f"state must not change; delete its entry of the optimizer's state to begin again"
            )


def warn_user(message: str) -> None:
    """Warns at the line that called into torch or this package."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("fusedbun", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
