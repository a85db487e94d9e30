"""SM3's accumulators: a second moment for every element from one vector per axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import mul
from typing import ClassVar, Literal

from fusedbun.hyper import Axis, PerParam, UnitInterval, choose, sqrt
from fusedbun.transform import (
    Array,
    Namespace,
    Shape,
    Signal,
    Slot,
    State,
    Transform,
    check_channel_axis,
    from_start,
    others,
)


@dataclass(frozen=True)
class SM3Accumulate(Transform):
    """Keeps statistics of the squared update along each axis, and hands on the second moment `nu` they imply.

    The update itself passes unchanged. With `s = u*u` and one accumulator `a_i` for each axis i, of the parameter's
    size along i and size 1 along the others:

        statistic="max", combine="min" (SM3-II):
            nu  = beta*min_i(a_i) + (1 - beta)*s        (min_i(a_i) + s where beta == 0)
            a_i = max(a_i, max(nu over every axis but i))
        statistic="mean":
            a_i = beta*a_i + (1 - beta)*mean(s over every axis but i)
            nu  = a_0 * prod_{i>0}(a_i / mean(a_0))     for combine="product"; 0 where that mean is 0
            nu  = min_i(a_i)                            for combine="min"

    With `bias_correction` each `a_i` in `nu` is divided by `1 - beta**n` in step n = 1, 2, …; what is kept is not.

    Args:
        beta: the share of the past that is kept, in [0, 1).
        statistic: "max" or "mean", what an accumulator keeps of the squares.
        combine: "min" or "product", how the accumulators make a second moment; "product" only of means.
        lagged: for means, `nu` is formed with this step's `a_0` and the other accumulators (and their mean) as they
            were before this step, each ratio `a_i / mean` being 1 where that mean is 0. Then no statistic has to see
            the whole parameter before it is updated: one pass over memory instead of two. And
            `nu = max(nu, (1 - beta)*s)`, or an element would leap whose column was 0 so far.
        channel_axis: the axis that is meant with `a_0` there, an integer or a rule `(path, param) -> int`. Another than
            0 takes a second pass over memory.
        bias_correction: for means, correct them for their start, as Adam's are.
        covers: "axes", or "rows" to keep the leading axis's accumulator only. A row then depends on no other, which
            serves gradients that touch few rows.

    State: the accumulators, `sum(n_i)` numbers (`n_1` for rows); for 0 or 1 axes one of the parameter's shape; with
        bias_correction the step counter.
    Source: Anil, Gupta, Koren, Singer 2019, arXiv 1901.11150 (SM3-II); Shazeer, Stern 2018, arXiv 1804.04235
        (the rank-one product of means).
    """

    name: ClassVar[str] = "sm3_accumulate"
    makes_second_moment: ClassVar[bool] = True
    beta: UnitInterval = 0.0
    statistic: Literal["max", "mean"] = "max"
    combine: Literal["min", "product"] = "min"
    lagged: bool = False
    covers: Literal["axes", "rows"] = "axes"
    bias_correction: bool = False
    channel_axis: PerParam[Axis] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.statistic == "max" and self.combine == "product":
            raise ValueError('sm3_accumulate: combine="product" is for statistic="mean"; maxima take combine="min"')
        if self.statistic == "max" and self.lagged:
            raise ValueError('sm3_accumulate: lagged=True is for statistic="mean"; with "max" there is nothing to lag')
        if self.statistic == "max" and self.bias_correction:
            raise ValueError('sm3_accumulate: bias_correction=True is for statistic="mean"; maxima have no bias')

    def slots(self, shape: Shape) -> Mapping[str, Slot]:
        check_channel_axis(self.name, self.channel_axis, shape)
        return {f"axis{i}": Slot((i,)) for i in range(len(shape) if self.covers == "axes" and shape else 1)}

    @property
    def counts(self) -> bool:
        return self.bias_correction

    def for_rows(self) -> Transform:
        if self.statistic != "max":
            raise TypeError('sm3_accumulate steps rows alone with statistic="max"; means forget in every row at once')
        return replace(self, covers="rows")

    def update(self, xp: Namespace, signal: Signal, state: State, param: Array) -> tuple[Signal, State]:
        u = signal.update
        old = [a for name, a in state.items() if name != "step"]
        weight = from_start(xp, self.beta, state["step"]) if self.bias_correction else None
        make = self._max if self.statistic == "max" else self._mean
        signal, new = make(xp, u, old, weight)
        return signal, {f"axis{i}": a for i, a in enumerate(new)}

    def _max(self, xp: Namespace, u: Array, old: list[Array], weight: None) -> tuple[Signal, list[Array]]:
        keep = choose(xp, self.beta == 0, 1.0, self.beta)  # at 0 squares are summed and nothing is forgotten
        nu = keep * reduce(xp.minimum, leading_last(old)) + (1 - self.beta) * (u * u)
        new = [xp.maximum(a, xp.max(nu, axis=others(nu, i), keepdims=True)) for i, a in enumerate(old)]
        return Signal(u, nu), new

    def _mean(self, xp: Namespace, u: Array, old: list[Array], weight: Array | None) -> tuple[Signal, list[Array]]:
        s = u * u
        fresh = [xp.mean(s, axis=others(s, i), keepdims=True) for i in range(len(old))]
        new = [self.beta * a + (1 - self.beta) * m for a, m in zip(old, fresh, strict=True)]
        known = old if self.lagged else new
        channel = self.channel_axis % len(old)
        rest = [a for i, a in enumerate(known) if i != channel]
        first = new[channel] if weight is None else new[channel] / weight
        is_floored = self.lagged and rest
        if rest and self.combine == "product":
            c = xp.mean(known[0], axis=(0,), keepdims=True)  # the mean of every accumulator is this one number
            ratios = [xp.where(c == 0, 1.0, a / xp.where(c == 0, 1.0, c)) for a in rest]
            root = reduce(mul, map(xp.sqrt, ratios)) * xp.sqrt(first)
            root = xp.maximum(root, sqrt(xp, 1 - self.beta) * xp.abs(u)) if is_floored else root
            return Signal(u, root=root), new
        nu = reduce(xp.minimum, [*(a if weight is None else a / weight for a in rest), first])
        return Signal(u, xp.maximum(nu, (1 - self.beta) * s) if is_floored else nu), new


def leading_last(accumulators: list[Array]) -> list[Array]:
    """The leading axis's accumulator at the end, so that what is combined grows to full size as late as it can."""
    return [*accumulators[1:], accumulators[0]]
