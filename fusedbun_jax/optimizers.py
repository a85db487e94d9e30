"""The optax factories, one for each recipe and made from it."""

from __future__ import annotations

import inspect
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from numbers import Real
from typing import Any, get_args

import jax

from fusedbun.hyper import check, hints, is_concrete_zero, is_stateless_at_0, is_structural, plain
from fusedbun.recipe import INITIAL_LR, KEYWORD, POSITIONAL, Recipe
from fusedbun.recipes import RECIPES
from fusedbun.storage.rounding import Rounding
from fusedbun_jax import leaf
from fusedbun_jax.injected import Arguments, choosing, injectable
from fusedbun_jax.rounding import as_word
from fusedbun_jax.step import OPTIONS, Driver, Masked, SteppingTransformation

_RATE = "    learning_rate: a number in [0, inf), or a schedule.\n"
_INITIAL_RATE = """\
    initial_learning_rate: the learning rate that the weight decay is meant for; None: the number given as
        learning_rate. It must be given beside a weight decay where that is a schedule.
"""
_ROUNDING = """
`stochastic_rounding=True` rounds bfloat16 parameters to either neighbour, without a bias, instead of to the nearest, so
that steps much smaller than a parameter's precision still move it; their updates are float32. Others are rounded to the
nearest. `seed`, any integer, decides the noise of this and of all rounding of state; with the same seed, paths of the
parameters and number of steps, it is the same on any device and in torch. A 0-d array of one serves as well: under
jax.vmap each member of an ensemble has its own.
"""
_STACKED = """
`stacked` says how many leading axes make a parameter a stack of several of one kind, such as layers under `nn.scan`: a
number, or a rule `(path, param) -> number` as `flax_stacked` is one. Each slice is stepped as a parameter of its own.
"""
_STATIC = (
    "optax.inject_hyperparams leaves {static} as they are given: what chooses code or state, is constant or is no "
    "number cannot be scheduled."
)
_STATIC_AT_0 = " So it does {names} where that is given as 0, which needs no state."
_BETAS = ("b1", "b2")  # as optax.adamw calls them
_KEYWORDS = {"stochastic_rounding": False, "seed": 0, "stacked": 0}  # the driver's own arguments
_INJECTED = """
For parameters of 16 bits give it hyperparam_dtype=jnp.float32, or it rounds the numbers to the parameters' dtype.
"""


def factory(recipe: Recipe) -> Callable[..., SteppingTransformation]:
    """The optax factory of a recipe: its arguments behind a learning rate, spelled out in the signature."""

    def make(*args: Any, **kwargs: Any) -> SteppingTransformation:
        settings = {"learning_rate": recipe.lr, **recipe.bind(f"{make.__name__}()", signature, *args, **kwargs)}
        learning_rate = settings.pop("learning_rate")
        if recipe.wants_initial_lr:
            settings[INITIAL_LR] = _initial(learning_rate, settings.pop("initial_learning_rate"))
        mask = settings.pop("mask", None)
        if recipe.like_optax:
            settings["betas"] = tuple(settings.pop(name) for name in _BETAS)
        keywords = {name: settings.pop(name) for name in _KEYWORDS}
        check(make.__name__, OPTIONS, keywords)
        if "mup" in settings:
            settings["mup"] = _types_by_name(settings["mup"])
        if notice := recipe.notice(settings):
            warnings.warn(f"{make.__name__}: {notice}", stacklevel=3)
        rounding = Rounding(bool(keywords["stochastic_rounding"]), as_word(keywords["seed"]))
        chain = replace(recipe.make(**settings), rounding=rounding, stacked=plain(keywords["stacked"]))
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
    declared = _declared(recipe)
    remarks = _ROUNDING + _STACKED + _remark(declared, signature.parameters) + ("" if recipe.fixed_lr else _INJECTED)
    instead = {"betas": _BETAS, "weight_decay": ("weight_decay", "mask")} if recipe.like_optax else {}
    make.__doc__ = recipe.documentation(arguments, remarks, instead)
    return injectable(partial(_known, recipe, choosing(declared)), recipe.other_names)(make)


def _declared(recipe: Recipe) -> dict[str, Any]:
    """The annotations of a factory's arguments, but for the learning rate."""
    declared = {**hints(recipe.make), "mask": Any, "initial_learning_rate": Any, **OPTIONS}
    return declared | (dict(zip(_BETAS, get_args(declared["betas"]), strict=True)) if recipe.like_optax else {})


def _remark(declared: Mapping[str, Any], names: Iterable[str]) -> str:
    """What of these arguments optax.inject_hyperparams leaves as it is."""
    static, at_0 = (
        [f"`{name}`" for name in names if name in declared and chooses(declared[name])]
        for chooses in (is_structural, is_stateless_at_0)
    )
    stays = _STATIC.format(static=f"{', '.join(static[:-1])} and {static[-1]}")
    stays += _STATIC_AT_0.format(names=" and ".join(at_0)) if at_0 else ""
    return f"\n{textwrap.fill(stays, 120)}\n"


def _initial(learning_rate: Any, initial: Any) -> Any:
    """The learning rate that a relative weight decay is meant for; None where a schedule does not tell."""
    return learning_rate if initial is None and isinstance(learning_rate, Real) else initial


def _known(recipe: Recipe, choosing: Callable[[Arguments], Arguments], arguments: Arguments) -> dict[str, Any]:
    """The arguments of a factory that optax.inject_hyperparams leaves as they are."""
    known = dict(choosing(arguments))
    if recipe.wants_initial_lr:
        initial = _initial(arguments.get("learning_rate"), arguments["initial_learning_rate"])
        known["initial_learning_rate"] = initial
        if initial is None and is_concrete_zero(arguments["weight_decay"]):
            known["weight_decay"] = 0.0  # as an array it would ask for what it is relative to
    return known


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
