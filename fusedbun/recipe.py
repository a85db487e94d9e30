"""An optimizer's entry: from it come its torch class, its optax factory, their documentation and its rows in tables."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from itertools import product
from types import MappingProxyType
from typing import Any, ParamSpec

from fusedbun.chain import Chain
from fusedbun.hyper import UnitInterval, checked
from fusedbun.storage.rounding import Rounding

P = ParamSpec("P")
Settings = Mapping[str, Any]  # hyper-parameters that are not the defaults

Betas = tuple[UnitInterval, UnitInterval]
POSITIONAL, KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY  # a driver's own
INITIAL_LR = "initial_lr"  # a function's argument that the driver fills in

# What a recipe's docstring does not say of an argument, for it is the same wherever there is one.
ARGUMENTS = {
    "momentum_dtype": 'what the momentum is stored in: "float32", "bfloat16", "int8", "int4", "param" for the '
    "parameter's dtype, or None for what is computed in. Fewer bits are rounded stochastically; int8 and int4 are "
    "codes with an exponent for every 32, and leave parameters of fewer than two axes in float32.",
    "second_moment_dtype": "what the mean of squares is stored in, among the same; int8 and int4 are too coarse for "
    "it.",
    "betas": "the shares of the past that the mean and the mean of squares keep, in [0, 1).",
    "b1": "the share of the past that the momentum keeps, in [0, 1).",
    "b2": "the share of the past that the accumulators keep, in [0, 1).",
    "mask": "the parameters that decay: a tree of booleans like the parameters', or a prefix of it, or a function from "
    "the parameters to one; None: all.",
    "eps": "added to the root, in [0, inf).",
    "amsgrad": "divide by the largest mean of squares so far.",
    "weight_decay": "added to the gradient as `weight_decay*p` (an L2 penalty), in [0, inf).",
    "independent_weight_decay": "divide weight_decay by the parameter's scaled initial learning rate.",
    "allow_non_unit_scaling_params": "step a parameter without a type with the scale 1 instead of raising an error.",
    "mup": "the parameters' types, as a mapping by name, a tree of names or a rule `(path, param) -> type`; None reads "
    "the attributes that unit-scaling's modules set. See `fusedbun.mup.MupScale`.",
    "channel_axis": "the axis of a parameter's outputs; its fan-in is the product of the others.",
}


def no_notice(hyperparameters: Settings) -> None:
    """There is nothing to warn of; a function, for a class's defaults are pickled by name."""


