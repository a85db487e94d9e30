"""Chains of one rule, for tests of what the compiler makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fusedbun import Chain, Signal, Slot, Transform, chain


def rule(update: Callable[[Any, Any], Any]) -> Chain:
    """A chain whose update is `update(xp, u)`."""

    class Rule(Transform):
        name = "rule"

        def update(self, xp, signal, state, param):
            return Signal(update(xp, signal.update)), state

    return chain(Rule())


def stateful(slots: Mapping[str, Slot], update: Callable[[Any, Any, Any], Any]) -> Chain:
    """A chain whose new state is `update(xp, u, state)`, for slots of matrices; the update passes unchanged."""

    class Stateful(Transform):
        name = "rule"

        def slots(self, shape):
            return slots

        def update(self, xp, signal, state, param):
            return signal, update_state(xp, signal.update, state)

    update_state = update
    return chain(Stateful())
