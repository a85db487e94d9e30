"""Where the parts of a sharded parameter and of its state are: what torch's DTensor says, as the drivers ask for it.

A state array is cut along an axis as its parameter is, where it has numbers along that axis, and repeated elsewhere.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fusedbun.storage.codes import BLOCK, Stored, slot_of
from fusedbun.torch import namespace

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Cut(NamedTuple):
    """How a parameter is cut."""

    shape: tuple[int, ...]  # of this process's part
    first: tuple[int, ...]  # the place of its first element
    groups: Mapping[int, tuple[ProcessGroup, ...]]  # by axis that is cut, those whose parts make the whole axis

    def behind(self, stacked: int) -> Cut:
        """How the slices of a stack of so many axes are cut."""
        groups = {axis - stacked: group for axis, group in self.groups.items() if axis >= stacked}
        return Cut(self.shape[stacked:], self.first[stacked:], groups)


def is_sharded(x: Tensor | None) -> bool:
    """Whether it is a DTensor, whose module is slow to import: where it is not, there are none."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(x, tensors.DTensor)


def local(x: Tensor) -> Tensor:
    """This process's part of a tensor, which shares its memory, once what it waits for has come; of a plain one all."""
    if not is_sharded(x):
        return x
    part: Tensor = x.to_local()  # type: ignore[attr-defined]  # a DTensor's
    collectives = sys.modules.get("torch.distributed._functional_collectives")
    if collectives and isinstance(part, collectives.AsyncCollectiveTensor):
        part = part.wait()
    return part


def cut(param: Any) -> Cut:
    """How a DTensor is cut."""
    mesh, shape, first = param.device_mesh, list(param.shape), [0] * param.ndim
    coordinate = mesh.get_coordinate()
    groups: dict[int, tuple[ProcessGroup, ...]] = {}
    for dim, axis in _cuts(param):
        longest = -(-shape[axis] // mesh.size(dim))  # as torch.chunk cuts
        before = min(coordinate[dim] * longest, shape[axis])
        shape[axis], first[axis] = min(longest, shape[axis] - before), first[axis] + before
    for dim, axis in sorted(_cuts(param)):
        if mesh.size(dim) > 1:
            groups[axis] = (*groups.get(axis, ()), mesh.get_group(dim))
    return Cut(tuple(shape), tuple(first), groups)


def _cuts(param: Any) -> list[tuple[int, int]]:
    """The dimensions of its mesh that cut a DTensor, each with the axis that it cuts, in the order in which they do.

    FSDP cuts what tensor parallelism has cut already, though its dimension comes first: torch marks it with a
    split factor, the number of parts that are there before it.
    """
    axes = [(dim, p.dim % param.ndim) for dim, p in enumerate(param.placements) if _is_shard(p)]
    marked = [(dim, axis) for dim, axis in axes if hasattr(param.placements[dim], "split_factor")]
    return [*(at for at in axes if at not in marked), *reversed(marked)]


def places_of(param: Tensor) -> list[Tensor] | None:
    """The places of this process's elements along each axis, as rounding's noise asks for them; None: all are here."""
    if not is_sharded(param):
        return None
    first = cut(param).first
    return [at + start for at, start in zip(namespace.index(local(param), range(param.ndim)), first, strict=True)]


def check_placement(owner: str, name: str, param: Any, arrays: Mapping[str, Stored]) -> None:
    """Raises a ValueError where a DTensor, whose state has these arrays, cannot be stepped part by part."""
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
    coded = [slot_of(key) for key, stored in arrays.items() if stored.is_by_blocks and not _keeps_blocks(stored, param)]
    if coded:
        raise ValueError(
            f"{owner}: {coded[0]!r} of {name} is kept in codes that {BLOCK} numbers of a row share an exponent of, but "
            f"{param.placements} cuts its shape {tuple(param.shape)} within them; shard it along its first axis, or "
            f"keep the moment in bfloat16"
        )


def of_parts(part: Tensor, stored: Stored, param: Any) -> Tensor:
    """The state array of a DTensor that has this part here."""
    from torch.distributed.tensor import DTensor, Replicate

    shape, cut_dims = stored.shape(tuple(param.shape)), {dim for dim, axis in _cuts(param) if axis in stored.along}
    placements = [p if dim in cut_dims else Replicate() for dim, p in enumerate(param.placements)]
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part, param.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides
    )


def put(target: Tensor, value: Any) -> Tensor:
    """Writes a state array's numbers, given as a DTensor or whole, to its place, and returns that."""
    value = value.detach()
    if is_sharded(target) and not is_sharded(value):
        at = cut(target)
        local(target).copy_(value[tuple(slice(start, start + n) for start, n in zip(at.first, at.shape, strict=True))])
        return target
    return target.copy_(value.full_tensor() if is_sharded(value) and not is_sharded(target) else value)


def _is_shard(placement: Any) -> bool:
    return hasattr(placement, "dim") and not placement.is_partial()


def _is_in_order(param: Any, dim: int) -> bool:
    """Whether a dimension of the mesh cuts a DTensor into pieces that lie together."""
    p = param.placements[dim]
    if not _is_shard(p):
        return False
    cut_before = [k for k, axis in _cuts(param) if k > dim and axis == p.dim % param.ndim]
    parts = math.prod(map(param.device_mesh.size, cut_before))
    return bool(getattr(p, "split_factor", parts) == parts)


def _keeps_blocks(stored: Stored, param: Any) -> bool:
    """Whether no block of a row is cut: parts of an axis behind a row's are whole blocks, and all as long."""
    mesh, row = param.device_mesh, stored.stacked
    columns = param.shape[row + 1 :]
    behind = {dim: axis for dim, axis in _cuts(param) if axis > row and mesh.size(dim) > 1}
    parts = math.prod(map(mesh.size, behind))
    whole = columns[0] % parts == 0 and math.prod(columns) % (parts * BLOCK) == 0
    return not behind or ({*behind.values()} == {row + 1} and whole)
