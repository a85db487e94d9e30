"""Gradient centralization (Yong, Huang, Hua, Zhang 2020, arXiv 2004.01461)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fusedbun.hyper import Axis, PerParam
from fusedbun.transform import Array, Namespace, Shape, Signal, Slot, State, Transform, check_channel_axis, others


@dataclass(frozen=True)
class Centralize(Transform):
    """Takes from every channel of the update its mean; a parameter of fewer than two axes is left as it is.

        u = u - mean(u over every axis but channel_axis)

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
        return Signal(u - xp.mean(u, axis=others(u, self.channel_axis), keepdims=True)), state
