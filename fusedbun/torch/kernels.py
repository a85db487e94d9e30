"""Leaves that generated kernels step: described to the driver once, and looked at before every step after that.

All that a kernel knows of a tensor is its address, so nothing is taken for granted between steps: parameters, their
gradients and their state have to be the tensors, of the kind and in the place, that they were when they were described.
Looking at them is most of the time that a step of small parameters takes. So everything of one sort is compared at
once, and whatever differs, all leaves are described anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from itertools import chain as joined
from itertools import compress
from operator import attrgetter, is_, methodcaller
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedbun.chain import Chain
from fusedbun.compiler.cpp import native
from fusedbun.compiler.graph import UnplannableError
from fusedbun.compiler.trace import evaluate, hyperparameters
from fusedbun.torch.openmp import parallel
from fusedbun.torch.overlap import Written
from fusedbun.torch.prepare import Group, Place, Prepared
from fusedbun.torch.state import State, stored_dtype

DENSE = (Tensor, torch.nn.Parameter)  # a subclass may be anything
KIND = attrgetter("dtype", "layout", "is_cpu", "shape")
STRIDES, ADDRESS = Tensor.stride, Tensor.data_ptr


class UnsuitedError(native.KernelError):
    """Kernels do not serve a leaf because of the tensors that it is made of."""


class Described(NamedTuple):
    """A leaf that a kernel steps.

    Args:
        place: where its parameter is among the param groups.
        name: what a message calls it.
        kernel: what steps it.
        chain: the chain for this parameter.
        param: the parameter.
        state: its state.
        grad_strides: its gradients' strides; they have its dtype.
    """

    place: Place
    name: str
    kernel: native.Kernel
    chain: Chain
    param: Tensor
    state: State
    grad_strides: tuple[int, ...]

    def describe(self, numbers: int) -> native.Description:
        """What the driver is told; it learns where the gradient is with every step."""
        width = self.param.element_size()
        grad = native.Array(native.ABSENT, width, tuple(step * width for step in self.grad_strides))
        slots = [described_array(self.state[key]) for key in self.kernel.program.arrays]
        arrays = [described_array(self.param), grad, *slots]
        return native.Description(self.kernel, tuple(self.param.shape), arrays, numbers)


def described_array(x: Tensor) -> native.Array:
    """A tensor as the driver sees it."""
    return native.Array(ADDRESS(x), x.element_size(), tuple(step * x.element_size() for step in STRIDES(x)))


def is_dense(x: Tensor | None) -> bool:
    """Whether a tensor is a plain array of numbers, and not an empty one."""
    if x is None or type(x) not in DENSE or x.layout is not torch.strided:
        return False
    return x.numel() > 0 and ADDRESS(x) != native.ABSENT


def find(prepared: Prepared, group: Group, state: Mapping[str, Tensor]) -> native.Kernel:
    """The kernel that steps a dense leaf.

    Args:
        prepared: the leaf.
        group: its param group.
        state: what is kept for it so far.

    Raises:
        KernelError: there is none; an UnsuitedError where that is due to the tensors and not to the chain.
    """
    leaf = prepared.leaf
    param = leaf.param
    if reason := _unsuited(prepared, group, state):
        raise UnsuitedError(reason)
    order = native.memory_order(tuple(param.shape), STRIDES(param))
    return native.kernel(leaf.chain, param.ndim, order, str(param.dtype).removeprefix("torch."), leaf.maximize)


def _unsuited(prepared: Prepared, group: Group, state: Mapping[str, Tensor]) -> str | None:
    """Why kernels do not serve such tensors, whatever the chain is."""
    chain, param, grad = prepared.leaf.chain, prepared.leaf.param, prepared.leaf.grad
    if not (param.is_cpu and grad.is_cpu):
        return f"kernels step parameters on the CPU, but it is on {param.device}"
    if grad.dtype != param.dtype:
        return f"its gradient is {grad.dtype}, but it is {param.dtype}"
    if group.rate is None or not is_of_numbers(chain):
        return "one of its hyper-parameters is a tensor"
    if param.is_neg() or grad.is_neg():
        return "it is stored as its negative"
    kept = {key: x for key, x in state.items() if key in prepared.arrays}
    for key, x in kept.items():
        stored = prepared.arrays[key]
        if (type(x), x.dtype, x.layout, x.is_cpu) != (Tensor, stored_dtype(stored), torch.strided, True):
            return f"its state {key!r} is {x.dtype} on {x.device}"
        if not stored.is_full(param.ndim) and not x.is_contiguous():
            return f"its state {key!r} is not contiguous"
    return None


class Batch:
    """Described leaves, ready to be stepped.

    Args:
        groups: the param groups.
        leaves: the leaves.
        only: the one parameter that is stepped, wherever others have gradients; None: all.
    """

    def __init__(self, groups: list[Group], leaves: list[Described], only: Place | None = None) -> None:
        self.groups = groups
        self.only = only
        self._leaves = leaves
        self._params = [leaf.param for leaf in leaves]
        self._kinds = list(map(KIND, self._params))
        self._strides = list(map(STRIDES, self._params))
        self._grad_strides = [leaf.grad_strides for leaf in leaves]
        self._state = list(joined.from_iterable(leaf.state.values() for leaf in leaves))
        self._addresses = list(map(ADDRESS, (*self._params, *self._state)))
        self._present = [False] * len(leaves)  # which of them have a gradient
        self._grads: list[Tensor] = []  # held until the step is over, whatever other threads do
        self._describe()

    def _describe(self) -> None:
        """Describes the leaves to the driver. Those of one chain and one kernel share their numbers."""
        self._numbers: list[tuple[int, native.Kernel, Chain]] = []
        rows: dict[Any, int] = {}
        descriptions = []
        for leaf in self._leaves:
            g, _ = leaf.place
            row = rows.setdefault((g, leaf.kernel.address, leaf.chain), len(rows))
            if row == len(self._numbers):
                self._numbers.append((g, leaf.kernel, leaf.chain))
            descriptions.append(leaf.describe(row))
        self._native = native.Leaves(descriptions, len(rows))
        for row in range(len(rows)):
            self._evaluate(row, self.groups)

    def _evaluate(self, row: int, groups: list[Group]) -> None:
        g, kernel, chain = self._numbers[row]
        self._native.set_numbers(
            row, evaluate(kernel.program.scalars, hyperparameters(kernel.program, chain, groups[g].rate))
        )

    @cached_property
    def _others(self) -> list[Place]:
        places = {leaf.place for leaf in self._leaves}
        every = ((g, i) for g, group in enumerate(self.groups) for i in range(len(group.params)))
        return [place for place in (every if self.only is None else [self.only]) if place not in places]

    def extended(self, leaves: list[Described]) -> Batch:
        """The batch with other leaves, that have a gradient, beside its own."""
        if not leaves:
            return self
        batch = Batch(self.groups, [*self._leaves, *leaves], self.only)
        batch._take_gradients()
        return batch

    def others_with_gradient(self) -> list[Place]:
        """Where the parameters are that have a gradient and are not among the leaves."""
        return [(g, i) for g, i in self._others if self.groups[g].params[i].grad is not None]

    def written(self) -> list[Written]:
        """What a step writes to."""
        return [
            *(Written(leaf.name, leaf.param) for leaf in self._leaves),
            *(
                Written(f"the state {key!r} of {leaf.name}", x)
                for leaf in self._leaves
                for key, x in leaf.state.items()
            ),
        ]

    def holds(self, groups: list[Group], state: Mapping[Tensor, State]) -> bool:
        """Whether a step finds what was described. Then the batch has taken up its gradients and numbers."""
        return self._follows(groups) and self._finds(state) and self._take_gradients()

    def _follows(self, groups: list[Group]) -> bool:
        """Takes up the hyper-parameters' new values, where these do not choose other code or state."""
        before = self.groups
        if len(groups) != len(before):
            return False
        looked_at = slice(None) if self.only is None else slice(self.only[0], self.only[0] + 1)
        if not all(map(_is_described, groups[looked_at], before[looked_at])):
            return False
        for row, (g, kernel, chain) in enumerate(self._numbers):
            if groups[g] is not before[g]:
                renewed = groups[g].chain is not before[g].chain
                self._numbers[row] = (g, kernel, groups[g].chain.named_as(chain) if renewed else chain)
                self._evaluate(row, groups)
        self.groups = groups
        return True

    def _finds(self, state: Mapping[Tensor, State]) -> bool:
        """Whether the parameters and their state are what and where they were."""
        kept = list(map(state.get, self._params))
        if None in kept:
            return False
        found = list(joined.from_iterable(map(methodcaller("values"), kept)))
        return (
            len(found) == len(self._state)
            and all(map(is_, found, self._state))
            and list(map(ADDRESS, (*self._params, *found))) == self._addresses
            and list(map(KIND, self._params)) == self._kinds
            and list(map(STRIDES, self._params)) == self._strides
        )

    def _take_gradients(self) -> bool:
        """Takes up the gradients of those leaves that have one, if all are of the kind that was described."""
        grads = [param.grad for param in self._params]
        self._present = [grad is not None for grad in grads]
        found = [grad for grad in grads if grad is not None]
        if (
            not all(map(DENSE.__contains__, map(type, found)))
            or list(map(KIND, found)) != list(compress(self._kinds, self._present))
            or list(map(STRIDES, found)) != list(compress(self._grad_strides, self._present))
            or any(map(Tensor.is_neg, found))
        ):
            return False
        self._grads, addresses = found, list(map(ADDRESS, found))
        each = iter(addresses)
        self._native.set_gradients([next(each) if is_there else native.ABSENT for is_there in self._present])
        return native.ABSENT not in addresses

    def step(self) -> None:
        """Steps the leaves that have a gradient."""
        if any(self._present):
            self._native.step(torch.get_num_threads(), parallel())
            stepped = compress(self._leaves, self._present)
            changed = [x for leaf in stepped for x in (leaf.param, *leaf.state.values())]
            torch.autograd.graph.increment_version(changed)
            self._grads = []


def _is_described(group: Group, before: Group) -> bool:
    """Whether the leaves of a param group have the code and the state that they had."""
    if group is before:
        return True
    if group.params is not before.params or group.maximize != before.maximize or group.rate is None:
        return False
    if group.chain is before.chain:
        return True
    if group.chain.has_rules or not is_of_numbers(group.chain):
        return False
    try:
        return native.structure(group.chain) == native.structure(before.chain)
    except UnplannableError:
        return False


def is_of_numbers(chain: Chain) -> bool:
    """Whether all hyper-parameters that are numbers are Python's own."""
    return not any(isinstance(value, Tensor) for value in chain.hyperparameters().values())
