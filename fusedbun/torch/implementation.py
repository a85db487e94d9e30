"""What runs a step: the interface that every implementation has, whatever it is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from fusedbun.torch.leaf import Leaf


class Implementation(ABC):
    """One way to run a step. All do what the definition says, and differ in speed and memory only.

    For each parameter with a gradient `dispatch` asks one after the other for a `refusal`, and has the first that has
    none `prepare` the leaf; when all are prepared and their state is up to date, each is to `step` its own.
    """

    name: ClassVar[str]
    error: ClassVar[str] = "{owner}: implementation={asked!r} cannot step {leaf}"  # where there is no other to ask

    def refusal(self, leaf: Leaf) -> str | None:
        """Why it does not serve such tensors, whatever the chain is; None: it may serve them."""
        return None

    def prepare(self, leaf: Leaf) -> Any:
        """What it steps the leaf with, to be found in `leaf.prepared`; nothing is changed yet.

        Raises a KernelError or UnschedulableError where it cannot step the leaf's chain.
        """
        return None

    @abstractmethod
    def step(self, leaves: Sequence[Leaf]) -> None:
        """Steps the leaves."""
