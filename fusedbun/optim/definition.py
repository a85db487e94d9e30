"""The definition run by torch: a chain's rules one after the other, a whole parameter at a time, its state in place."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedbun import codes
from fusedbun.chain import Chain, own
from fusedbun.hyper import plain
from fusedbun.optim import namespace as xp
from fusedbun.optim import sparse
from fusedbun.optim.state import State, compute_dtype
from fusedbun.transform import Signal, Transform


class Leaf(NamedTuple):
    """A parameter about to be stepped, and what it is stepped with; its state by `<transformation>.<slot>`."""

    chain: Chain
    lr: float | Tensor
    maximize: bool
    param: Tensor
    grad: Tensor
    state: State


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
    chain, lr, maximize, param, grad, state = leaf
    if not param.numel():
        return
    if grad.is_sparse:
        rows, values = sparse.touched(grad)
        part = Leaf(chain, lr, maximize, param[rows], values, {key: stored[rows] for key, stored in state.items()})
        step_leaf(part)
        for whole, new in ((param, part.param), *((state[key], part.state[key]) for key in state)):
            whole.index_copy_(0, rows, new)
        return
    dtype = compute_dtype(param.dtype)
    p, g = param.to(dtype), grad.to(dtype)
    signal = Signal(-g if maximize else g)
    for transform in chain:
        signal = advance(transform, signal, state, p)
    p -= lr * signal.update
    if p is not param:
        param.copy_(p)


def advance(transform: Transform, signal: Signal, state: State, p: Tensor) -> Signal:
    """Runs one transformation and commits its state in place, so that the new state's memory is free on return."""
    slots, stored = transform.slots(tuple(p.shape)), own(transform, state)
    before = {name: codes.decode(xp, slot, stored[name], p.dtype) for name, slot in slots.items()}
    signal, after = transform.update(xp, signal, before, p)
    for name, slot in slots.items():
        stored[name].copy_(codes.encode(xp, slot, after[name], stored[name].dtype))
    return signal
