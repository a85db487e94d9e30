"""The definition in code that torch compiles, one graph for all parameters together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from fusedbun.compiler.cpp.native import KernelError
from fusedbun.torch.definition import step_leaves
from fusedbun.torch.implementation import Implementation
from fusedbun.torch.leaf import Arguments, Leaf


class Compiled(Implementation):
    """torch.compile of the definition; what is not for compiled code is stepped by the definition itself."""

    name = "compiled"

    def prepare(self, leaf: Leaf) -> None:
        if leaf.param.is_cuda and find_spec("triton") is None:
            raise KernelError("torch.compile needs triton, which is not installed")

    def step(self, leaves: Sequence[Leaf]) -> None:
        step_leaves(leaf.arguments for leaf in leaves if not is_compilable(leaf))
        if arguments := compilable_arguments(leaves):
            _compiled()(arguments)


def is_compilable(leaf: Leaf) -> bool:
    """Whether the leaf may be stepped in compiled code.

    torch 2.13 drops in-place changes of 0-d float64 tensors in code compiled for the CPU.
    """
    return bool(leaf.param.ndim) and not leaf.grad.is_sparse


def compilable_arguments(leaves: Sequence[Leaf]) -> list[Arguments]:
    """What those leaves are stepped with that may be in compiled code, whose graph would fix a rate that is a float."""
    rates = {id(leaf.lr): leaf.lr for leaf in leaves}  # one of all leaves of a group
    tensors = {
        key: lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64) for key, lr in rates.items()
    }
    return [(leaf.chain, tensors[id(leaf.lr)], *leaf.arguments[2:]) for leaf in leaves if is_compilable(leaf)]


@cache
def _compiled() -> Callable[[list[Arguments]], None]:
    return torch.compile(step_leaves)
