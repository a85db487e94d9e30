"""Running a function in several processes that talk over gloo, and what the tests of sharded parameters share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor


def run_in_processes(count: int, function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """Calls `function(rank, *args)` in so many processes, and returns what each returned; an error in one is raised."""
    torch.multiprocessing.spawn(_in_a_process, (count, function, str(folder), args), nprocs=count)
    return [torch.load(folder / f"result {rank}", weights_only=False) for rank in range(count)]


def _in_a_process(rank: int, count: int, function: Callable[..., Any], folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/meet {function.__name__} {count}", count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    try:
        torch.save(function(rank, *args), f"{folder}/result {rank}")
    finally:
        dist.destroy_process_group()


def placed(x: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """A tensor that every process has, cut up without a word over the network."""
    return distribute_tensor(x, mesh, placements, src_data_rank=None)
