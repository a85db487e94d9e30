"""The one table of cases: every optimizer under its settings, for every realisation of it.

A case names a chain and says how torch and optax realise it. `SHAPES` and `STEPS` are what each of them is run on.
The settings of an optimizer are what its recipe says of itself (`tested`).
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
from fusedbun import Chain, ChainOptimizer
from fusedbun.recipe import Settings
from fusedbun.recipes import RECIPES
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
# Adam divides every element by its own size: where a decay added to the gradient nearly cancels it, what is left is
# float32's rounding noise, lifted to order one. Such a case is held to the reference in float64 only.
CANCELLING = {"mup_adam decay"}


@dataclass(frozen=True)
class Case:
    name: str
    chain: Chain
    lr: float
    torch: Callable[..., torch.optim.Optimizer]  # of parameters and the driver's own arguments
    optax: Callable[[], optax.GradientTransformation]
    ternary: bool = False  # the parameters are -1, 0 and +1
    cancels: bool = False

    def __str__(self) -> str:
        return self.name


def of_recipe(name: str, title: str, settings: Settings) -> Case:
    recipe = RECIPES[name]
    rate = {} if recipe.fixed_lr else {"lr": LR}
    given = {**settings, **({"mup": by_size} if "mup" in recipe.defaults else {})}
    return Case(
        case := f"{name} {title}".strip(),
        recipe.chain(given, LR),
        LR,
        lambda params, **own: getattr(fusedbun, recipe.torch_class)(params, **rate, **given, **own),
        lambda: getattr(fusedbun_jax, recipe.name)(*rate.values(), **for_optax(name, given)),
        ternary=recipe.fixed_lr,
        cancels=case in CANCELLING,
    )


def for_optax(name: str, settings: Settings) -> Settings:
    """The settings of a recipe as its optax factory spells them."""
    if not RECIPES[name].like_optax or "betas" not in settings:
        return settings
    others = {name: value for name, value in settings.items() if name != "betas"}
    return {"b1": settings["betas"][0], "b2": settings["betas"][1], **others}


def of_chain(title: str, *transforms: fusedbun.Transform) -> Case:
    chain = fusedbun.chain(*transforms)
    return Case(
        title,
        chain,
        LR,
        lambda params, **own: ChainOptimizer(params, chain, LR, **own),
        lambda: fusedbun_jax.from_chain(chain, LR),
    )


def by_size(path: tuple[str, ...], param: Any) -> Any:
    """u-muP types for parameters without names: the same rule in both frameworks."""
    return (None, "bias", ("weight", 2), "output", "weight", "norm")[len(param.shape)] or "norm"


CASES = [
    *(of_recipe(name, title, settings) for name, r in RECIPES.items() for title, settings in r.tested.items()),
    of_chain("mean min", SparseMask(0.5), SM3Accumulate(0.9, "mean", "min"), RMSScale(1e-8), Decay(0.1)),
    of_chain("zero over zero", SparseMask(0.5), SM3Accumulate(0.9, "max", "min"), RMSScale(0.0, 0.0)),
    of_chain("rows", SM3Accumulate(0.9, "max", "min", covers="rows"), RMSScale(0.0, 1e-30)),
    of_chain("no statistics", Centralize(), ClipRMS(0.3), Momentum(0.5, 0.25, nesterov=True)),
]
# One of each optimizer, and a chain of its own: what stands for all of them where each takes long.
FEW = (
    *(
        "fusedbun recommended",
        "sm3 momentum",
        "scaled_optum",
        "ternary_vote",
        "mup_adam",
        "mup_adamw amsgrad",
        "mup_sgd",
    ),
    *("decoupled_lionw", "rows"),
)
by_case = {"argnames": "case", "argvalues": CASES, "ids": str}


@cache
def problem(dtype: str, ternary: bool = False) -> tuple[Tree, list[Tree]]:
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
    if ternary:
        params = {name: np.rint(np.clip(10 * p, -1, 1)) for name, p in params.items()}
    return params, [{name: gradient(shape) for name, shape in SHAPES.items()} for _ in range(STEPS)]


@cache
def expected(name: str, dtype: str) -> tuple[Tree, Tree]:
    """The reference's parameters after the last step, and the size of each leaf's largest update."""
    (case,) = (case for case in CASES if case.name == name)
    params, steps = problem(dtype, case.ternary)
    reference = Reference(params, case.chain, case.lr)
    largest = {leaf: np.zeros(()) for leaf in params}
    for grads in steps:
        before = dict(reference.params)
        reference.step(grads)
        for leaf, p in reference.params.items():
            largest[leaf] = np.maximum(largest[leaf], np.abs(p - before[leaf]).max())
    return reference.params, largest
