"""The reference driver: NumPy, float64, a loop. What the tests hold every other driver against."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from fusedbun import namespace
from fusedbun.chain import Chain, slice_shape, step
from fusedbun.storage.codes import STEP
from fusedbun.storage.rounding import TO_NEAREST
from fusedbun.storage.storage import Storage
from fusedbun.transform import Array, Shape, Slot, State

Tree = dict[str, np.ndarray[Any, Any]]


class Exact(Storage):
    """Stores what is computed as it is, whatever the slots' codes."""

    def decode(self, key: str, slot: Slot, stored: State) -> Array:
        return stored[key]

    def encode(self, key: str, slot: Slot, value: Array, stored: State) -> dict[str, Array]:
        return {key: value}


def exact_step(xp: Any, chain: Chain, lr: Any, param: Array, grad: Array, state: State) -> tuple[Array, State]:
    """One exact step of one parameter with any library of arrays: the new parameter and the new state.

    Args:
        xp: the functions.
        chain: the chain.
        lr: the learning rate.
        param: the parameter.
        grad: its gradient.
        state: what `Chain.slots` declares, by the same names, and the step counter.
    """
    return step(chain, Exact(xp, TO_NEAREST, param, "float64"), lr, param, grad, state)


def start(chain: Chain, shape: Shape) -> State:
    """The state of a parameter before its first step, and the counter."""
    stack, of = shape[: chain.stacked], slice_shape(shape, chain.stacked)
    slots = {key: np.zeros((*stack, *slot.shape(of))) for key, slot in chain.slots(shape).items()}
    return slots | {STEP: np.zeros(stack)}


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
        self.state: dict[str, State] = {name: start(self.chains[name], p.shape) for name, p in self.params.items()}

    def step(self, grads: Tree) -> Tree:
        """One step of every parameter that has a gradient in `grads`; returns the parameters."""
        for name, grad in grads.items():
            p, g = self.params[name].copy(), np.asarray(grad, np.float64)
            chain, state = self.chains[name], {key: x.copy() for key, x in self.state[name].items()}
            self.params[name], self.state[name] = p, state
            for place in np.ndindex(p.shape[: chain.stacked]) if p.size else ():
                before = {key: x[place] for key, x in state.items()}
                p[place], after = exact_step(namespace, chain.slice(place), self.lr, p[place], g[place], before)
                for key, x in after.items():
                    state[key][place] = x
        return self.params

    def run(self, steps: Iterable[Tree]) -> Tree:
        """A step for every dict of gradients; returns the parameters after the last."""
        for grads in steps:
            self.step(grads)
        return self.params
