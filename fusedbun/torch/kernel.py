"""Leaves that generated kernels step: described to the runtime once, and looked at before every step after that.

All that a kernel knows of a tensor is its address, so nothing is taken for granted between steps: parameters, their
gradients and their state have to be the tensors, of the kind and in the place, that they were when they were described.
Looking at them is most of the time that a step of small parameters takes. So everything of one sort is compared at
once, and whatever differs, all leaves are described anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain as joined
from itertools import compress, product
from operator import attrgetter, is_, methodcaller, mul

import torch
from torch import Tensor

from fusedbun.chain import Chain
from fusedbun.compiler.cpp import native
from fusedbun.compiler.graph import UnschedulableError
from fusedbun.compiler.trace import evaluate, hyperparameters, product_of
from fusedbun.metrics import PAIRS, Pair, Products
from fusedbun.torch.implementation import Implementation
from fusedbun.torch.leaf import DENSE, Group, Leaf
from fusedbun.torch.openmp import parallel
from fusedbun.torch.state import State, compute_dtype, dtype_name, stored_dtype

KIND = attrgetter("dtype", "layout", "is_cpu", "shape")
STRIDES, ADDRESS = Tensor.stride, Tensor.data_ptr


class Kernel(Implementation):
    """Generated code, on the CPU.

    Args:
        measures: whether it records the inner products of a step's metrics.
    """

    name = "kernel"

    def __init__(self, measures: bool = False) -> None:
        self.measures = measures

    def refusal(self, leaf: Leaf) -> str | None:
        param, grad = leaf.param, leaf.grad
        if not (param.is_cpu and grad.is_cpu):
            return f"kernels step parameters on the CPU, but it is on {param.device}"
        if grad.dtype != param.dtype:
            return f"its gradient is {grad.dtype}, but it is {param.dtype}"
        if leaf.group.rate is None or not is_of_numbers(leaf.chain):
            return "one of its hyper-parameters is a tensor"
        if param.is_neg() or grad.is_neg():
            return "it is stored as its negative"
        for key in filter(leaf.arrays.__contains__, leaf.state):
            x, stored = leaf.state[key], leaf.arrays[key]
            if (type(x), x.dtype, x.layout, x.is_cpu) != (Tensor, stored_dtype(stored), torch.strided, True):
                return f"its state {key!r} is {x.dtype} on {x.device}"
            if not (stored.is_full(param.ndim) or x.is_contiguous()):
                return f"its state {key!r} is not contiguous"
        return None

    def prepare(self, leaf: Leaf) -> tuple[native.Kernel, tuple[int, ...]]:
        """Its kernel, of a stack that of every slice, and the strides of its gradient."""
        one = next(leaf.slices())
        order = native.memory_order(tuple(one.param.shape), STRIDES(one.param))
        dtype, maximize = dtype_name(one.param.dtype), leaf.group.maximize
        return native.kernel(one.chain, one.param.ndim, order, dtype, maximize, self.measures), STRIDES(leaf.grad)

    def step(self, leaves: Sequence[Leaf]) -> None:
        Batch(leaves).step()


def is_of_numbers(chain: Chain) -> bool:
    """Whether all hyper-parameters that are numbers are Python's own."""
    return not any(isinstance(value, Tensor) for value in chain.hyperparameters().values())


def described(x: Tensor) -> native.Array:
    """A tensor as the runtime sees it."""
    return native.Array(ADDRESS(x), x.element_size(), tuple(step * x.element_size() for step in STRIDES(x)))


