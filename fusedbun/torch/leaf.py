"""A parameter on its way through a step: read from its param group, checked, and made the record that is stepped.

What has not changed since the last step is not made again: the chain of a group while its hyper-parameters are the
same objects, and its rate while it is the same number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from operator import is_
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fusedbun.chain import Chain
from fusedbun.hyper import plain
from fusedbun.storage.codes import Stored
from fusedbun.torch import sparse
from fusedbun.torch.checks import chain_at, check_gradient, check_state, name_of
from fusedbun.torch.sharding.placement import check_placement, is_sharded
from fusedbun.torch.state import State, arrays_of

Place = tuple[int, int]  # a group's, and a parameter's within it
Arguments = tuple[Chain, float | Tensor, bool, Tensor, Tensor, State]  # of `fusedbun.torch.definition.step_leaf`
DENSE = (Tensor, torch.nn.Parameter)  # a subclass may be anything
MUTABLE = (Tensor, np.ndarray, list)  # hyper-parameters of these types may hold other numbers than they did
NAMED = ("params", "param_names")  # what a group has beside hyper-parameters
NULL = 0  # the address of a tensor without memory


class Owner(Protocol):
    """An optimizer, as the parts of its driver see it (`fusedbun.torch.driver.TransformOptimizer`)."""

    param_groups: list[dict[str, Any]]
    state: defaultdict[Tensor, Any]
    defaults: dict[str, Any]
    densifies_sparse_gradients: bool

    @property
    def implementation(self) -> str | None: ...
    def chain(self, group: Mapping[str, Any]) -> Chain: ...
    def chain_arguments(self, group: Mapping[str, Any]) -> tuple[Any, ...]: ...
    def check_lr(self, lr: Any) -> None: ...
    def warn_once(self, message: str) -> None: ...


class Group(NamedTuple):
    """A param group as a step finds it."""

    params: tuple[Tensor, ...]
    names: tuple[str, ...]  # of the parameters, if they have any
    values: tuple[Any, ...]  # of the group; none where one may be changed in its place, so that it is read anew
    arguments: tuple[Any, ...]  # what the chain is made of
    chain: Chain  # rules among its hyper-parameters are not yet asked
    lr: Any
    rate: float | None  # the learning rate as a number; None where it is on another device
    maximize: bool


@dataclass(eq=False, slots=True)
class Leaf:
    """A parameter on its way through a step, and all that it is stepped with."""

    group: Group
    place: Place
    name: str  # what a message calls it
    asked: str | None  # the implementation that was asked for by name; None: the best that there is
    chain: Chain  # for this parameter
    lr: float | Tensor
    param: Tensor
    grad: Any  # a tensor; None in a leaf that is kept from one step to the next
    state: State  # before it is stepped it is made to hold `arrays`
    arrays: Mapping[str, Stored]  # those that the chain declares
    prepared: Any = None  # by its implementation

    @property
    def is_dense(self) -> bool:
        """Whether the parameter and its gradient are plain arrays of numbers, and not empty ones."""
        arrays: tuple[Any, ...] = (self.param, self.param.grad)
        return all(
            type(x) in DENSE and x.layout is torch.strided and x.numel() and x.data_ptr() != NULL for x in arrays
        )

    @property
    def arguments(self) -> Arguments:
        """What the definition steps it with."""
        return self.chain, self.lr, self.group.maximize, self.param, self.grad, self.state


def read_groups(owner: Owner, before: list[Group]) -> list[Group]:
    """The param groups; one of which nothing has changed is the object among `before`, which were read before.

    Raises:
        TypeError, ValueError: a hyper-parameter is not valid.
    """
    groups = zip_longest(owner.param_groups, before[: len(owner.param_groups)])
    return [
        read_group(owner, entries, old if old and identical(entries["params"], old.params) else None)
        for entries, old in groups
    ]


def read_group(owner: Owner, entries: Mapping[str, Any], old: Group | None) -> Group:
    """One param group; `old` is what was read of the same parameters before, if anything was."""
    if old and identical(entries.values(), old.values):
        return old
    values = () if any(_may_change(x) for name, x in entries.items() if name not in NAMED) else tuple(entries.values())
    lr, names, arguments = entries["lr"], tuple(entries.get("param_names", ())), owner.chain_arguments(entries)
    if not old or names != old.names or not identical(arguments, old.arguments) or any(map(_may_change, arguments)):
        params, chain = tuple(entries["params"]), owner.chain(entries)
        return Group(params, names, values, arguments, chain, lr, _rate(lr), entries["maximize"])
    owner.check_lr(lr)
    rate = _rate(lr)
    if lr is old.lr and rate == old.rate and identical(values, old.values):
        return old
    return old._replace(values=values, lr=lr, rate=rate)


def identical(values: Collection[Any], others: Collection[Any]) -> bool:
    """Whether these are the same objects."""
    return len(values) == len(others) and all(map(is_, values, others))


def _may_change(value: Any) -> bool:
    return isinstance(value, MUTABLE) or (isinstance(value, tuple) and any(map(_may_change, value)))


def _rate(lr: Any) -> float | None:
    if isinstance(lr, Tensor):
        return float(lr.item()) if lr.device.type == "cpu" else None
    return float(plain(lr))


def learning_rate(lr: Any, compiling: bool) -> float | Tensor:
    """The learning rate as a step takes it: a tensor of one element loses its axes, to broadcast to any shape.

    Compiled code gets a tensor, for a graph specialises on a Python float.
    """
    if isinstance(lr, Tensor):
        return lr.reshape(())
    number: float = plain(lr)
    return torch.tensor(number, dtype=torch.float64) if compiling else number


def all_places(groups: Iterable[Group]) -> list[Place]:
    """The places of all parameters."""
    return [(g, i) for g, group in enumerate(groups) for i in range(len(group.params))]


def make_leaves(owner: Owner, groups: list[Group], places: Iterable[Place], compiling: bool = False) -> list[Leaf]:
    """The leaves of those of these parameters that have a gradient, checked; nothing is changed yet.

    Args:
        owner: the optimizer.
        groups: its param groups, as they are now.
        places: where the parameters are.
        compiling: they are stepped in compiled code.

    Raises:
        TypeError, ValueError: a gradient or a state does not fit its parameter.
    """
    title, rates = type(owner).__name__, [learning_rate(group.lr, compiling) for group in groups]
    leaves = []
    left_out: dict[str, None] = {}
    for g, i in places:
        group, param = groups[g], groups[g].params[i]
        if (grad := param.grad) is None:
            continue
        name, chain = name_of(owner.param_groups[g], g, i), chain_at(group.chain, owner.param_groups, g, i)
        check_gradient(title, name, param, grad)
        if grad.is_sparse and owner.densifies_sparse_gradients:
            grad = grad.to_dense()
        elif grad.is_sparse:
            chain = sparse.rows_chain(chain, name, grad, title)
            left_out |= dict.fromkeys(sparse.left_out(group.chain))
        arrays, state = arrays_of(chain, param), owner.state.get(param, {})
        check_state(chain, name, param, state, arrays)
        if is_sharded(param) and state.keys() != arrays.keys():
            check_placement(title, name, param, arrays)
        leaves.append(Leaf(group, (g, i), name, owner.implementation, chain, rates[g], param, grad, state, arrays))
    if left_out:
        owner.warn_once(
            f"{', '.join(left_out)} is left out for parameters with sparse gradients, for it would go on in rows "
            f"that no gradient touches"
        )
    return leaves
