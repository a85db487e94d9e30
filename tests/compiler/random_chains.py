"""Chains composed at random from the transformations, valid by construction, the same in every run."""

from __future__ import annotations

import numpy as np

import fusedbun
from fusedbun import Chain, Transform
from fusedbun.transform import Shape
from fusedbun.transforms import (
    Centralize,
    Clip,
    ClipRMS,
    Decay,
    Momentum,
    RMSScale,
    ScaleByAdam,
    ScaleByLion,
    ScaleByMup,
    Sign,
    SignDecay,
    SM3Accumulate,
    SparseMask,
    Vote,
)

COUNT = 200
SHAPES: tuple[Shape, ...] = ((), (1,), (23,), (7, 5), (5, 7), (1, 9), (9, 1), (4, 3, 5), (3, 1, 6), (5, 2, 3, 2))


class Draw:
    """What is drawn by chance."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def one(self, *options):
        return options[self.rng.integers(len(options))]

    def switch(self) -> bool:
        return self.one(False, True)

    def unit(self) -> float:
        """A number in [0, 1), often 0."""
        return self.one(0.0, 0.5, float(self.rng.uniform(0.01, 0.99)))

    def small(self) -> float:
        """A number that is added to something, often 0."""
        return self.one(0.0, 1e-8, float(self.rng.uniform(0.01, 0.5)))

    def accumulator(self) -> list[Transform]:
        statistic, combine = self.one(("max", "min"), ("mean", "min"), ("mean", "product"))
        lagged = statistic == "mean" and self.switch()
        corrected = statistic == "mean" and self.switch()
        covers, axis = self.one("axes", "axes", "rows"), self.one(0, 0, -1)
        made = SM3Accumulate(self.unit(), statistic, combine, lagged, covers, corrected, axis)
        return [made, RMSScale(self.small(), self.small())] if self.one(True, True, False) else [made]

    def momentum(self) -> Transform:
        if self.one(True, False, False):
            beta = self.unit()
            return Momentum(beta, beta, self.switch(), bias_correction=True)
        return Momentum(self.unit(), self.unit(), self.switch(), undampened_start=self.switch())

    def links(self) -> list[list[Transform]]:
        """One of each transformation; those in a list stay together."""
        return [
            [Centralize(self.one(0, -1))],
            [SparseMask(self.small())],
            self.accumulator(),
            [self.momentum()],
            [Decay(self.small())],
            [SignDecay(self.small())],
            [ScaleByAdam(self.unit(), self.unit(), self.one(1e-8, 1e-3), self.switch())],
            [ScaleByLion(self.unit(), self.unit())],
            [ScaleByMup(self.one(1.0, 0.25, 3.0))],
            [ClipRMS(self.one(0.1, 1.0, 10.0))],
            [Clip(self.one(0.1, 1.0, 10.0))],
            [Sign()],
            [Vote(self.one(1, 3, 127))],
        ]


def random_chain(seed: int) -> Chain:
    """A chain of one to six transformations, or of pairs that belong together, in any order."""
    draw = Draw(seed)
    links = draw.links()
    chosen = draw.rng.permutation(len(links))[: draw.rng.integers(1, 7)]
    return fusedbun.chain(*(transform for i in chosen for transform in links[i]))


def random_problem(seed: int) -> tuple[Chain, Shape, tuple[int, ...], int]:
    """A chain, a shape, its axes from the slowest in memory to the fastest, and a size of blocks."""
    draw = Draw(seed + COUNT)
    shape = draw.one(*SHAPES)
    order = tuple(int(axis) for axis in draw.rng.permutation(len(shape)))
    return random_chain(seed), shape, order, draw.one(1, 3, 10, 1000)
