"""Who is measured: what a contender declares, and what it does once it is set up."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fusedbun.tools.bench.arena import Arena

# The paths, in the order in which they are shown; a path of ours in torch is `TORCH_OURS` and its implementation.
LIMIT = "limit"
TORCH_OURS = "fusedbun"
JAX_OURS = "fusedbun_jax"
TORCH = "torch"
TORCH_PACKAGES = "packages for torch"
OPTAX = "optax"
PEERS = ("torch-SM3", "pytorch_optimizer", "lion-pytorch", "torch-optimi", "heavyball")  # the other packages

# Large enough for numbers to move, small enough for them to stay where they are over thousands of steps.
LEARNING_RATE = 1e-6


class Stepper(Protocol):
    """A contender, set up."""

    def prepare(self) -> None:
        """Whatever a step needs and is not part of it."""

    def step(self) -> None:
        """One step, to its end."""

    def state_bytes(self) -> int:
        """The bytes of state, after a step."""

    def temporaries(self) -> int | None:
        """The most bytes that a step holds beside parameters, gradients and state; None: not known. May step."""


@dataclass(frozen=True)
class Contender:
    """Someone to measure.

    Args:
        path: how it is computed, or where it comes from; contenders of a path are shown together.
        name: the optimizer, unique in its path.
        make: sets it up on an arena.
        module: the module that has to be installed for it; None: it is there.
        package: the package that brings the module.
        rereads: how often more than once the algorithm has to read the gradient: a statistic of a whole tensor is
            needed before the first element can be written.
        itemsize: the bytes of an element of the parameters and of their gradients.
    """

    path: str
    name: str
    make: Callable[[Arena], Stepper]
    module: str | None = None
    package: str | None = None
    rereads: int = 0
    itemsize: int = 4

    @property
    def label(self) -> str:
        """Path and name, which `--only` searches."""
        return f"{self.path} {self.name}"

    @property
    def installed(self) -> bool:
        """Whether its module can be found."""
        return self.module is None or importlib.util.find_spec(self.module) is not None

    def bytes_per_parameter(self, state: float) -> float:
        """The bytes that a step has to move: the parameter twice, the gradient, the state twice.

        Args:
            state: the bytes of state per parameter.
        """
        return self.itemsize * (3 + self.rereads) + 2 * state


def select(contenders: Sequence[Contender], only: re.Pattern[str] | None) -> list[Contender]:
    """Those whose label the pattern is found in."""
    return [one for one in contenders if only is None or only.search(one.label)]


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
