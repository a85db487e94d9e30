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


def chain_at(chain: Chain, groups: Sequence[Mapping[str, Any]], g: int, i: int) -> Chain:
    """The chain of the param group `g` for its parameter `i`.

    Where parameters have no names, their place among all decides the noise of their rounding.
    """
    param, names = groups[g]["params"][i], groups[g].get("param_names")
    if names:
        return chain.at(tuple(names[i].split(".")), param)
    return chain.at((), param, str(sum(len(group["params"]) for group in groups[:g]) + i))


def name_of(group: Mapping[str, Any], g: int, i: int) -> str:
    """What a message calls the parameter `i` of a param group, which is number `g`."""
    names = group.get("param_names")
    return f"parameter {names[i]!r}" if names else f"parameter {i} of group {g}"


def check_gradient(owner: str, name: str, param: Tensor, grad: Tensor) -> None:
    """Raises a TypeError or ValueError for a gradient that does not fit its parameter."""
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

    The arrays are those that the chain, which steps the parameter, declares for it.
    """
    shape = tuple(param.shape)
    for key in [key for key in state if key in arrays]:
        kept, declared = state[key], arrays[key]
        if kept.shape != declared.shape(shape):
            raise ValueError(
                f"the state {key!r} of {name} has shape {tuple(kept.shape)}, but a parameter of shape {shape} keeps "
                f"{declared.shape(shape)}; its shape has changed, so delete its entry of the optimizer's state"
            )
        if kept.dtype != stored_dtype(declared):
            raise ValueError(
                f"the state {key!r} of {name} is {dtype_name(kept.dtype)}, but {declared.dtype} is stored now; "
                f"what it is stored in must not change in a run: load its state_dict into a new optimizer with "
                f"convert=True"
            )
    for transform in chain:
        there, needed = entries_of(transform, state).keys(), entries_of(transform, arrays).keys()
        if there and needed and there != needed:
            raise ValueError(
                f"the state of {name} has {', '.join(there)} for {transform.name}, but this step needs "
                f"{', '.join(needed)}; a parameter's gradients must be all dense or all sparse, and what chooses its "
                f"state must not change; delete its entry of the optimizer's state to begin again"
            )


def warn_user(message: str) -> None:
    """Warns at the line that called into torch or this package."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("fusedbun", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
