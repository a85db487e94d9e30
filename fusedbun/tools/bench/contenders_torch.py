"""The torch optimizers: ours on every path, torch's own, and those of other packages. Imports torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from fusedbun.tools.bench.arena import Arena
from fusedbun.tools.bench.contenders import LEARNING_RATE, TORCH, TORCH_OURS, TORCH_PACKAGES, Contender, held_bytes
from fusedbun.tools.shared.machine import peak_during
from fusedbun.torch import IMPLEMENTATIONS

Params = list[nn.Parameter]
Rows: TypeAlias = tuple[tuple[str, str, dict[str, Any], int], ...]

REFERENCE = "AdamW, fused"  # of the path `TORCH`: what every other time is divided by
OURS = "fusedbun.torch"


class Optimizer(NamedTuple):
    """A class and its arguments.

    Args:
        module: the module that has the class.
        name: the class's name.
        settings: its arguments beside parameters and learning rate.
        dtype: of parameters and gradients.
        spoils_gradients: it computes in them, and so gets copies.
    """

    module: str
    name: str
    settings: Mapping[str, Any] = {}
    dtype: torch.dtype = torch.float32
    spoils_gradients: bool = False

    def make(self, params: Params) -> Any:
        """The optimizer of some parameters; ours gets their names, which u-muP's rule reads."""
        given = [(f"p{k}", param) for k, param in enumerate(params)] if self.module == OURS else params
        return getattr(import_module(self.module), self.name)(given, lr=LEARNING_RATE, **self.settings)


_FUSEDBUN = {"centralize": True, "use_rms": True}
_ROUNDED = {"stochastic_rounding": True}
# Name, class, arguments, how often more than once the gradient has to be read.
_OURS: Rows = (
    ("SM3", "SM3", {}, 0),
    ("SM3, momentum", "SM3", {"momentum": 0.9}, 0),
    ("Fusedbun", "Fusedbun", _FUSEDBUN, 1),
    ("Fusedbun, lagged", "Fusedbun", {**_FUSEDBUN, "lagged": True}, 0),
    ("DecoupledLionW", "DecoupledLionW", {}, 0),
    ("MupAdamW", "MupAdamW", {"mup": lambda path, param: "weight"}, 0),
    ("ScaledOptum", "ScaledOptum", {}, 0),
)
# The same on bfloat16 parameters, where the default path alone is measured.
_OURS_BFLOAT16: Rows = (
    ("SM3, bfloat16", "SM3", {}, 0),
    ("SM3, bfloat16 rounded stochastically", "SM3", _ROUNDED, 0),
    ("Fusedbun, bfloat16, int8", "Fusedbun", {**_FUSEDBUN, "momentum_dtype": "int8"}, 1),
    *(
        (
            f"Fusedbun, bfloat16 rounded stochastically, {d}",
            "Fusedbun",
            {**_FUSEDBUN, "momentum_dtype": d, **_ROUNDED},
            1,
        )
        for d in ("int8", "int4")
    ),
)
_OWN: Rows = (
    (REFERENCE, "AdamW", {"fused": True}, 0),
    ("AdamW, foreach", "AdamW", {"foreach": True}, 0),
    ("AdamW, for-loop", "AdamW", {"foreach": False, "fused": False}, 0),
    ("SGD, fused", "SGD", {"fused": True}, 0),
    ("SGD, momentum, fused", "SGD", {"momentum": 0.9, "fused": True}, 0),
    ("Adafactor", "Adafactor", {}, 1),
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
_SPOILS_GRADIENTS = {"Adalite"}


class TorchStepper:
    """A torch optimizer on an arena's parameters.

    Args:
        optimizer: the optimizer.
        arena: what it steps.
    """

    def __init__(self, optimizer: Optimizer, arena: Arena) -> None:
        self._params, self._grads = _shared(arena, optimizer.dtype)
        self._copies = optimizer.spoils_gradients
        self._optimizer = optimizer.make(self._params)

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
    found = []
    for path, choice in [(TORCH_OURS, {}), *((f"{TORCH_OURS} {x}", {"implementation": x}) for x in IMPLEMENTATIONS)]:
        for name, cls, settings, rereads in _OURS:
            found.append(_contender(path, name, rereads, Optimizer(OURS, cls, {**settings, **choice})))
    for name, cls, settings, rereads in _OURS_BFLOAT16:
        found.append(_contender(TORCH_OURS, name, rereads, Optimizer(OURS, cls, settings, torch.bfloat16)))
    for name, cls, settings, rereads in _OWN:
        found.append(_contender(TORCH, name, rereads, Optimizer("torch.optim", cls, settings)))
    for package, module, cls, rereads in _PACKAGES:
        optimizer = Optimizer(module, cls, spoils_gradients=cls in _SPOILS_GRADIENTS)
        found.append(_contender(TORCH_PACKAGES, f"{package} {cls}", rereads, optimizer, package))
    return found


def _contender(path: str, name: str, rereads: int, optimizer: Optimizer, package: str | None = None) -> Contender:
    module = optimizer.module if package else None
    return Contender(path, name, partial(TorchStepper, optimizer), module, package, rereads, optimizer.dtype.itemsize)


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
        params = [nn.Parameter(torch.from_numpy(array).to(dtype)) for array in arena.params]
        arena.shared[key] = params, [torch.from_numpy(array).to(dtype) for array in arena.grads]
    found: tuple[Params, list[Tensor]] = arena.shared[key]
    return found
