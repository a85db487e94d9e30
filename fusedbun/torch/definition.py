"""The definition run by torch: a chain's rules one after the other, a whole parameter at a time, its state in place."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedbun.chain import Chain, step
from fusedbun.hyper import plain
from fusedbun.storage.rounding import COUNTER
from fusedbun.storage.storage import Storage
from fusedbun.torch import namespace as xp
from fusedbun.torch import sparse
from fusedbun.torch.state import State, compute_dtype, name_of_dtype
from fusedbun.transform import State as Stored


class Leaf(NamedTuple):
    """A parameter about to be stepped, and what it is stepped with.

    Args:
        chain: the chain for it.
        lr: the learning rate.
        maximize: climb instead of descend.
        param: the parameter, or some of its rows.
        grad: its gradient.
        state: its state.
        rows: which of its rows these are; None: all.
    """

    chain: Chain
    lr: float | Tensor
    maximize: bool
    param: Tensor
    grad: Tensor
    state: State
    rows: Tensor | None = None


def learning_rate(lr: Any, compiling: bool) -> float | Tensor:
    """The learning rate as a step takes it: a tensor of one element loses its axes, to broadcast to any shape.

    Compiled code gets a tensor, for a graph specialises on a Python float.
    """
    if isinstance(lr, Tensor):
        return lr.reshape(())
    number: float = plain(lr)
    return torch.tensor(number, dtype=torch.float64) if compiling else number


def compilable(leaf: Leaf) -> bool:
    """Whether the leaf may be stepped in compiled code.

    torch 2.13 drops in-place changes of 0-d float64 tensors in code compiled for the CPU.
    """
    return bool(leaf.param.ndim) and not leaf.grad.is_sparse


def step_leaves(leaves: list[Leaf]) -> None:
    """One step of each of these parameters."""
    for leaf in leaves:
        step_leaf(leaf)


def step_leaf(leaf: Leaf) -> None:
    """One step of one parameter: computed in `compute_dtype`, rounded once when the parameter is written.

    Where the gradient is sparse the rows that it touches are stepped as a parameter of their own.
    """
    chain, lr, maximize, param, grad, state, rows = leaf
    if not param.numel():
        return
    if grad.is_sparse:
        step_rows(leaf)
        return
    dtype = compute_dtype(param.dtype)
    p = param.to(dtype)
    storage = InPlace(xp, chain.rounding, p, name_of_dtype(param.dtype), sparse.places(rows, p))
    p, _ = step(chain, storage, lr, p, -grad.to(dtype) if maximize else grad.to(dtype), state)
    if p is not param:
        param.copy_(p)


def step_rows(leaf: Leaf) -> None:
    """One step of the rows that a sparse gradient touches."""
    rows, values = sparse.touched(leaf.grad)
    by_row = {key: x for key, x in leaf.state.items() if x.shape[0] == leaf.param.shape[0] and key != COUNTER}
    state = leaf.state | {key: x[rows] for key, x in by_row.items()}
    part = leaf._replace(param=leaf.param[rows], grad=values, state=state, rows=rows)
    step_leaf(part)
    for whole, new in ((leaf.param, part.param), *((x, state[key]) for key, x in by_row.items())):
        whole.index_copy_(0, rows, new)


class InPlace(Storage):
    """Writes to the parameter and its state, so that the memory of what is new is free at once."""

    def commit(self, stored: Stored, changed: Stored) -> Stored:
        for key, value in changed.items():
            stored[key].copy_(value)
        return stored

    def subtract(self, param: Tensor, change: Tensor) -> Tensor:
        return param.sub_(change)
