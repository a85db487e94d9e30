"""What is stepped and by whom: arrays, what a contender declares, and what it does once it is set up."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fusedbun.transform import Shape

Array = NDArray[np.float32]
Rows: TypeAlias = tuple[tuple[str, str, dict[str, Any], int], ...]

# The paths, in the order in which they are shown; a path of ours in torch is `TORCH_OURS` and its implementation.
LIMIT = "limit"
TORCH_OURS = "fusedbun"
JAX_OURS = "fusedbun_jax"
TORCH = "torch"
TORCH_PACKAGES = "packages for torch"
OPTAX = "optax"
PEERS = ("torch-SM3", "pytorch_optimizer", "lion-pytorch", "torch-optimi", "heavyball")  # the other packages

FUSEDBUN = {"centralize": True, "use_rms": True}
# Ours: the recipe, what follows its name, arguments, how often more than once the gradient has to be read.
OURS: Rows = (
    ("sm3", "", {}, 0),
    ("sm3", ", momentum", {"momentum": 0.9}, 0),
    ("fusedbunw", "", {}, 0),
    ("fusedbunw", ", momentum float32", {"momentum_dtype": None}, 0),
    ("fusedbunw", ", momentum int4", {"momentum_dtype": "int4"}, 0),
    ("fusedbun", "", FUSEDBUN, 1),
    ("fusedbun", ", lagged", {**FUSEDBUN, "lagged": True}, 0),
    ("decoupled_lionw", "", {}, 0),
    ("mup_adamw", "", {"mup": lambda path, param: "weight"}, 0),
    ("scaled_optum", "", {}, 0),
)
# Large enough for numbers to move, small enough for them to stay where they are over thousands of steps.
LEARNING_RATE = 1e-6

_LINE = 64  # bytes of a cache line, which is also how torch and XLA align their arrays
_DRAWN = 1 << 20  # numbers drawn; more of them repeat these


@dataclass
class Arena:
    """Parameters and gradients that all contenders of a framework step, so that a hundred of them fit in memory."""

    params: list[Array]  # of a network's usual size
    grads: list[Array]
    threads: int  # that a step runs on
    shared: dict[str, Any] = field(default_factory=dict)  # what a framework's contenders make of these once

    @classmethod
    def of(cls, shapes: Sequence[Shape], threads: int) -> Arena:
        """An arena of some shapes; its numbers are always the same."""
        drawn = np.random.default_rng(0).standard_normal(_DRAWN, np.float32)
        params, grads = ([zeros(s) for s in shapes] for _ in range(2))
        for arrays, numbers in ((params, 0.02 * drawn), (grads, 0.01 * drawn[::-1])):
            for array in arrays:
                array.reshape(-1)[:] = np.resize(numbers, array.size)
        return cls(params, grads, threads)


def zeros(shape: Shape) -> Array:
    """An array of zeros that begins on a cache line."""
    size = math.prod(shape)
    raw = np.zeros(size + _LINE // 4, np.float32)
    start = -raw.ctypes.data % _LINE // 4
    return raw[start : start + size].reshape(shape)


class Stepper(Protocol):
    """A contender, set up."""

    def prepare(self) -> None:
        """Whatever a step needs and is not part of it: nothing, where no more is said."""
        return

    def step(self) -> None: ...  # one step, to its end
    def state_bytes(self) -> int: ...  # the bytes of state, after a step

    def temporaries(self) -> int | None:
        """The most bytes that a step holds beside parameters, gradients and state; None: not known. May step."""


@dataclass(frozen=True)
class Contender:
    """Someone to measure."""

    path: str  # how it is computed, or where it comes from; contenders of a path are shown together
    name: str  # the optimizer, unique in its path
    make: Callable[[Arena], Stepper]  # sets it up
    module: str | None = None  # that has to be installed for it
    package: str | None = None  # that brings the module
    rereads: int = 0  # so often more than once has the gradient to be read: for a statistic of a whole tensor
    itemsize: int = 4  # the bytes of an element of the parameters and of their gradients

    @property
    def label(self) -> str:
        """Path and name, which `--only` searches."""
        return f"{self.path} {self.name}"

    @property
    def installed(self) -> bool:
        """Whether its module can be found."""
        return self.module is None or importlib.util.find_spec(self.module) is not None

    def bytes_per_parameter(self, state: float) -> float:
        """The bytes that a step has to move, with so many of state: parameter and state twice, the gradient."""
        return self.itemsize * (3 + self.rereads) + 2 * state


def held_bytes(state: Any) -> int:
    """The bytes of all arrays in nested containers, each counted once."""
    found: dict[int, int] = {}
    pending = [state]
    while pending:
        value = pending.pop()
        if hasattr(value, "nbytes") and hasattr(value, "dtype"):
            found[id(value)] = int(value.nbytes)
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, (list, tuple)):
            pending += value
    return sum(found.values())
