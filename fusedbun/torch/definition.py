"""The definition run by torch: a chain's rules one after the other, a whole parameter at a time, its state in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product

import torch
from torch import Tensor

from fusedbun.chain import Chain, step
from fusedbun.storage.codes import STEP
from fusedbun.storage.storage import Storage
from fusedbun.torch import namespace as xp
from fusedbun.torch.implementation import Implementation
from fusedbun.torch.leaf import Arguments, Leaf
from fusedbun.torch.state import State, compute_dtype, dtype_name
from fusedbun.transform import State as Stored


class Definition(Implementation):
    """The rules as they are written; it serves everything."""

    name = "definition"

    def step(self, leaves: Sequence[Leaf]) -> None:
        step_leaves(leaf.arguments for leaf in leaves)


def step_leaves(leaves: Iterable[Arguments]) -> None:
    """One step of each of these parameters, one after the other."""
    for arguments in leaves:
        step_leaf(*arguments)


def step_leaf(
    chain: Chain,
    lr: float | Tensor,
    maximize: bool,
    param: Tensor,
    grad: Tensor,
    state: State,
    rows: Tensor | None = None,
) -> None:
    """One step of one parameter: computed in `compute_dtype`, rounded once when the parameter is written.

    Of a stack every slice is stepped as a parameter of its own. So are, of a sparse gradient, the rows that it touches:
    `rows` says which they are.
    """
    if not param.numel():
        return
    if chain.stacked:
        for place in product(*map(range, param.shape[: chain.stacked])):
            of_slice = {key: x[place] for key, x in state.items()}
            step_leaf(chain.slice(place), lr, maximize, param.detach()[place], grad[place], of_slice)
        return
    if grad.is_sparse:
        rows, values = touched_rows(grad)
        by_row = {key: x for key, x in state.items() if x.shape[0] == param.shape[0] and key != STEP}
        of_rows = state | {key: x[rows] for key, x in by_row.items()}
        part = param[rows]
        step_leaf(chain, lr, maximize, part, values, of_rows, rows)
        for whole, new in ((param, part), *((x, of_rows[key]) for key, x in by_row.items())):
            whole.index_copy_(0, rows, new)
        return
    dtype = compute_dtype(param.dtype)
    p = param.to(dtype)
    places = None
    if rows is not None:
        places = [rows.to(torch.int32).reshape(-1, *[1] * (p.ndim - 1)), *xp.index(p, range(1, p.ndim))]
    storage = InPlace(xp, chain.rounding, p, dtype_name(param.dtype), places)
    p, _ = step(chain, storage, lr, p, -grad.to(dtype) if maximize else grad.to(dtype), state)
    if p is not param:
        param.copy_(p)


def touched_rows(grad: Tensor) -> tuple[Tensor, Tensor]:
    """The touched rows, each once, and their gradients."""
    grad = grad.to(compute_dtype(grad.dtype)).coalesce()  # repeated rows are summed, which bfloat16 is too coarse for
    return grad.indices()[0], grad.values()


class InPlace(Storage):
    """Writes to the parameter and its state, so that the memory of what is new is free at once."""

    def commit(self, stored: Stored, changed: Stored) -> Stored:
        for key, value in changed.items():
            stored[key].copy_(value)
        return stored

    def subtract(self, param: Tensor, change: Tensor) -> Tensor:
        return param.sub_(change)
