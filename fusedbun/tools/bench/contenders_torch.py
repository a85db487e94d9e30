"""The torch optimizers: ours on every path, torch's own, and those of other packages. Imports torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from fusedbun.recipes import RECIPES
from fusedbun.tools.bench.contenders import (
    FUSEDBUN,
    LEARNING_RATE,
    OURS,
    TORCH,
    TORCH_OURS,
    TORCH_PACKAGES,
    Arena,
    Contender,
    Rows,
    Stepper,
    held_bytes,
)
from fusedbun.tools.shared.machine import peak_during
from fusedbun.torch import IMPLEMENTATIONS

Params = list[nn.Parameter]

REFERENCE = "AdamW, fused"  # of the path `TORCH`: what every other time is divided by

_MODULE = "fusedbun.torch"
_ROUNDED = {"stochastic_rounding": True}
_INT8, _INT4 = ({**FUSEDBUN, "momentum_dtype": dtype} for dtype in ("int8", "int4"))
# Ours on bfloat16 parameters, where the default path alone is measured.
_OURS_BFLOAT16: Rows = (
    ("sm3", ", bfloat16", {}, 0),
    ("sm3", ", bfloat16 rounded stochastically", _ROUNDED, 0),
    ("fusedbun", ", bfloat16, int8", _INT8, 1),
    ("fusedbun", ", bfloat16 rounded stochastically, int8", {**_INT8, **_ROUNDED}, 1),
    ("fusedbun", ", bfloat16 rounded stochastically, int4", {**_INT4, **_ROUNDED}, 1),
)
# Torch's own: the class, what follows its name, arguments, how often more than once the gradient has to be read.
_OWN: Rows = (
    ("AdamW", ", fused", {"fused": True}, 0),
    ("AdamW", ", foreach", {"foreach": True}, 0),
    ("AdamW", ", for-loop", {"foreach": False, "fused": False}, 0),
    ("SGD", ", fused", {"fused": True}, 0),
    ("SGD", ", momentum, fused", {"momentum": 0.9, "fused": True}, 0),
    ("Adafactor", "", {}, 1),
)
# Package, module, class, how often more than once the gradient has to be read.
_PACKAGES = (
    ("torch-SM3", "SM3", "SM3", 0),
    ("pytorch_optimizer", "pytorch_optimizer", "SM3", 0),
    ("pytorch_optimizer", "pytorch_optimizer", "Adalite", 1),
    ("lion-pytorch", "lion_pytorch", "Lion", 0),
    ("torch-optimi", "optimi", "Lion", 0),
    ("torch-optimi", "optimi", "AdamW", 0),
    ("heavyball", "heavyball", "AdamW", 0),
)


class TorchStepper(Stepper):
    """An optimizer class, with its arguments beside parameters and learning rate, on an arena's parameters."""

    def __init__(self, module: str, name: str, settings: Mapping[str, Any], dtype: torch.dtype, arena: Arena) -> None:
        self._params, self._grads = _shared(arena, dtype)
        self._copies = name == "Adalite"  # which computes in the gradients
        # ours gets names, which u-muP's rule reads
        given = [(f"p{k}", x) for k, x in enumerate(self._params)] if module == _MODULE else self._params
        self._optimizer = getattr(import_module(module), name)(given, lr=LEARNING_RATE, **settings)

    def prepare(self) -> None:
        """Gives every parameter its gradient, for some optimizers take it away."""
        for param, grad in zip(self._params, self._grads, strict=True):
            param.grad = grad.clone() if self._copies else grad

    def step(self) -> None:
        self._optimizer.step()

    def state_bytes(self) -> int:
        return held_bytes(dict(enumerate(self._optimizer.state.values())))

    def temporaries(self) -> int | None:
        """Measured around a step, as the growth of the process."""
        self.prepare()
        return peak_during(self.step)


def contenders() -> list[Contender]:
    """All of them; those of packages that are not installed too."""
    paths = [(TORCH_OURS, {}), *((f"{TORCH_OURS} {x}", {"implementation": x}) for x in IMPLEMENTATIONS)]
    ours = [(path, row, choice, torch.float32) for path, choice in paths for row in OURS]
    ours += [(TORCH_OURS, row, {}, torch.bfloat16) for row in _OURS_BFLOAT16]
    found = []
    for path, (recipe, suffix, settings, rereads), choice, dtype in ours:
        cls = RECIPES[recipe].torch_class
        make = partial(TorchStepper, _MODULE, cls, {**settings, **choice}, dtype)
        found.append(Contender(path, cls + suffix, make, rereads=rereads, itemsize=dtype.itemsize))
    for cls, suffix, settings, rereads in _OWN:
        make = partial(TorchStepper, "torch.optim", cls, settings, torch.float32)
        found.append(Contender(TORCH, cls + suffix, make, rereads=rereads))
    for package, module, cls, rereads in _PACKAGES:
        make = partial(TorchStepper, module, cls, {}, torch.float32)
        found.append(Contender(TORCH_PACKAGES, f"{package} {cls}", make, module, package, rereads))
    return found


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


def _shared(arena: Arena, dtype: torch.dtype) -> tuple[Params, list[Tensor]]:
    """The arena's arrays as parameters and gradients, made once; those in float32 share its memory."""
    key = f"torch {dtype}"
    if key not in arena.shared:
        params, grads = ([torch.from_numpy(x).to(dtype) for x in arrays] for arrays in (arena.params, arena.grads))
        arena.shared[key] = [nn.Parameter(x) for x in params], grads
    found: tuple[Params, list[Tensor]] = arena.shared[key]
    return found
