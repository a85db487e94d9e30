"""What runs a step: the interface that every implementation has, whatever it is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor

from fusedbun.torch.leaf import Group, Leaf
from fusedbun.torch.state import State


class Repeat(Protocol):
    """Leaves that were stepped, and are stepped again as they are while nothing about them changes."""

    def holds(self, groups: list[Group], state: Mapping[Tensor, State]) -> bool:
        """Whether nothing has changed but numbers, which it takes up, and gradients; if so, `step` may be called."""

    def leaves(self) -> list[Leaf]:
        """The leaves, for another step of them together with others."""

    def step(self) -> None:
        """Steps the leaves that have a gradient."""


class Implementation(ABC):
    """One way to run a step. All do what the definition says, and differ in speed and memory only.

    For each parameter with a gradient `dispatch` asks one after the other for a `refusal`, and has the first that has
    none `prepare` the leaf; when all are prepared and their state is up to date, each is to `step` its own.
    """

    name: ClassVar[str]
    error: ClassVar[str] = "{owner}: implementation={asked!r} cannot step {leaf}"  # where there is no other to ask
    at_once: ClassVar[bool] = False  # its leaves are stepped at once, so no two of them may share memory
    together: ClassVar[str] = ""  # what it does to all parameters together, if it is not for one that comes alone

    @abstractmethod
    def refusal(self, leaf: Leaf) -> str | None:
        """Why it does not serve such tensors, whatever the chain is; None: it may serve them."""

    @abstractmethod
    def prepare(self, leaf: Leaf) -> Any:
        """What it steps the leaf with, to be found in `leaf.prepared`; nothing is changed yet.

        Raises a KernelError or UnplannableError where it cannot step the leaf's chain.
        """

    @abstractmethod
    def step(self, leaves: Sequence[Leaf]) -> Repeat | None:
        """Steps the leaves; may return what steps them again, without their being prepared again."""
