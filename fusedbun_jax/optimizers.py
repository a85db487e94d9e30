"""The optax factories, one for each recipe and made from it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from numbers import Real
from typing import Annotated, Any

import jax

from fusedbun.hyper import Whole, check
from fusedbun.recipe import INITIAL_LR, KEYWORD, POSITIONAL, Recipe
from fusedbun.recipes import RECIPES
from fusedbun.storage.rounding import Rounding
from fusedbun_jax import leaf
from fusedbun_jax.step import ROUNDING, Driver, Masked, SteppingTransformation

_RATE = "    learning_rate: a number in [0, inf), or a schedule.\n"
_INITIAL_RATE = """\
    initial_learning_rate: the learning rate that the weight decay is meant for; None: the number given as
        learning_rate. It must be given beside a weight decay where that is a schedule, and under
        optax.inject_hyperparams.
"""
_ROUNDING = """
`stochastic_rounding=True` rounds bfloat16 parameters to either neighbour, without a bias, instead of to the nearest, so
that steps much smaller than a parameter's precision still move it; the updates are float32 then. `seed`, an integer
(None: 0), decides the noise of this and of all rounding of state; with the same seed, paths of the parameters and
number of steps, it is the same on any device and in torch.
"""
_STATIC = """
Under optax.inject_hyperparams give static_args={static}: these choose code or state, and cannot be scheduled.
"""
_BETAS = ("b1", "b2")  # as optax.adamw calls them
# The driver's keyword arguments. The seed's default is no number, or inject_hyperparams would make an array of it.
_KEYWORDS = {"stochastic_rounding": False, "seed": None}
_DECLARED = {**ROUNDING, "seed": Annotated[int, Whole()] | None}
_INJECTED = """
For parameters of 16 bits give optax.inject_hyperparams hyperparam_dtype=jnp.float32, or it rounds the numbers to the
parameters' dtype. A momentum that is injected has state at 0 too; name it in static_args to have none.
"""


def factory(recipe: Recipe) -> Callable[..., SteppingTransformation]:
    """The optax factory of a recipe: its arguments behind a learning rate, spelled out in the signature."""

    def make(*args: Any, **kwargs: Any) -> SteppingTransformation:
        settings = {"learning_rate": recipe.lr, **recipe.bind(f"{make.__name__}()", signature, *args, **kwargs)}
        learning_rate = settings.pop("learning_rate")
        if recipe.wants_initial_lr:
            initial = settings.pop("initial_learning_rate")
            is_number = isinstance(learning_rate, Real) and initial is None
            settings[INITIAL_LR] = learning_rate if is_number else initial
        mask = settings.pop("mask", None)
        if recipe.like_optax:
            settings["betas"] = tuple(settings.pop(name) for name in _BETAS)
        keywords = {name: settings.pop(name) for name in _KEYWORDS}
        check(make.__name__, _DECLARED, keywords)
        if "mup" in settings:
            settings["mup"] = _types_by_name(settings["mup"])
        if notice := recipe.notice(settings):
            warnings.warn(f"{make.__name__}: {notice}", stacklevel=2)
        rounding = Rounding(bool(keywords["stochastic_rounding"]), int(keywords["seed"] or 0))
        chain = replace(recipe.make(**settings), rounding=rounding)
        made_by = (recipe.name, settings)
        return (
            Driver(chain, learning_rate, made_by) if mask is None else Masked(chain, learning_rate, made_by, mask)
        ).optimizer()

    default = inspect.Parameter.empty if recipe.lr is None else recipe.lr
    before = [] if recipe.fixed_lr else [inspect.Parameter("learning_rate", POSITIONAL, default=default)]
    initial_rate = inspect.Parameter("initial_learning_rate", KEYWORD, default=None)
    after = [initial_rate] if recipe.wants_initial_lr else []
    after += [inspect.Parameter(name, KEYWORD, default=value) for name, value in _KEYWORDS.items()]
    spelled_out = recipe.signature(before, after)
    signature = _like_optax(spelled_out) if recipe.like_optax else spelled_out
    make.__signature__ = signature  # type: ignore[attr-defined]  # to mypy a function has none to set
    make.__name__ = make.__qualname__ = recipe.name
    make.other_names = recipe.other_names  # type: ignore[attr-defined]  # for `by_name`
    arguments = ("" if recipe.fixed_lr else _RATE) + (_INITIAL_RATE if recipe.wants_initial_lr else "")
    static = tuple(name for name in signature.parameters if name in (*recipe.structural, "mask", *_KEYWORDS))
    remarks = _ROUNDING + _STATIC.format(static=static) + ("" if recipe.fixed_lr else _INJECTED)
    instead = {"betas": _BETAS, "weight_decay": ("weight_decay", "mask")} if recipe.like_optax else {}
    make.__doc__ = recipe.documentation(arguments, remarks, instead)
    return make


def _like_optax(signature: inspect.Signature) -> inspect.Signature:
    """The signature with the names that optax.adamw has."""
    parameters: list[inspect.Parameter] = []
    for p in signature.parameters.values():
        if p.name == "betas":
            parameters += [
                p.replace(name=n, default=beta, annotation="UnitInterval")
                for n, beta in zip(_BETAS, p.default, strict=True)
            ]
        else:
            parameters.append(p)
        if p.name == "weight_decay":
            parameters.append(inspect.Parameter("mask", POSITIONAL, default=None))
    return inspect.Signature(parameters)


def _types_by_name(types: Any) -> Any:
    """u-muP types in a tree like the parameters', of whatever nodes, as a mapping by dotted name."""
    if not isinstance(types, (Mapping, list, tuple)):
        return types
    leaves = jax.tree_util.tree_leaves_with_path(types, is_leaf=_is_type_with_depth)
    return {leaf.name(path): kind for path, kind in leaves}


def _is_type_with_depth(node: Any) -> bool:
    return type(node) is tuple and len(node) == 2 and isinstance(node[0], str) and not isinstance(node[1], str)


FACTORIES = {name: factory(recipe) for name, recipe in RECIPES.items()}
