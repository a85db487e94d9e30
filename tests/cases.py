"""The one table of cases: every optimizer under its settings, for every realisation of it.

A case names a chain and says how torch and optax realise it. `SHAPES` and `STEPS` are what each of them is run on.
A new optimizer is one line here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import optax
import torch

import fusedbun
import fusedbun_jax
from fusedbun import Chain, ChainOptimizer, recipes
from fusedbun.reference import Reference, Tree
from fusedbun.transforms import Centralize, ClipRMS, Decay, Momentum, RMSScale, SM3Accumulate, SparseMask

SHAPES = {
    "scalar": (),
    "vector": (17,),
    "matrix": (8, 16),
    "pairs": (9, 2),
    "cube": (3, 4, 5),
    "convolution": (8, 3, 3, 3),
    "tall": (50_257, 8),
}
STEPS = 4
LR = 1.0


@dataclass(frozen=True)
class Case:
    name: str
    chain: Chain
    torch: Callable[[Any], torch.optim.Optimizer]
    optax: Callable[[], optax.GradientTransformation]

    def __str__(self) -> str:
        return self.name


def of_recipe(name: str, recipe: str, torch_class: str, **hyperparameters: Any) -> Case:
    return Case(
        name,
        getattr(recipes, recipe)(**hyperparameters),
        lambda params: getattr(fusedbun, torch_class)(params, lr=LR, **hyperparameters),
        lambda: getattr(fusedbun_jax, recipe)(LR, **hyperparameters),
    )


def of_chain(name: str, *transforms: fusedbun.Transform) -> Case:
    chain = fusedbun.chain(*transforms)
    return Case(
        name, chain, lambda params: ChainOptimizer(params, chain, LR), lambda: fusedbun_jax.from_chain(chain, LR)
    )


def of_fusedbun(name: str, **hyperparameters: Any) -> Case:
    return of_recipe(f"fusedbun {name}", "fusedbun", "Fusedbun", **hyperparameters)


RECOMMENDED: dict[str, Any] = {"centralize": True, "use_rms": True, "nesterov": True}
CASES = [
    of_fusedbun("default"),
    of_fusedbun("recommended", **RECOMMENDED),
    of_fusedbun("clipped", **RECOMMENDED, clip_rms=0.5),
    of_fusedbun("lagged", **RECOMMENDED, lagged=True),
    of_fusedbun("without momentum", centralize=True, use_rms=True, momentum_beta=0.0, Lambda=0.0),
    of_fusedbun("without memory", use_rms=True, beta_decay=0.0, eps=1e-3),
    of_fusedbun("last axis", **RECOMMENDED, channel_axis=-1),
    of_chain("sm3", SM3Accumulate(0.0, "max", "min"), RMSScale(0.0, 1e-30)),
    of_chain("sm3 beta", SM3Accumulate(0.9, "max", "min"), RMSScale(0.0, 1e-30), Momentum(0.9, 0.9)),
    of_chain("mean min", SparseMask(0.5), SM3Accumulate(0.9, "mean", "min"), RMSScale(1e-8), Decay(0.1)),
    of_chain("zero over zero", SparseMask(0.5), SM3Accumulate(0.9, "max", "min"), RMSScale(0.0, 0.0)),
    of_chain("no statistics", Centralize(), ClipRMS(0.3), Momentum(0.5, 0.25, nesterov=True)),
]
by_case = {"argnames": "case", "argvalues": CASES, "ids": str}


@cache
def problem(dtype: str) -> tuple[Tree, list[Tree]]:
    """Parameters and the gradients of each step, exact in `dtype`, as float64.

    Entries stay away from the mask's threshold, and rows from being constant: `centralize` leaves only rounding noise
    of a constant row, which `rms_scale` lifts to order one and each framework rounds apart.
    """
    rng = np.random.default_rng(7)

    def exact(x: np.ndarray) -> np.ndarray:
        return torch.tensor(x).to(getattr(torch, dtype)).double().numpy()

    def gradient(shape: tuple[int, ...]) -> np.ndarray:
        g = exact(rng.standard_normal(shape) * 10.0 ** rng.uniform(-1, 1))
        if g.ndim > 1 and g[0].size > 1:
            residual = np.abs(g - g.mean(axis=tuple(range(1, g.ndim)), keepdims=True))
            assert (residual.reshape(len(g), -1).max(axis=1) > 1e-3 * np.abs(g).reshape(len(g), -1).max(axis=1)).all()
        return g

    params = {name: exact(0.1 * rng.standard_normal(shape)) for name, shape in SHAPES.items()}
    return params, [{name: gradient(shape) for name, shape in SHAPES.items()} for _ in range(STEPS)]


@cache
def expected(name: str, dtype: str) -> tuple[Tree, Tree]:
    """The reference's parameters after the last step, and the size of each leaf's largest update."""
    (case,) = (case for case in CASES if case.name == name)
    params, steps = problem(dtype)
    reference = Reference(params, case.chain, LR)
    largest = {leaf: np.zeros(()) for leaf in params}
    for grads in steps:
        before = dict(reference.params)
        reference.step(grads)
        for leaf, p in reference.params.items():
            largest[leaf] = np.maximum(largest[leaf], np.abs(p - before[leaf]).max())
    return reference.params, largest
