"""A parameter's state in torch, made from the arrays that its chain declares."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusedbun.chain import Chain
from fusedbun.storage import codes
from fusedbun.storage.codes import Stored
from fusedbun.torch.sharding.placement import is_sharded, local, of_parts, put

State = dict[str, Tensor]  # by `<transformation>.<slot>` and what its code appends (`fusedbun.storage.codes`)


def arrays_of(chain: Chain, param: Tensor) -> dict[str, Stored]:
    """The arrays that the chain declares for a parameter."""
    return chain.arrays(tuple(param.shape), dtype_name(param.dtype))


def update_state(states: defaultdict[Tensor, Any], param: Tensor, arrays: Mapping[str, Stored]) -> State:
    """Makes a parameter's state hold exactly these arrays, and returns it: new ones start at zero, others are freed."""
    state: State = states[param]
    for key in state.keys() - arrays.keys():
        del state[key]
    for key, stored in arrays.items():
        if key not in state:
            state[key] = zeros(stored, param)
    return state


def zeros(stored: Stored, param: Tensor) -> Tensor:
    """The array at its start; one of the parameter's shape has the parameter's strides.

    Of a DTensor an array is one too; but one of no axes is a plain tensor, as in torch's own optimizers.
    """
    dtype = stored_dtype(stored)
    if is_sharded(param) and stored.along:
        return of_parts(zeros(stored, local(param)), stored, param)
    if stored.is_full(param.ndim) and not is_sharded(param):
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
    return torch.zeros(stored.shape(tuple(param.shape)), dtype=dtype, device=param.device)


def filled(stored: Stored, param: Tensor, numbers: Tensor) -> Tensor:
    """The array with these numbers, laid out as at its start: its device, dtype and strides."""
    return put(zeros(stored, param), numbers)


def stored_dtype(stored: Stored) -> torch.dtype:
    """torch's own for the dtype of an array."""
    dtype: torch.dtype = getattr(torch, stored.dtype)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name, without torch's in front."""
    return str(dtype).removeprefix("torch.")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a parameter of this dtype is stepped in."""
    computed: torch.dtype = getattr(torch, codes.computed_in(dtype_name(dtype)))
    return computed
