"""Metrics of a torch step, recorded while the gradient is still there, and their reduction over processes."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusedbun import metrics
from fusedbun.storage import codes
from fusedbun.torch import namespace as xp
from fusedbun.torch.leaf import Leaf
from fusedbun.torch.sharding.placement import local
from fusedbun.torch.state import compute_dtype, dtype_name
from fusedbun.transform import Slot

FUNCTIONS = metrics.functions(xp)


def record(before: Tensor, leaf: Leaf) -> metrics.Products:
    """The inner products of a parameter's step, over this process's shard of it.

    Of its state after the step a slot named `moment` is its moment, of whose codes the numbers are taken.
    """
    param, grad, dtype = leaf.param, leaf.grad, compute_dtype(leaf.param.dtype)
    vectors = {"param": param, "grad": grad.to_dense() if grad.is_sparse else grad}
    for key, slot in metrics.moments(leaf.chain.slots(tuple(param.shape))).items():
        vectors["moment"] = decoded(key, slot, leaf)
    vectors = {name: local(vector).to(dtype) for name, vector in vectors.items()}
    vectors["update"] = local(before).to(dtype) - vectors["param"]
    return {pair: x.reshape(()) for pair, x in metrics.inner_products(xp, vectors).items()}


def decoded(key: str, slot: Slot, leaf: Leaf) -> Tensor:
    """The numbers of a slot, for this process's shard of the parameter."""
    code, shape, n = codes.code_of(slot, dtype_name(leaf.param.dtype)), local(leaf.param).shape, leaf.chain.stacked
    parts = {part: local(leaf.state[key + part]) for part in code.arrays(slot.axes)}
    if not leaf.param.numel() or 0 in shape:
        return torch.zeros(shape)
    slices = [
        code.decode(xp, {part: x[place] for part, x in parts.items()}, shape[n:], compute_dtype(leaf.param.dtype))
        for place in product(*map(range, shape[:n]))
    ]
    return torch.stack(slices).reshape(shape)


def to_products(reported: dict[str, Any]) -> dict[str, Any]:
    """Reported metrics as what can be summed over processes: squared norms, and inner products for cosines."""
    summable = dict(reported)
    for key, value in reported.items():
        metric, name = split(key)
        if metric.startswith("l2_norm"):
            summable[key] = value * value
        elif metric.startswith("cosine"):
            a, b = metrics.needs(metric)[0]
            summable[key] = value * reported[f"l2_norm/{a}/{name}"] * reported[f"l2_norm/{b}/{name}"]
    return summable


def from_products(summable: dict[str, Any]) -> dict[str, Any]:
    """Metrics from the sums over all processes of what `to_products` gives; in one message where there are several."""
    keys = [key for key in summable if split(key)[0].startswith(("l2_norm", "cosine"))]
    sums = torch.stack([torch.as_tensor(summable[key]) for key in keys]) if keys else torch.empty(0)
    if keys and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)
    total = dict(zip(keys, sums, strict=True))
    reduced = dict(summable)
    for key in keys:
        metric, name = split(key)
        a, b = metrics.needs(metric)[0]
        products = {(a, b): total[key], **{(v, v): total[f"l2_norm/{v}/{name}"] for v in (a, b)}}
        reduced[key] = FUNCTIONS[metric](products)
    return reduced


def split(key: str) -> tuple[str, str]:
    """A key's metric and the name of its parameter, which may have slashes of its own."""
    kind, vectors, *name = key.split("/")
    return f"{kind}/{vectors}", "/".join(name)
