"""Sparse gradients: a step that reads and writes only the rows which a gradient touches."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedbun.chain import Chain
from fusedbun.torch import namespace as xp
from fusedbun.torch.state import compute_dtype


def rows_chain(chain: Chain, name: str, grad: Tensor, owner: str) -> Chain:
    """The chain that steps the touched rows of a parameter.

    Raises:
        TypeError: the gradient is sparse in more than its rows, or a transformation needs every row.
    """
    advice = "use sparse=False in the embedding that makes it, or grad.to_dense()"
    if grad.sparse_dim() != 1:
        raise TypeError(
            f"the gradient of {name} is sparse along {grad.sparse_dim()} axes, but {owner} takes gradients that are "
            f"dense or whose rows are sparse; {advice}"
        )
    try:
        return chain.for_rows()
    except TypeError as error:
        raise TypeError(
            f"the gradient of {name} is sparse ({grad.layout}), but {owner} takes dense gradients: {error}; {advice}"
        ) from None


def left_out(chain: Chain) -> list[str]:
    """The transformations with a state of their own that sparse gradients go without."""
    return [t.name for t in chain if t.for_rows() is None and t.slots((1, 1))]


def places(rows: Tensor, values: Tensor) -> list[Tensor]:
    """The places along each axis of the values of some rows, as rounding's noise asks for them."""
    return [rows.to(torch.int32).reshape(-1, *[1] * (values.ndim - 1)), *xp.index(values, range(1, values.ndim))]


def touched(grad: Tensor) -> tuple[Tensor, Tensor]:
    """The touched rows, each once, and their gradients."""
    grad = grad.to(compute_dtype(grad.dtype)).coalesce()  # repeated rows are summed, which bfloat16 is too coarse for
    return grad.indices()[0], grad.values()