class Batch:
    """Leaves that `Kernel` has prepared, described to the runtime to be stepped once and again, stacks slice by slice.

    They let go of their gradients; each step takes those that the parameters have then.
    """

    def __init__(self, leaves: Sequence[Leaf]) -> None:
        self._leaves = leaves
        self._groups = {leaf.place[0]: leaf.group for leaf in leaves}
        self._params = [leaf.param for leaf in leaves]
        self._kinds = list(map(KIND, self._params))
        self._strides = list(map(STRIDES, self._params))
        self._grad_strides = [strides for _, strides in (leaf.prepared for leaf in leaves)]
        self._state = list(joined.from_iterable(leaf.state.values() for leaf in leaves))
        self._addresses = list(map(ADDRESS, (*self._params, *self._state)))
        # Leaves of one group, one chain and one kernel share a row of numbers.
        rows: dict[tuple[int, int, Chain], int] = {}
        self._numbers: list[tuple[int, native.Kernel, Chain]] = []
        descriptions = []
        self._slices: list[list[int]] = []  # of every leaf, how far behind its gradient's first byte each slice's is
        self._products: list[tuple[list[Pair], Tensor]] = []  # of every leaf, what is measured, a row for each slice
        for leaf in leaves:
            g, (kernel, strides), stacked = leaf.place[0], leaf.prepared, leaf.chain.stacked
            width, shape = leaf.param.element_size(), leaf.param.shape
            steps = [stride * width for stride in strides]
            grad = native.Array(native.ABSENT, width, tuple(steps[stacked:]))
            places = [*product(*map(range, shape[:stacked]))]
            self._slices.append([sum(map(mul, place, steps)) for place in places])
            pairs = [pair for pair in PAIRS if product_of(*pair) in kernel.program.arrays]
            table = torch.zeros(len(places), len(pairs), dtype=compute_dtype(leaf.param.dtype))
            self._products.append((pairs, table))
            for one, measured in zip(leaf.slices(), table, strict=True):
                of_step = one.state | {product_of(*pair): measured[i : i + 1] for i, pair in enumerate(pairs)}
                row = rows.setdefault((g, kernel.address, one.chain), len(rows))
                if len(rows) > len(self._numbers):
                    self._numbers.append((g, kernel, one.chain))
                arrays = [described(one.param), grad, *(described(of_step[key]) for key in kernel.program.arrays)]
                descriptions.append(native.Description(kernel, tuple(one.param.shape), arrays, row))
        self._native = native.Leaves(descriptions, len(rows))
        for row, (g, _, _) in enumerate(self._numbers):
            self._evaluate(row, self._groups[g].rate)
        self._take_gradients()
        for leaf in leaves:
            leaf.grad = None

    def _evaluate(self, row: int, rate: float | None) -> None:
        _, kernel, chain = self._numbers[row]
        values = hyperparameters(kernel.program, chain, rate)
        self._native.set_numbers(row, evaluate(kernel.program.scalars, values))

    def leaves(self) -> Sequence[Leaf]:
        """The leaves, with the hyper-parameters that they have now."""
        for leaf in self._leaves:
            group = self._groups[leaf.place[0]]
            if group.chain is not leaf.group.chain:
                leaf.chain = group.chain.named_as(leaf.chain)
            leaf.group = group
        return self._leaves

    def holds(self, groups: list[Group], state: Mapping[Tensor, State]) -> bool:
        """Whether nothing has changed but numbers and gradients, which the batch has taken up then for its `step`."""
        return self._take_numbers(groups) and self._finds_arrays(state) and self._take_gradients()

    def _take_numbers(self, groups: list[Group]) -> bool:
        """Takes up the hyper-parameters' new values, if these do not choose other code or state."""
        before = self._groups
        if not all(g < len(groups) and _has_same_code(groups[g], old) for g, old in before.items()):
            return False
        for row, (g, kernel, chain) in enumerate(self._numbers):
            if groups[g] is not before[g]:
                is_new = groups[g].chain is not before[g].chain
                self._numbers[row] = (g, kernel, groups[g].chain.named_as(chain) if is_new else chain)
                self._evaluate(row, groups[g].rate)
        self._groups = {g: groups[g] for g in before}
        return True

    def _finds_arrays(self, state: Mapping[Tensor, State]) -> bool:
        """Whether the parameters and their state are what and where they were."""
        states = list(map(state.get, self._params))
        if None in states:
            return False
        arrays = list(joined.from_iterable(map(methodcaller("values"), states)))
        return (
            len(arrays) == len(self._state)
            and all(map(is_, arrays, self._state))
            and list(map(ADDRESS, (*self._params, *arrays))) == self._addresses
            and list(map(KIND, self._params)) == self._kinds
            and list(map(STRIDES, self._params)) == self._strides
        )

    def _take_gradients(self) -> bool:
        """Takes up the gradients of those leaves that have one, if all are of the kind that was described."""
        every = [param.grad for param in self._params]
        self._has_grad = [grad is not None for grad in every]
        grads = [grad for grad in every if grad is not None]
        if (
            not all(map(DENSE.__contains__, map(type, grads)))
            or list(map(KIND, grads)) != list(compress(self._kinds, self._has_grad))
            or list(map(STRIDES, grads)) != list(compress(self._grad_strides, self._has_grad))
            or any(map(Tensor.is_neg, grads))
        ):
            return False
        self._grads = grads  # held until the step is over, whatever other threads do
        addresses = list(map(ADDRESS, grads))
        following = iter(addresses)
        starts = [next(following) if has_grad else native.ABSENT for has_grad in self._has_grad]
        of_slices = [start and start + at for start, slices in zip(starts, self._slices, strict=True) for at in slices]
        self._native.set_gradients(of_slices)
        return native.ABSENT not in addresses

    def step(self) -> dict[Tensor, Products]:
        """Steps the leaves that have a gradient; what was measured."""
        if not self._grads:
            return {}
        self._native.step(torch.get_num_threads(), parallel())
        stepped = [*compress(self._leaves, self._has_grad)]
        changed = [x for leaf in stepped for x in (leaf.param, *leaf.state.values())]
        torch.autograd.graph.increment_version(changed)
        self._grads = []
        measured = zip(stepped, compress(self._products, self._has_grad), strict=True)
        return {
            leaf.param: dict(zip(pairs, table.sum(0).unbind(), strict=True))
            for leaf, (pairs, table) in measured
            if pairs
        }


def _has_same_code(group: Group, before: Group) -> bool:
    """Whether the kernels and the arrays of state that a param group had are those that it has now."""
    if group is before:
        return True
    if group.params is not before.params or group.maximize != before.maximize or group.rate is None:
        return False
    chain = group.chain
    if chain is before.chain:
        return True
    if chain.has_rules or chain.stacked != before.chain.stacked or not is_of_numbers(chain):
        return False
    try:
        return native.structure(chain) == native.structure(before.chain)
    except UnschedulableError:
        return False
