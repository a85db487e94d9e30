"""A step tile by tile with eager torch, on any device: what serves where there is no kernel."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain as joined
from typing import Any

from fusedbun.compiler import tiles
from fusedbun.compiler.cpp.native import structure
from fusedbun.compiler.trace import GRAD, evaluate, hyperparameters
from fusedbun.storage.rounding import PARAM
from fusedbun.torch import namespace
from fusedbun.torch.implementation import Implementation
from fusedbun.torch.leaf import Leaf
from fusedbun.torch.state import compute_dtype, dtype_name

_PREPARED: dict[Any, tiles.Tiles] = {}  # by what decides the schedule


class Tiles(Implementation):
    """The schedule of the kernel, run tile by tile with eager torch; it serves all dense tensors."""

    name = "tiles"

    def prepare(self, leaf: Leaf) -> tiles.Tiles:
        one = next(leaf.slices())
        shape, strides, maximize = tuple(one.param.shape), one.param.stride(), leaf.group.maximize
        dtype = dtype_name(leaf.param.dtype)
        key = (structure(one.chain), shape, strides, maximize, dtype)
        if key not in _PREPARED:
            _PREPARED[key] = tiles.Tiles(tiles.schedule_for(one.chain, shape, strides, maximize, dtype), namespace)
        return _PREPARED[key]

    def step(self, leaves: Sequence[Leaf]) -> None:
        xp: Any = namespace
        for leaf in joined.from_iterable(leaf.slices() for leaf in leaves):
            program = leaf.prepared.schedule.program
            numbers = evaluate(program.scalars, hyperparameters(program, leaf.chain, leaf.lr), xp)
            arrays = {PARAM: leaf.param, GRAD: leaf.grad, **leaf.state}
            leaf.prepared.run(numbers, arrays, compute_dtype(leaf.param.dtype))