@dataclass(frozen=True)
class Recipe:
    """An optimizer.

    Args:
        make: the function from its hyper-parameters to a chain; an argument `initial_lr` is filled in by the driver.
        torch_class: the name of its torch class; that of its optax factory is the function's.
        aliases: other names of the torch class.
        other_names: other names of its hyper-parameters, and which they are of.
        lr: the learning rate's default; None where it has to be given.
        fixed_lr: the learning rate is `lr` and cannot be changed.
        like_optax: the optax factory spells `betas` as b1 and b2 and takes a `mask` of the decay, as optax.adamw does.
        notice: a warning that some hyper-parameters deserve, or None.
        densifies_sparse_gradients: the torch class takes sparse gradients, and makes them dense.
        recommended: the settings to train with.
        training_lr: the learning rate of `fusedbun train`, with the recommended settings; None: it is not among the
            command's optimizers. It is, of a grid in factors of two, that of the lowest validation loss with the
            command's defaults, on half of the digits, with 15% to validate, mean of 3 seeds; no test image is looked
            at. (Fusedbun's is older and was kept: half of it has a loss 0.004 lower. FusedbunW's is AdamW's.)
        listed: settings that change its state, which `fusedbun list` shows beside the defaults.
        planned: the settings that `fusedbun plan` counts, by what it calls them.
        tested: the settings that change what is computed, by what a test calls them.
        compiled: the settings whose kernels are compiled at installation. A number that is 0 leaves something out of
            a kernel, and any other is as good as the next. `stochastic_rounding` may be among them.
        compiled_for_networks: more of them, of float32 and bfloat16 vectors and matrices.
        compiled_for_bfloat16: more of them, of bfloat16 parameters.
    """

    make: Callable[..., Chain]
    torch_class: str
    aliases: tuple[str, ...] = ()
    other_names: Mapping[str, str] = field(default_factory=dict)
    lr: float | None = None
    fixed_lr: bool = False
    like_optax: bool = False
    notice: Callable[[Settings], str | None] = no_notice
    densifies_sparse_gradients: bool = False
    recommended: Settings = field(default_factory=dict)
    training_lr: float | None = None
    listed: Sequence[Settings] = ()
    planned: Mapping[str, Settings] = field(default_factory=lambda: {"": {}})
    tested: Mapping[str, Settings] = field(default_factory=lambda: {"": {}})
    compiled: Sequence[Settings] = ({},)
    compiled_for_networks: Sequence[Settings] = ()
    compiled_for_bfloat16: Sequence[Settings] = ()

    @property
    def name(self) -> str:
        """The name of the function, and of the optax factory."""
        return self.make.__name__

    @property
    def torch_names(self) -> tuple[str, ...]:
        """Every name of the torch class."""
        return (self.torch_class, *self.aliases)

    @cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The hyper-parameters, as the function declares them."""
        return {name: p for name, p in inspect.signature(self.make).parameters.items() if name != INITIAL_LR}

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """The hyper-parameters and their defaults."""
        return {name: p.default for name, p in self.parameters.items()}

    @cached_property
    def wants_initial_lr(self) -> bool:
        """Whether the function has an argument `initial_lr`."""
        return INITIAL_LR in inspect.signature(self.make).parameters

    def chain(self, settings: Settings, initial_lr: Any, stochastic_rounding: bool = False) -> Chain:
        """The chain of some settings; `initial_lr` is left out where the function does not ask for it."""
        initial = {INITIAL_LR: initial_lr} if self.wants_initial_lr else {}
        own = own_names(self.name, self.other_names, settings)
        return replace(self.make(**{**initial, **own}), rounding=Rounding(stochastic_rounding))

    def signature(
        self, before: Sequence[inspect.Parameter] = (), after: Sequence[inspect.Parameter] = ()
    ) -> inspect.Signature:
        """The hyper-parameters between a driver's own arguments."""
        return inspect.Signature([*before, *self.parameters.values(), *after])

    def bind(self, owner: str, signature: inspect.Signature, /, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The arguments of a call by their own names, with their defaults.

        Raises:
            TypeError: it has no such argument, which says those that there are; or one is given by two of its names.
        """
        kwargs = own_names(owner, self.other_names, kwargs)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{owner} {error}; its arguments are {', '.join(signature.parameters)}") from None
        bound.apply_defaults()
        return bound.arguments

    def documentation(
        self, before: str, after: str, instead: Mapping[str, Sequence[str]] = MappingProxyType({})
    ) -> str:
        """The function's docstring, with a driver's arguments at the head of its `Args:` and its remarks at the end.

        Args:
            before: the text of the driver's arguments.
            after: its remarks.
            instead: the arguments that a driver has in the place of some; `ARGUMENTS` says what they are.
        """
        head, args, rest = (self.make.__doc__ or "").partition("Args:\n")
        for name, others in instead.items():
            own = re.search(rf"    {name}: .*?\n(?! {{5}})", rest, re.DOTALL)
            assert own, name
            texts = [own[0] if other == name else f"{_described(other)}\n" for other in others]
            rest = rest[: own.start()] + "".join(texts) + rest[own.end() :]
        return f"{head}{args}{before}{rest}\n{after}"


RECIPES: dict[str, Recipe] = {}


def recipe(torch_class: str, **entry: Any) -> Callable[[Callable[P, Chain]], Callable[P, Chain]]:
    """Enters a function among the recipes, with its arguments checked by their annotations, and described.

    Args:
        torch_class: the name of its torch class.
        entry: the other fields of its `Recipe`.
    """

    def enter(function: Callable[P, Chain]) -> Callable[P, Chain]:
        make = checked(function)
        make.__doc__ = described(function)
        RECIPES[function.__name__] = Recipe(make, torch_class, **entry)
        return make

    return enter


def named(owner: str, name: str) -> Recipe:
    """The recipe of an optimizer, by its own name, which is its optax factory's, or by one of its torch class's.

    Args:
        owner: what is asked for it, for the message.
        name: the name.

    Raises:
        TypeError: it is no string.
        ValueError: there is no such optimizer; the message says which names are nearest, and all that there are.
    """
    by_name = {n: found for found in RECIPES.values() for n in (found.name, *found.torch_names)}
    if not isinstance(name, str):
        raise TypeError(
            f"{owner}: name must be one of {', '.join(by_name)}, but it is {name!r} ({type(name).__name__})"
        )
    if name not in by_name:
        folded = {n.casefold(): n for n in by_name}
        near = [repr(folded[n]) for n in get_close_matches(name.casefold(), folded, cutoff=0.4)]
        nearest = f"; do you mean {' or '.join(near)}?" if near else "."
        raise ValueError(f"{owner}: there is no optimizer {name!r}{nearest} There are {', '.join(by_name)}")
    return by_name[name]


def own_names(owner: str, names: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values by their own names, of which there are others; a TypeError where one is given under both."""
    for other, own in names.items():
        if other in values and own in values:
            raise TypeError(f"{owner}: {other} is another name for {own}, and both are given; leave one out")
    return {names.get(name, name): value for name, value in values.items()}


def described(function: Callable[..., Any]) -> str:
    """The function's docstring; an argument of which it says nothing is described as `ARGUMENTS` does.

    Raises:
        KeyError: neither says anything of an argument.
    """
    head, args, rest = (inspect.getdoc(function) or "").partition("Args:\n")
    paragraphs, end, tail = rest.partition("\n\n")
    said = {text.split(":")[0].strip(): text for text in re.split(r"\n(?= {4}\S)", paragraphs)}
    names = [name for name in inspect.signature(function).parameters if name != INITIAL_LR]
    return f"{head}{args}" + "\n".join(said.get(n) or _described(n) for n in names) + end + tail


def _described(name: str) -> str:
    return textwrap.fill(f"{name}: {ARGUMENTS[name]}", 116, initial_indent=" " * 4, subsequent_indent=" " * 8)


def every(**values: Sequence[Any]) -> list[Settings]:
    """The settings with every combination of these values."""
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


def momentum_in(*dtypes: str, **others: Any) -> dict[str, Settings]:
    """Settings to plan for: the momentum stored in each of these dtypes."""
    return {f"momentum {dtype}": {**others, "momentum_dtype": dtype} for dtype in dtypes}
