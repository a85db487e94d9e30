"""A parameter on its way through a step: read from its param group, checked, and made the record that is stepped.

What has not changed since the last step is not made again: the chain of a group while its hyper-parameters are the
same objects, and its rate while it is the same number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product, zip_longest
from operator import is_
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fusedbun.chain import Chain, entries_of
from fusedbun.hyper import plain
from fusedbun.recipe import Recipe
from fusedbun.storage.codes import STEP, Stored
from fusedbun.torch.flat import check_axes
from fusedbun.torch.sharding.placement import check_placement, is_sharded
from fusedbun.torch.state import State, arrays_of, dtype_name, stored_dtype

Place = tuple[int, int]  # a group's, and a parameter's within it
Arguments = tuple[Chain, float | Tensor, bool, Tensor, Tensor, State]  # of `fusedbun.torch.definition.step_leaf`
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DENSE = (Tensor, torch.nn.Parameter)  # a subclass may be anything
MUTABLE = (Tensor, np.ndarray, list)  # hyper-parameters of these types may hold other numbers than they did


class Owner(Protocol):
    """An optimizer, as the parts of its driver see it (`fusedbun.torch.driver.TransformOptimizer`)."""

    param_groups: list[dict[str, Any]]
    state: defaultdict[Tensor, Any]
    defaults: dict[str, Any]
    recipe: Recipe
    densifies_sparse_gradients: bool

    @property
    def implementation(self) -> str | None: ...
    def chain(self, group: Mapping[str, Any]) -> Chain: ...
    def chain_arguments(self, group: Mapping[str, Any]) -> tuple[Any, ...]: ...
    def check_keys(self, group: Mapping[str, Any]) -> None: ...
    def check_parameter(self, name: str, param: Tensor) -> None: ...
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
        """Whether the parameter and its gradient are plain arrays of numbers, not empty ones, and have memory."""
        arrays: tuple[Any, ...] = (self.param, self.param.grad)
        return all(type(x) in DENSE and x.layout is torch.strided and x.numel() and x.data_ptr() for x in arrays)

    def slices(self) -> Iterator[Leaf]:
        """Itself; of a stack every slice, as a leaf of its own whose arrays are parts of the stack's."""
        if not (stacked := self.chain.stacked):
            yield self
            return
        arrays = {key: x._replace(stacked=0) for key, x in self.arrays.items()}
        for place in product(*map(range, self.param.shape[:stacked])):
            chain, param = self.chain.slice(place), self.param.detach()[place]
            grad = None if self.grad is None else self.grad[place]
            state = {key: x[place] for key, x in self.state.items()}
            yield replace(self, chain=chain, param=param, grad=grad, state=state, arrays=arrays)

    @property
    def arguments(self) -> Arguments:
        """What the definition steps it with."""
        return self.chain, self.lr, self.group.maximize, self.param, self.grad, self.state


def read_groups(owner: Owner, before: list[Group]) -> list[Group]:
    """The param groups, checked; one of which nothing has changed is the object that was read before."""
    groups = zip_longest(owner.param_groups, before[: len(owner.param_groups)])
    return [
        read_group(owner, entries, old if old and identical(entries["params"], old.params) else None)
        for entries, old in groups
    ]


def read_group(owner: Owner, entries: Mapping[str, Any], old: Group | None) -> Group:
    """One param group; `old` is what was read before, if anything was, and its list of parameters is as it was."""
    if old and identical(entries.values(), old.values):
        return old
    owner.check_keys(entries)
    lr, names, arguments = entries["lr"], tuple(entries.get("param_names", ())), owner.chain_arguments(entries)
    chain_may_change = any(map(_may_change, arguments))
    values = () if chain_may_change or _may_change(lr) else tuple(entries.values())
    is_same_chain = old and identical(arguments, old.arguments) and not chain_may_change
    has_same_params = old and identical(entries["params"], old.params) and names == old.names
    if not (old and is_same_chain and has_same_params):
        params, chain = old.params if old and has_same_params else tuple(entries["params"]), owner.chain(entries)
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


def all_places(groups: Iterable[Group]) -> list[Place]:
    """The places of all parameters."""
    return [(g, i) for g, group in enumerate(groups) for i in range(len(group.params))]


def chain_at(chain: Chain, groups: Sequence[Mapping[str, Any]], g: int, i: int) -> Chain:
    """The chain of the param group `g` for its parameter `i`.

    Where parameters have no names, their place among all decides the noise of their rounding.
    """
    param, path = groups[g]["params"][i], path_of(groups[g], i)
    try:
        return chain.at(path, param, None if path else str(sum(len(group["params"]) for group in groups[:g]) + i))
    except (TypeError, ValueError) as error:
        error.add_note(f"This is at {name_of(groups[g], g, i)}.")
        raise


def path_of(group: Mapping[str, Any], i: int) -> tuple[str, ...]:
    """The names that lead to the parameter `i` of a param group, as a rule sees them."""
    names = group.get("param_names")
    return tuple(names[i].split(".")) if names else ()


def is_real(param: Tensor) -> bool:
    """Whether a parameter has real floating-point numbers, as one that is stepped must, and a shape by now."""
    return param.dtype in FLOATING and not is_lazy(param)


