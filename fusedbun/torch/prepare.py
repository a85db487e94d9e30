"""What a step is prepared with: the chain of each param group and of each parameter, checked before anything changes.

What has not changed since the last step is not made again: the chain of a group while its hyper-parameters are the
same objects, and its rate while it is the same number.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import zip_longest
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from fusedbun.chain import Chain
from fusedbun.hyper import plain
from fusedbun.storage.codes import Stored
from fusedbun.torch import sparse
from fusedbun.torch.checks import chain_at, check_gradient, check_state, name_of
from fusedbun.torch.definition import Leaf, learning_rate
from fusedbun.torch.sharding.placement import check_placement, is_sharded
from fusedbun.torch.state import follow, name_of_dtype

if TYPE_CHECKING:
    from fusedbun.torch.driver import TransformOptimizer

Place = tuple[int, int]  # a group's, and a parameter's within it
MUTABLE = (Tensor, np.ndarray, list)  # hyper-parameters of these types may hold other numbers than they did


class Group(NamedTuple):
    """A param group as a step finds it.

    Args:
        entries: the group itself.
        params: its parameters.
        names: their names, if they have any.
        given: what its chain is made of.
        chain: what steps it; rules among its hyper-parameters are not yet asked.
        lr: its learning rate.
        rate: the learning rate as a number; None where it is on another device.
        maximize: climb instead of descend.
    """

    entries: Mapping[str, Any]
    params: tuple[Tensor, ...]
    names: tuple[str, ...]
    given: tuple[Any, ...]
    chain: Chain
    lr: Any
    rate: float | None
    maximize: bool


class Prepared(NamedTuple):
    """A parameter that has been checked; its leaf has no state yet, which has to become these arrays."""

    place: Place
    name: str
    leaf: Leaf
    arrays: Mapping[str, Stored]


def look(optimizer: TransformOptimizer, before: list[Group], only: int | None = None) -> list[Group]:
    """The param groups; a group of which nothing has changed is the object that was found before.

    Args:
        optimizer: the optimizer.
        before: the groups as they were found before.
        only: the one group to look at; the others are taken as they were found before, if they were. None: all.

    Raises:
        TypeError, ValueError: a hyper-parameter is not valid.
    """
    groups = zip_longest(optimizer.param_groups, before[: len(optimizer.param_groups)])
    return [
        _group(optimizer, entries, old) if old is None or only in (None, g) else old
        for g, (entries, old) in enumerate(groups)
    ]


def settled(entries: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """What a param group holds; while it holds the same objects, `look` finds nothing new. None where it may."""
    values = [value for name, value in entries.items() if name not in ("params", "param_names")]
    return None if any(map(_may_change, values)) else tuple(entries.values())


def _group(optimizer: TransformOptimizer, entries: Mapping[str, Any], old: Group | None) -> Group:
    lr, given = entries["lr"], optimizer.given(entries)
    params = old.params if old and same(entries["params"], old.params) else tuple(entries["params"])
    names = tuple(entries.get("param_names", ()))
    is_as_before = old is not None and params is old.params and names == old.names and same(given, old.given)
    if old is None or not is_as_before or any(map(_may_change, given)):
        return Group(entries, params, names, given, optimizer.chain(entries), lr, _rate(lr), entries["maximize"])
    if lr is old.lr and not isinstance(lr, MUTABLE):
        return old if entries is old.entries else old._replace(entries=entries)
    optimizer.check_lr(lr)
    rate = _rate(lr)
    return old if lr is old.lr and rate == old.rate else old._replace(entries=entries, lr=lr, rate=rate)


def same(values: Collection[Any], others: Collection[Any]) -> bool:
    """Whether these are the same objects."""
    return len(values) == len(others) and all(map(is_, values, others))


def _may_change(value: Any) -> bool:
    return isinstance(value, MUTABLE) or (isinstance(value, tuple) and any(map(_may_change, value)))


def _rate(lr: Any) -> float | None:
    if isinstance(lr, Tensor):
        return float(lr.item()) if lr.device.type == "cpu" else None
    return float(plain(lr))


def prepare(
    optimizer: TransformOptimizer, groups: list[Group], places: Iterable[Place], compiling: bool = False
) -> list[Prepared]:
    """Checks the gradients and the state of these parameters, all of which have a gradient.

    Raises a TypeError or ValueError where one does not fit.
    """
    owner, rates = type(optimizer).__name__, [learning_rate(group.lr, compiling) for group in groups]
    found = []
    without: dict[str, None] = {}
    for g, i in places:
        group, name = groups[g], name_of(groups[g].entries, g, i)
        param = group.params[i]
        check_gradient(owner, name, param)
        assert param.grad is not None
        here, grad = _for_layout(optimizer, chain_at(group.chain, optimizer.param_groups, g, i), name, param.grad)
        arrays = here.arrays(tuple(param.shape), name_of_dtype(param.dtype))
        kept = optimizer.state.get(param, {})
        check_state(here, name, param, kept, arrays)
        if is_sharded(param) and kept.keys() != arrays.keys():
            check_placement(owner, name, param, arrays)
        found.append(Prepared((g, i), name, Leaf(here, rates[g], group.maximize, param, grad, {}), arrays))
        if grad.is_sparse:
            without |= dict.fromkeys(sparse.left_out(group.chain))
    if without:
        optimizer.warn_once(
            f"{', '.join(without)} is left out for parameters with sparse gradients, for it would go on in rows "
            f"that no gradient touches"
        )
    return found


def _for_layout(optimizer: TransformOptimizer, chain: Chain, name: str, grad: Tensor) -> tuple[Chain, Tensor]:
    """The chain and the gradient, where that is sparse, as this optimizer takes it."""
    if not grad.is_sparse:
        return chain, grad
    if optimizer.densifies_sparse_gradients:
        return chain, grad.to_dense()
    return sparse.rows_chain(chain, name, grad, type(optimizer).__name__), grad


def with_gradient(groups: list[Group]) -> list[Place]:
    """Where the parameters are that have a gradient."""
    return [(g, i) for g, group in enumerate(groups) for i, param in enumerate(group.params) if param.grad is not None]


def ready(optimizer: TransformOptimizer, prepared: Prepared) -> Leaf:
    """The leaf, with its state brought up to date."""
    leaf = prepared.leaf
    return leaf._replace(state=follow(optimizer.state[leaf.param], leaf.param, prepared.arrays))
