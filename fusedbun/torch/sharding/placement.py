"""Where the parts of a sharded parameter and of its state are: what torch's DTensor says, as the drivers ask for it.

A state array is cut along an axis as its parameter is, where it has numbers along that axis, and repeated elsewhere.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fusedbun.storage.codes import BLOCK, Stored, slot_of
from fusedbun.torch import namespace

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import Placement


class Cut(NamedTuple):
    """How a parameter is cut.

    Args:
        shape: of this process's part.
        first: the place of its first element.
        groups: by axis that is cut, the process groups whose parts make the whole axis.
    """

    shape: tuple[int, ...]
    first: tuple[int, ...]
    groups: Mapping[int, tuple[ProcessGroup, ...]]


def is_sharded(x: Tensor | None) -> bool:
    """Whether it is a DTensor, whose module is slow to import: where it is not, there are none."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(x, tensors.DTensor)


def local(x: Tensor) -> Tensor:
    """This process's part of a tensor, which shares its memory, once what it waits for has come; of a plain one all."""
    if not is_sharded(x):
        return x
    part = x.to_local()  # type: ignore[attr-defined]
    waiting = sys.modules.get("torch.distributed._functional_collectives")
    found: Tensor = part.wait() if waiting and isinstance(part, waiting.AsyncCollectiveTensor) else part
    return found


def cut(param: Any) -> Cut:
    """How a DTensor is cut."""
    mesh, shape, first = param.device_mesh, list(param.shape), [0] * param.ndim
    coordinate = mesh.get_coordinate()
    groups: dict[int, tuple[ProcessGroup, ...]] = {}
    for dim in _order(param.placements):
        axis, parts = param.placements[dim].dim % param.ndim, mesh.size(dim)
        longest = -(-shape[axis] // parts)  # as torch.chunk cuts
        before = min(coordinate[dim] * longest, shape[axis])
        shape[axis], first[axis] = min(longest, shape[axis] - before), first[axis] + before
    for dim, placement in enumerate(param.placements):
        if _is_shard(placement) and mesh.size(dim) > 1:
            axis = placement.dim % param.ndim
            groups[axis] = (*groups.get(axis, ()), mesh.get_group(dim))
    return Cut(tuple(shape), tuple(first), groups)


def _order(placements: Sequence[Any]) -> list[int]:
    """The dimensions of a mesh that cut a tensor, in the order in which they do.

    FSDP cuts what tensor parallelism has cut already, though its dimension comes first: torch marks it with a
    split factor, the number of parts that are there before it.
    """
    shards = [dim for dim, p in enumerate(placements) if _is_shard(p)]
    marked = [dim for dim in shards if hasattr(placements[dim], "split_factor")]
    return [*(dim for dim in shards if dim not in marked), *reversed(marked)]


def places_of(param: Tensor) -> list[Tensor] | None:
    """The places of this process's elements along each axis, as rounding's noise asks for them; None: all are here."""
    if not is_sharded(param):
        return None
    first = cut(param).first
    return [at + start for at, start in zip(namespace.index(local(param), range(param.ndim)), first, strict=True)]


def check_placement(owner: str, name: str, param: Any, arrays: Mapping[str, Stored]) -> None:
    """Raises a ValueError where a DTensor cannot be stepped part by part.

    Args:
        owner: the optimizer's name.
        name: what a message calls the parameter.
        param: the parameter.
        arrays: its state's arrays.
    """
    if odd := [p for dim, p in enumerate(param.placements) if not (p.is_replicate() or _is_in_order(param, dim))]:
        raise ValueError(
            f"{owner}: {name} is placed as {odd[0]}, but parameters must be replicated or sharded in one piece each; "
            f"redistribute it before the optimizer is made"
        )
    if cut(param).shape != tuple(local(param).shape):
        raise ValueError(
            f"{owner}: this process holds a part of {name} of shape {tuple(local(param).shape)}, but by its placements "
            f"{param.placements} it has {cut(param).shape} of {tuple(param.shape)}; make it with distribute_tensor"
        )
    coded = [slot_of(key) for key, stored in arrays.items() if stored.is_by_blocks]
    if coded and not _keeps_blocks(param):
        raise ValueError(
            f"{owner}: {coded[0]!r} of {name} is kept in codes that {BLOCK} numbers of a row share an exponent of, but "
            f"{param.placements} cuts its shape {tuple(param.shape)} within them; shard it along its first axis, or "
            f"keep the moment in bfloat16"
        )


def zeros_like_parts(stored: Stored, param: Any, dtype: torch.dtype) -> Tensor:
    """A state array of a DTensor at its start; an array of no axes is a plain tensor, as in torch's own optimizers."""
    from torch.distributed.tensor import DTensor

    shape = stored.shape(tuple(param.shape))
    if not stored.axes:
        return torch.zeros(shape, dtype=dtype, device=param.device)
    part = param.to_local()
    if stored.is_full(param.ndim):
        zeros = torch.zeros_like(part, dtype=dtype, requires_grad=False)
    else:
        zeros = torch.zeros(stored.shape(tuple(part.shape)), dtype=dtype, device=part.device)
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        zeros, param.device_mesh, placements(stored, param), run_check=False, shape=torch.Size(shape), stride=strides
    )


def placements(stored: Stored, param: Any) -> tuple[Placement, ...]:
    """The placements of a state array of a DTensor."""
    from torch.distributed.tensor import Replicate

    return tuple(p if _is_shard(p) and p.dim % param.ndim in stored.axes else Replicate() for p in param.placements)


def put(target: Tensor, value: Tensor) -> Tensor:
    """Writes a state array's numbers, given as a DTensor or whole, to its place, and returns that."""
    if not is_sharded(target):
        whole: Tensor = value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined]
        return target.copy_(whole.detach())
    if is_sharded(value):
        return target.copy_(value.detach())
    at = cut(target)
    part = value.detach()[tuple(slice(start, start + n) for start, n in zip(at.first, at.shape, strict=True))]
    local(target).copy_(part)
    return target


def _is_shard(placement: Any) -> bool:
    return hasattr(placement, "dim") and not placement.is_partial()


def _is_in_order(param: Any, dim: int) -> bool:
    """Whether a dimension of the mesh cuts a DTensor into pieces that lie together."""
    p, later = param.placements[dim], range(dim + 1, len(param.placements))
    if not _is_shard(p):
        return False
    cut_before = [k for k in later if _is_shard(param.placements[k]) and param.placements[k].dim == p.dim]
    parts = math.prod(param.device_mesh.size(k) for k in cut_before)
    return bool(getattr(p, "split_factor", parts) == parts)


def _keeps_blocks(param: Any) -> bool:
    """Whether no block of a row is cut: parts of an axis behind the leading one are whole blocks, and all as long."""
    inner = [dim for dim, p in enumerate(param.placements) if _is_shard(p) and p.dim % param.ndim]
    cut_within = [dim for dim in inner if param.device_mesh.size(dim) > 1]
    parts = math.prod(param.device_mesh.size(dim) for dim in cut_within)
    behind = {param.placements[dim].dim % param.ndim for dim in cut_within}
    whole = param.shape[1] % parts == 0 and math.prod(param.shape[1:]) % (parts * BLOCK) == 0
    return not behind or (behind == {1} and whole)
