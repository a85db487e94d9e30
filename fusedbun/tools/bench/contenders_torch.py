"""The torch optimizers: ours on every path, torch's own, and those of other packages. Imports torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

import fusedbun
import fusedbun.torch
from fusedbun.tools.bench.arena import Arena
from fusedbun.tools.bench.contenders import (
    LEARNING_RATE,
    TORCH,
    TORCH_OURS,
    TORCH_PACKAGES,
    Contender,
    Stepper,
    held_bytes,
)
from fusedbun.tools.shared.machine import peak_during

Params = list[nn.Parameter]
MakeOptimizer = Callable[[Params], torch.optim.Optimizer]

REFERENCE = "AdamW, fused"  # of the path `TORCH`: what every other time is divided by

_FUSEDBUN = {"centralize": True, "use_rms": True}
# Name, class, arguments, how often more than once the gradient has to be read.
_OURS: tuple[tuple[str, str, dict[str, Any], int], ...] = (
    ("SM3", "SM3", {}, 0),
    ("SM3, momentum", "SM3", {"momentum": 0.9}, 0),
    ("Fusedbun", "Fusedbun", _FUSEDBUN, 1),
    ("Fusedbun, lagged", "Fusedbun", {**_FUSEDBUN, "lagged": True}, 0),
    ("DecoupledLionW", "DecoupledLionW", {}, 0),
    ("MupAdamW", "MupAdamW", {"mup": lambda path, param: "weight"}, 0),
    ("ScaledOptum", "ScaledOptum", {}, 0),
)
# The same on bfloat16 parameters, where the default path alone is measured.
_OURS_BFLOAT16: tuple[tuple[str, str, dict[str, Any], int], ...] = (
    ("SM3, bfloat16", "SM3", {}, 0),
    ("SM3, bfloat16 rounded stochastically", "SM3", {"stochastic_rounding": True}, 0),
    ("Fusedbun, bfloat16, int8", "Fusedbun", {**_FUSEDBUN, "momentum_dtype": "int8"}, 1),
    (
        "Fusedbun, bfloat16 rounded stochastically, int8",
        "Fusedbun",
        {**_FUSEDBUN, "momentum_dtype": "int8", "stochastic_rounding": True},
        1,
    ),
    (
        "Fusedbun, bfloat16 rounded stochastically, int4",
        "Fusedbun",
        {**_FUSEDBUN, "momentum_dtype": "int4", "stochastic_rounding": True},
        1,
    ),
)
_OWN: tuple[tuple[str, str, dict[str, Any], int], ...] = (
    (REFERENCE, "AdamW", {"fused": True}, 0),
    ("AdamW, foreach", "AdamW", {"foreach": True}, 0),
    ("AdamW, for-loop", "AdamW", {"foreach": False, "fused": False}, 0),
    ("SGD, fused", "SGD", {"fused": True}, 0),
    ("SGD, momentum, fused", "SGD", {"momentum": 0.9, "fused": True}, 0),
    ("Adafactor", "Adafactor", {}, 1),
)
# Package, module, class, how often more than once the gradient has to be read.
_PACKAGES: tuple[tuple[str, str, str, int], ...] = (
    ("torch-SM3", "SM3", "SM3", 0),
    ("pytorch_optimizer", "pytorch_optimizer", "SM3", 0),
    ("pytorch_optimizer", "pytorch_optimizer", "Adalite", 1),
    ("lion-pytorch", "lion_pytorch", "Lion", 0),
    ("torch-optimi", "optimi", "Lion", 0),
    ("torch-optimi", "optimi", "AdamW", 0),
    ("heavyball", "heavyball", "AdamW", 0),
)
_SPOILS_GRADIENTS = {"Adalite"}  # computes in them, and so gets copies


class TorchStepper:
    """A torch optimizer on an arena's parameters.

    Args:
        make: makes the optimizer.
        copies: give it gradients that it may change.
        dtype: of parameters and gradients.
        arena: what it steps.
    """

    def __init__(self, make: MakeOptimizer, copies: bool, dtype: torch.dtype, arena: Arena) -> None:
        self._params, self._grads = _shared(arena, dtype)
        self._copies = copies
        self._optimizer = make(self._params)

    def prepare(self) -> None:
        """Gives every parameter its gradient, for some optimizers take it away."""
        for param, grad in zip(self._params, self._grads, strict=True):
            param.grad = grad.clone() if self._copies else grad

    def step(self) -> None:
        """One step."""
        self._optimizer.step()

    def state_bytes(self) -> int:
        """The bytes of the tensors that the optimizer holds."""
        return held_bytes(dict(enumerate(self._optimizer.state.values())))

    def temporaries(self) -> int | None:
        """Measured around a step, as the growth of the process."""
        self.prepare()
        return peak_during(self.step)


def contenders() -> list[Contender]:
    """All of them; those of packages that are not installed too."""
    ours = [
        Contender(path, name, _stepper(_ours(cls, {**settings, **given})), rereads=rereads)
        for path, given in _paths()
        for name, cls, settings, rereads in _OURS
    ]
    fewer_bits = [
        Contender(
            TORCH_OURS,
            name,
            _stepper(_ours(cls, settings), dtype=torch.bfloat16),
            rereads=rereads,
            itemsize=torch.bfloat16.itemsize,
        )
        for name, cls, settings, rereads in _OURS_BFLOAT16
    ]
    own = [
        Contender(TORCH, name, _stepper(_make("torch.optim", cls, settings)), rereads=rereads)
        for name, cls, settings, rereads in _OWN
    ]
    packages = [
        Contender(
            TORCH_PACKAGES,
            f"{package} {cls}",
            _stepper(_make(module, cls, {}), copies=cls in _SPOILS_GRADIENTS),
            module,
            package,
            rereads,
        )
        for package, module, cls, rereads in _PACKAGES
    ]
    return ours + fewer_bits + own + packages


@contextmanager
def session(threads: int) -> Iterator[None]:
    """Torch on so many threads, and without what was compiled before."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _paths() -> list[tuple[str, dict[str, Any]]]:
    """The paths of our classes, and the arguments that choose them."""
    named = [name for name in getattr(fusedbun.torch, "IMPLEMENTATIONS", ()) if name is not None]
    return [(TORCH_OURS, {}), *((f"{TORCH_OURS} {name}", {"implementation": name}) for name in named)]


