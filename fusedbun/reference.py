"""The reference driver: NumPy, float64, a loop. What the tests hold every other driver against."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from fusedbun.chain import Chain, step

Tree = dict[str, np.ndarray[Any, Any]]


class Reference:
    """Steps a dict of parameters with a chain, in float64.

    Args:
        params: the parameters by name; they are copied.
        chain: the chain.
        lr: the learning rate.
    """

    def __init__(self, params: Tree, chain: Chain, lr: float) -> None:
        self.params = {name: np.array(p, np.float64) for name, p in params.items()}
        self.chains = {name: chain.at(tuple(name.split(".")), p) for name, p in self.params.items()}
        self.lr = lr
        self.state = {
            name: {key: np.zeros(slot.shape(p.shape)) for key, slot in self.chains[name].slots(p.shape).items()}
            for name, p in self.params.items()
        }

    def step(self, grads: Tree) -> Tree:
        """One step of every parameter that has a gradient in `grads`; returns the parameters."""
        for name, grad in grads.items():
            p, g = self.params[name], np.asarray(grad, np.float64)
            if p.size:
                self.params[name], self.state[name] = step(np, self.chains[name], self.lr, p, g, self.state[name])
        return self.params

    def run(self, steps: Iterable[Tree]) -> Tree:
        """A step for every dict of gradients; returns the parameters after the last."""
        for grads in steps:
            self.step(grads)
        return self.params
