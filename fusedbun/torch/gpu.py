"""Runs a schedule on a GPU: the generated Triton, launched once for all leaves that share the program.

A launch is told by tables on the device where each leaf's arrays are, and which program has which stretch of which
leaf. So a step is a handful of launches however many leaves there are, it waits for nothing and allocates nothing: a
CUDA graph can capture it. On the CPU the same runs in Triton's interpreter, where `TRITON_INTERPRET=1` was set before
Triton was imported.
"""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate
from math import ceil, prod
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusedbun.compiler.schedule import Schedule
from fusedbun.compiler.trace import GRAD
from fusedbun.compiler.triton.module import emit, kernels
from fusedbun.compiler.triton.text import Table, numbers, words
from fusedbun.storage.rounding import PARAM
from fusedbun.torch.state import compute_dtype, dtype_name, stored_dtype

ALIGNED = 16  # every kept array starts at a multiple of so many numbers
WARPS = 8  # of a program: each thread has 8 elements of a tile, and registers enough for what is made of them


class Tile(NamedTuple):
    """How much of a leaf a program takes up at a time; powers of two."""

    rows: int
    columns: int


TILES = (Tile(512, 4), Tile(64, 32), Tile(32, 64))  # for leaves of few columns, and of more
TILE_OF_BLOCKS = Tile(32, 64)  # where columns share an exponent by 32
SMALL_TILE = Tile(32, 32)  # for what is not of full size


class Leaf(NamedTuple):
    """A parameter and its state."""

    param: Tensor
    slots: Mapping[str, Tensor]  # its state, by `<transformation>.<slot>`
    scalars: int = 0  # the row of the step's scalars that it is stepped with
    words: Mapping[str, int] = MappingProxyType({})  # by name, the program's hyper-parameters that are words