def _ours(cls: str, settings: dict[str, Any]) -> MakeOptimizer:
    def make(params: Params) -> torch.optim.Optimizer:
        named = [(f"p{k}", param) for k, param in enumerate(params)]  # u-muP's rule reads names
        optimizer: torch.optim.Optimizer = getattr(fusedbun, cls)(named, lr=LEARNING_RATE, **settings)
        return optimizer

    return make


def _make(module: str, cls: str, settings: dict[str, Any]) -> MakeOptimizer:
    def make(params: Params) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = getattr(import_module(module), cls)(params, lr=LEARNING_RATE, **settings)
        return optimizer

    return make


def _stepper(
    make: MakeOptimizer, copies: bool = False, dtype: torch.dtype = torch.float32
) -> Callable[[Arena], Stepper]:
    return partial(TorchStepper, make, copies, dtype)


def _shared(arena: Arena, dtype: torch.dtype) -> tuple[Params, list[Tensor]]:
    """The arena's arrays as parameters and gradients, made once; those in float32 share its memory."""
    key = f"torch {dtype}"
    if key not in arena.shared:
        params = [nn.Parameter(torch.from_numpy(array).to(dtype)) for array in arena.params]
        arena.shared[key] = params, [torch.from_numpy(array).to(dtype) for array in arena.grads]
    found: tuple[Params, list[Tensor]] = arena.shared[key]
    return found
