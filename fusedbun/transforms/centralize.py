"""Gradient centralization (Yong, Huang, Hua, Zhang 2020, arXiv 2004.01461)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fusedbun.hyper import Axis, PerParam, choose
from fusedbun.transform import (
    Array,
    Namespace,
    Shape,
    Signal,
    Slot,
    State,
    Transform,
    check_channel_axis,
    count,
    others,
)


@dataclass(frozen=True)
class Centralize(Transform):
    """Takes from every channel of the update its mean.

        u = u - mean(u over every axis but channel_axis)

    A parameter of fewer than two axes is left as it is, and so is one whose channels are single elements: each would be
    its own mean, and would never move.

    Args:
        channel_axis: the axis that is kept, an integer (0 is torch's output channel), or a rule
            `(path, param) -> int` such as `fusedbun_jax.flax_channel_axis`.
    """

    name: ClassVar[str] = "centralize"
    channel_axis: PerParam[Axis] = 0

    def slots(self, shape: Shape) -> Mapping[str, Slot]:
        check_channel_axis(self.name, self.channel_axis, shape)
        return {}

    def update(self, xp: Namespace, signal: Signal, state: State, param: Array) -> tuple[Signal, State]:
        u = signal.update
        if u.ndim < 2:
            return Signal(u), state
        axes = others(u, self.channel_axis)
        mean = xp.mean(u, axis=axes, keepdims=True)
        return Signal(u - choose(xp, count(u, axes) == 1, 0.0, mean)), state
