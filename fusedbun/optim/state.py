"""A parameter's state in torch, made from the slots that its chain declares."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fusedbun import codes
from fusedbun.transform import Slot

State = dict[str, Tensor]  # by `<transformation>.<slot>`


def follow(state: State, param: Tensor, slots: Mapping[str, Slot]) -> State:
    """Makes `state` hold exactly these slots: new ones start at zero, stale ones are freed."""
    for key in state.keys() - slots.keys():
        del state[key]
    for key, slot in slots.items():
        if key not in state:
            state[key] = zeros(slot, param)
    return state


def zeros(slot: Slot, param: Tensor) -> Tensor:
    """The slot at its start; a full-size one has the parameter's strides."""
    dtype = slot_dtype(slot, param)
    if len(slot.axes) == param.ndim:
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
    return torch.zeros(slot.shape(tuple(param.shape)), dtype=dtype, device=param.device)


def slot_dtype(slot: Slot, param: Tensor) -> torch.dtype:
    """The dtype in which the slot of this parameter is stored."""
    name = codes.storage_dtype(slot, str(compute_dtype(param.dtype)).removeprefix("torch."))
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, and float32 for every smaller one."""
    return torch.float64 if dtype == torch.float64 else torch.float32
