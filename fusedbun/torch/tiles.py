"""Leaves that are stepped block by block with eager torch, on any device: what serves where there is no kernel."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fusedbun.compiler.cpp.native import structure
from fusedbun.compiler.tiles import Blocks, plan
from fusedbun.compiler.trace import GRAD, evaluate, hyperparameters
from fusedbun.storage.rounding import PARAM
from fusedbun.torch import namespace
from fusedbun.torch.definition import Leaf
from fusedbun.torch.state import compute_dtype, name_of_dtype

_BLOCKS: dict[Any, Blocks] = {}  # by what decides the plan


def find(leaf: Leaf) -> Blocks:
    """The plan of a dense leaf; raises an UnplannableError where there is none."""
    shape, strides = tuple(leaf.param.shape), leaf.param.stride()
    dtype = name_of_dtype(leaf.param.dtype)
    key = (structure(leaf.chain), shape, strides, leaf.maximize, dtype)
    if key not in _BLOCKS:
        _BLOCKS[key] = Blocks(plan(leaf.chain, shape, strides, leaf.maximize, dtype), namespace)
    return _BLOCKS[key]


def step_leaf(leaf: Leaf, blocks: Blocks) -> None:
    """One step of one parameter."""
    program = blocks.schedule.program
    values = hyperparameters(program, leaf.chain, leaf.lr)
    xp: Any = namespace if any(isinstance(value, Tensor) for value in values.values()) else math
    scalars = evaluate(program.scalars, values, xp)
    blocks.run(scalars, {PARAM: leaf.param, GRAD: leaf.grad, **leaf.state}, compute_dtype(leaf.param.dtype))
