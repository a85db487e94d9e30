"""Leaves that are stepped block by block with eager torch, on any device: what serves where there is no kernel."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fusedbun.optim import namespace
from fusedbun.optim.definition import Leaf
from fusedbun.optim.state import compute_dtype
from fusedbun.plan.blocks import Blocks, plan
from fusedbun.plan.native import structure
from fusedbun.plan.trace import GRAD, PARAM, evaluate, hyperparameters

_BLOCKS: dict[Any, Blocks] = {}  # by what decides the plan


def find(leaf: Leaf) -> Blocks:
    """The plan of a dense leaf; raises an UnplannableError where there is none."""
    shape, strides = tuple(leaf.param.shape), leaf.param.stride()
    key = (structure(leaf.chain), shape, strides, leaf.maximize)
    if key not in _BLOCKS:
        _BLOCKS[key] = Blocks(plan(leaf.chain, shape, strides, leaf.maximize), namespace)
    return _BLOCKS[key]


def step_leaf(leaf: Leaf, blocks: Blocks) -> None:
    """One step of one parameter."""
    values = hyperparameters(leaf.chain, leaf.lr)
    xp: Any = namespace if any(isinstance(value, Tensor) for value in values.values()) else math
    scalars = evaluate(blocks.schedule.program.scalars, values, xp)
    blocks.run(scalars, {PARAM: leaf.param, GRAD: leaf.grad, **leaf.state}, compute_dtype(leaf.param.dtype))
