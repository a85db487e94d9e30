"""The definition in code that torch compiles, one graph for all parameters together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from fusedbun.compiler.cpp.native import KernelError
from fusedbun.torch.definition import step_leaf, step_leaves
from fusedbun.torch.implementation import Implementation
from fusedbun.torch.leaf import Arguments, Leaf, learning_rate


class Compiled(Implementation):
    """torch.compile of the definition; what is not for compiled code is stepped by the definition itself."""

    name = "compiled"

    def prepare(self, leaf: Leaf) -> None:
        if leaf.param.is_cuda and find_spec("triton") is None:
            raise KernelError("torch.compile needs triton, which is not installed")

    def step(self, leaves: Sequence[Leaf]) -> None:
        rates: dict[int, Any] = {}  # one tensor for all leaves of a group
        to_compile: list[Arguments] = []
        for leaf in leaves:
            chain, lr, *others = leaf.arguments
            if is_compilable(leaf):
                rate = rates.setdefault(id(lr), learning_rate(lr, compiling=True))
                to_compile.append((chain, rate, *others))
            else:
                step_leaf(*leaf.arguments)
        if to_compile:
            _compiled()(to_compile)


def is_compilable(leaf: Leaf) -> bool:
    """Whether the leaf may be stepped in compiled code.

    torch 2.13 drops in-place changes of 0-d float64 tensors in code compiled for the CPU.
    """
    return bool(leaf.param.ndim) and not leaf.grad.is_sparse


@cache
def _compiled() -> Callable[[list[Arguments]], None]:
    return torch.compile(step_leaves)
