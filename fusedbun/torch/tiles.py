"""Leaves that are stepped block by block with eager torch, on any device: what serves where there is no kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusedbun.chain import PARAM
from fusedbun.compiler.cpp.native import structure
from fusedbun.compiler.tiles import Tiles, schedule_for
from fusedbun.compiler.trace import GRAD, evaluate, hyperparameters
from fusedbun.torch import namespace
from fusedbun.torch.definition import Leaf
from fusedbun.torch.state import compute_dtype, name_of_dtype

_BLOCKS: dict[Any, Tiles] = {}  # by what decides the plan


def find(leaf: Leaf) -> Tiles:
    """The plan of a dense leaf; raises an UnplannableError where there is none."""
    shape, strides = tuple(leaf.param.shape), leaf.param.stride()
    dtype = name_of_dtype(leaf.param.dtype)
    key = (structure(leaf.chain), shape, strides, leaf.maximize, dtype)
    if key not in _BLOCKS:
        _BLOCKS[key] = Tiles(schedule_for(leaf.chain, shape, strides, leaf.maximize, dtype), namespace)
    return _BLOCKS[key]


def step_leaf(leaf: Leaf, blocks: Tiles) -> None:
    """One step of one parameter."""
    program = blocks.schedule.program
    values = hyperparameters(program, leaf.chain, leaf.lr)
    xp = namespace if any(isinstance(value, Tensor) for value in values.values()) else None
    scalars = evaluate(program.scalars, values, xp)
    blocks.run(scalars, {PARAM: leaf.param, GRAD: leaf.grad, **leaf.state}, compute_dtype(leaf.param.dtype))