def name_of(group: Mapping[str, Any], g: int, i: int) -> str:
    """What a message calls the parameter `i` of a param group, which is number `g`."""
    names = group.get("param_names")
    return f"parameter {names[i]!r}" if names else f"parameter {i} of group {g}"


def make_leaves(owner: Owner, groups: list[Group], places: Iterable[Place]) -> list[Leaf]:
    """The leaves of those of these parameters that have a gradient, checked; nothing is changed yet.

    Raises a TypeError or ValueError where a gradient or a state does not fit its parameter.
    """
    title = type(owner).__name__
    # a tensor of one element loses its axes, to broadcast to any shape
    rates = [lr.reshape(()) if isinstance(lr, Tensor) else plain(lr) for lr in (group.lr for group in groups)]
    leaves: list[Leaf] = []
    left_out: dict[str, None] = {}
    for g, i in places:
        group, param = groups[g], groups[g].params[i]
        if (grad := param.grad) is None:
            continue
        name = name_of(owner.param_groups[g], g, i)
        owner.check_parameter(name, param)
        chain = chain_at(group.chain, owner.param_groups, g, i)
        check_axes(title, name, path_of(owner.param_groups[g], i), group.chain, chain, param)
        check_gradient(title, name, param, grad)
        if grad.is_sparse and owner.densifies_sparse_gradients:
            grad = grad.to_dense()
        elif grad.is_sparse:
            chain = rows_chain(chain, name, grad, title)
            left_out |= {t.name: None for t in group.chain if t.for_rows() is None and t.slots((1, 1))}
        arrays, state = arrays_of(chain, param), owner.state.get(param, {})
        check_state(chain, name, param, state, arrays)
        if is_sharded(param) and not (state and state.keys() == arrays.keys()):
            check_placement(title, name, param, arrays)
        leaves.append(Leaf(group, (g, i), name, owner.implementation, chain, rates[g], param, grad, state, arrays))
    if left_out:
        owner.warn_once(
            f"{', '.join(left_out)} is left out for parameters with sparse gradients, for it would go on in rows "
            f"that no gradient touches"
        )
    return leaves


def rows_chain(chain: Chain, name: str, grad: Tensor, owner: str) -> Chain:
    """The chain for the rows that a sparse gradient touches; raises a TypeError where there is none."""
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


def check_gradient(owner: str, name: str, param: Tensor, grad: Tensor) -> None:
    """Raises a TypeError or ValueError for a gradient that does not fit its parameter."""
    if grad.dtype not in FLOATING:
        raise TypeError(
            f"the gradient of {name} is {grad.dtype}, but {owner} takes real floating-point gradients: "
            f"{', '.join(map(str, FLOATING))}"
        )
    meshes = [getattr(x, "device_mesh", None) for x in (grad, param)]
    if meshes[0] != meshes[1]:
        raise ValueError(
            f"the gradient of {name} is on {meshes[0] or 'no mesh'}, but the parameter is on {meshes[1] or 'no mesh'}; "
            f"{owner} takes both as plain tensors, or both as DTensors on one mesh"
        )
    if grad.shape != param.shape:
        raise ValueError(
            f"the gradient of {name} has shape {tuple(grad.shape)}, but the parameter has {tuple(param.shape)}"
        )


def check_state(chain: Chain, name: str, param: Tensor, state: State, arrays: Mapping[str, Stored]) -> None:
    """Raises a ValueError where the state was kept for a parameter of another shape or for gradients of another kind.

    The arrays are those that the chain, which steps the parameter, declares for it.
    """
    shape = tuple(param.shape)
    for key in [key for key in state if key in arrays]:
        kept, declared = state[key], arrays[key]
        if kept.shape != declared.shape(shape):
            raise ValueError(
                f"the state {key!r} of {name} has shape {tuple(kept.shape)}, but a parameter of shape {shape} keeps "
                f"{declared.shape(shape)}; its shape, or what chooses its state (stacked, channel_axis), has "
                f"changed; delete its entry of the optimizer's state to begin again"
            )
        if kept.dtype != stored_dtype(declared):
            raise ValueError(
                f"the state {key!r} of {name} is {dtype_name(kept.dtype)}, but {declared.dtype} is stored now; "
                f"what it is stored in must not change in a run: load its state_dict into a new optimizer with "
                f"convert=True"
            )
    for transform in chain:
        there, needed = entries_of(transform, state).keys(), entries_of(transform, arrays).keys()
        if there and transform.counts and STEP not in state:
            raise ValueError(
                f"the state of {name} has {', '.join(there)} for {transform.name}, but {STEP!r} is missing, which says "
                f"how many steps that is of; what chooses its state must not change; delete its entry of the "
                f"optimizer's state to begin again"
            )
        if there and needed and there != needed:
            raise ValueError(
                f"the state of {name} has {', '.join(there)} for {transform.name}, but this step needs "
                f"{', '.join(needed)}; a parameter's gradients must be all dense or all sparse, and what chooses its "
                f"state must not change; delete its entry of the optimizer's state to begin again"
            )