class GpuStep:
    """A step of one program on many leaves. Call it with the leaves' gradients.

    The first call compiles, and one with gradients at other addresses than the last copies these to the device. So take
    a step before a CUDA graph captures one, and leave the gradients where they are.

    Args:
        schedule: with tiles of rows.
        leaves: of one dtype, on one device, each dense in memory along the schedule's order of axes.
        scalars: on that device, in the dtype that is computed in: the values of `numbers(program)`, in a row for every
            set of hyper-parameters. The kernels read them: write to it, and the next step has other ones.

    Raises:
        ImportError: Triton is not installed.
        ValueError: the schedule's tiles are columns, or a leaf or the scalars do not suit it.
    """

    def __init__(self, schedule: Schedule, leaves: Sequence[Leaf], scalars: Tensor) -> None:
        _check(schedule, leaves, scalars)
        self._leaves, self._scalars = tuple(leaves), scalars
        self._order = schedule.program.graph.order
        self._table = Table(schedule)
        self._tiles = (TILE_OF_BLOCKS,) if self._table.is_coded else TILES
        self._rows = np.zeros(len(leaves), [(name, np.int64) for name in self._table.names])
        for leaf, row in zip(leaves, self._rows, strict=True):
            self._fill(leaf, row)
        self._workspace = self._reserve()
        self._rows_on_device = self._host_rows().to(scalars.device, copy=True)
        if find_spec("triton") is None:
            raise ImportError("kernels on a GPU need Triton, which torch for CUDA brings along; pip install triton")
        module = load(emit(schedule))
        self.launches = [x for k in kernels(schedule) for x in self._launches_of(k.work, getattr(module, k.name))]

    def __call__(self, grads: Sequence[Tensor]) -> None:
        """Steps every leaf with its gradient, which has its parameter's shape, layout in memory, dtype and device."""
        self._look_up(grads)
        language = import_module("triton.language")
        dtypes = [getattr(language, dtype_name(x.dtype)) for x in (self._leaves[0].param, self._scalars)]
        with torch.cuda.device(self._scalars.device if self._scalars.is_cuda else -1):
            for kernel, work, tile in self.launches:
                # Not fused, every operation is rounded as in the definition.
                options = {"num_warps": WARPS, "enable_fp_fusion": False}
                kernel[(len(work),)](self._rows_on_device, work, *dtypes, *tile, **options)

    def _look_up(self, grads: Sequence[Tensor]) -> None:
        """Puts the gradients' addresses into the table."""
        for (param, *_), grad in zip(self._leaves, grads, strict=True):
            kind, wanted = ((x.shape, x.stride(), x.dtype, x.device) for x in (grad, param))
            if kind != wanted:
                _check_array("the gradient", grad, _shape(param), param.dtype, param.device, self._order)
        addresses = [grad.data_ptr() for grad in grads]
        if np.array_equal(self._rows[GRAD], addresses):
            return
        on_gpu = self._scalars.is_cuda
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph captures a step whose gradients lie elsewhere than in the step before; keep them where "
                "they are with zero_grad(set_to_none=False), and take a step before the capture"
            )
        self._rows[GRAD] = addresses
        host = self._host_rows()
        self._rows_on_device.copy_(host.pin_memory() if on_gpu else host, non_blocking=True)

    def _host_rows(self) -> Tensor:
        """A copy of the table as a tensor."""
        return torch.from_numpy(self._rows.copy().view(np.int64).reshape(len(self._rows), -1))

    def _fill(self, leaf: Leaf, row: Any) -> None:
        """Writes a leaf's row of the table, but for what is not known yet."""
        shape, graph = _shape(leaf.param), self._table.graph
        R, C = (prod(shape[axis] for axis in axes) for axes in (graph.row, graph.columns))
        numbers = {f"n{axis}": n for axis, n in enumerate(shape)} | {"R": R, "C": C, "B": ceil(R / self._tile(C).rows)}
        arrays = {PARAM: leaf.param, "scalars": self._scalars[leaf.scalars], **leaf.slots}
        addresses = {name: array.data_ptr() for name, array in arrays.items()}
        for name, number in (numbers | addresses | dict(leaf.words)).items():
            row[name] = number

    def _reserve(self) -> Tensor:
        """A place for what is kept while a step runs; what is reduced is kept for every stretch."""
        temporary, by_stretch = self._table.temporary, {*self._table.parts.values()}
        lengths = [
            int(prod(row[f"n{axis}"] for axis in v.axes) * (row["B"] if name in by_stretch else 1))
            for row in self._rows
            for name, v in temporary.items()
        ]
        *starts, total = accumulate((ceil(n / ALIGNED) * ALIGNED for n in lengths), initial=0)
        workspace = torch.empty(total, dtype=self._scalars.dtype, device=self._scalars.device)
        addresses = workspace.data_ptr() + workspace.element_size() * np.array(starts, np.int64)
        for name, column in zip(temporary, addresses.reshape(len(self._rows), len(temporary)).T, strict=True):
            self._rows[name] = column
        return workspace

    def _tile(self, columns: int) -> Tile:
        """The tile for leaves of so many columns."""
        return next((tile for tile in self._tiles if columns <= tile.columns), self._tiles[-1])

    def _launches_of(self, work: str, kernel: Any) -> Iterator[tuple[Any, Tensor, Tile]]:
        """The launches of a kernel, with the leaf and the stretch of each program, and how large a stretch is.

        Leaves whose stretches are of other shapes have a launch of their own.
        """
        R, C, B = (self._rows[name] for name in "RCB")
        if work == "rows":
            counts = {tile: B * [self._tile(n) == tile for n in C] for tile in self._tiles}
        elif work == "elements":
            counts = {TILES[-1]: -(-R * C // prod(TILES[-1]))}
        elif work == "columns":
            counts = {SMALL_TILE: -(-C // SMALL_TILE.columns)}
        else:
            counts = {SMALL_TILE: np.ones_like(C)}
        for tile, count in counts.items():
            if count.any():
                leaves = np.repeat(np.arange(len(count)), count)
                stretches = np.arange(len(leaves)) - (np.cumsum(count) - count)[leaves]
                programs = torch.from_numpy(np.stack([leaves, stretches], axis=1).astype(np.int32))
                yield kernel, programs.to(self._scalars.device), tile


@cache
def load(source: str) -> ModuleType:
    """The module with this source, which Triton looks up among the lines of files."""
    name = f"triton_{hashlib.sha256(source.encode()).hexdigest()[:24]}"
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
    module = ModuleType(name)
    exec(compile(source, name, "exec"), vars(module))
    return module


def _shape(x: Tensor) -> tuple[int, ...]:
    """Its shape; a single number is traced as an array of one axis."""
    return tuple(x.shape) or (1,)


def _check(schedule: Schedule, leaves: Sequence[Leaf], scalars: Tensor) -> None:
    """Raises a ValueError for what the kernels would read or write wrongly."""
    program, order, device = schedule.program, schedule.program.graph.order, scalars.device
    dtype: torch.dtype = getattr(torch, program.dtype)
    shape, kind = (len(scalars), len(numbers(program))), compute_dtype(dtype)
    if scalars.shape != shape or scalars.dtype != kind or not scalars.is_contiguous():
        raise ValueError(
            f"the scalars must be a contiguous {kind} tensor with rows of {shape[1]}, but they are {scalars.dtype} of "
            f"shape {tuple(scalars.shape)}"
        )
    for leaf in leaves:
        sizes = _shape(leaf.param)
        if len(sizes) != len(order):
            raise ValueError(f"the schedule is for parameters of {len(order)} axes, but the parameter has {len(sizes)}")
        _check_array("the parameter", leaf.param, sizes, dtype, device, order)
        named = {"slots": (leaf.slots, program.arrays), "words": (leaf.words, [v.detail for v in words(program)])}
        for title, (found, wanted) in named.items():
            if {*found} != {*wanted}:
                raise ValueError(f"the {title} must be {sorted(wanted)}, but they are {sorted(found)}")
        for name, stored in program.arrays.items():
            axes = (0, 1, 2) if stored.is_by_blocks else order
            _check_array(name, leaf.slots[name], stored.shape(sizes), stored_dtype(stored), device, axes)
        if not 0 <= leaf.scalars < len(scalars):
            raise ValueError(f"a leaf has row {leaf.scalars} of the scalars, but there are {len(scalars)}")


def _check_array(
    name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, order: tuple[int, ...]
) -> None:
    if _shape(x) != shape or x.dtype != dtype or x.device != device:
        raise ValueError(
            f"{name} must be {dtype} of shape {shape} on {device}, but it is {x.dtype} of shape {tuple(x.shape)} "
            f"on {x.device}"
        )
    if x.ndim and not x.permute(order).is_contiguous():
        raise ValueError(
            f"{name} must be dense in memory along its axes {order}, but its strides are {x.stride()} for the shape "
            f"{shape}"
        )
