"""The torch classes, one for each recipe and made from it, and the optimizer that takes any chain."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import ParamsT

from fusedbun.chain import Chain, Stacked
from fusedbun.recipe import KEYWORD, POSITIONAL, Recipe
from fusedbun.recipes import RECIPES, decoupled_lionw
from fusedbun.torch.definition import step_leaf
from fusedbun.torch.driver import TransformOptimizer
from fusedbun.torch.entries import without_flags
from fusedbun.transform import Transform

_ARGUMENTS = """\
    params: parameters, named parameters or param groups; a group may give any of the arguments below its own value.
"""
_RATE = """\
    lr: the learning rate, in [0, inf); a float or a tensor of one element.
"""
_REMARK = """
`maximize=True` climbs instead of descending.

`stochastic_rounding=True` rounds bfloat16 parameters to either neighbour, without a bias, instead of to the nearest,
so that steps much smaller than a parameter's precision still move it; others are rounded to the nearest. `seed=0`, any
integer, decides the noise of this and of all rounding of state; with the same seed, parameter names and number of steps
it is the same on any device and in JAX.

`stacked=` says how many leading axes make a parameter a stack of several of one kind, such as experts kept as one
tensor: each slice is then stepped as a parameter of its own. A number, or a rule `(path, param) -> number`.

`implementation=` chooses how it is computed, with the same result: "kernel" by code generated for it, on the CPU;
"compiled" by torch.compile; "tiles" by eager torch, a few rows at a time; "definition" by its rules as written.
None takes the best there is. Sparse gradients and tensor subclasses are always stepped by the definition.
"""
# the driver's keyword arguments
_OPTIONS = {"maximize": False, "stochastic_rounding": False, "seed": 0, "stacked": 0, "implementation": None}


class _WithMemory(TransformOptimizer):
    def get_memory_mb(self, params: Iterable[Tensor] | None = None) -> float:
        """The memory of parameters in MiB; there is no other, for the optimizer has no state.

        Args:
            params: the parameters; None: all that the optimizer steps. One that has no shape yet has no memory.
        """
        if params is None:
            params = (p for group in self.param_groups for p in group["params"])
        return sum(p.numel() * p.element_size() for p in params if not is_lazy(p)) / 2**20


class _OfTernaryWeights(TransformOptimizer):
    def check_parameter(self, name: str, param: Tensor) -> None:
        super().check_parameter(name, param)
        if param not in self.state and not param.is_meta and not bool(((param == 0) | (param.abs() == 1)).all()):
            raise ValueError(
                f"TernaryVote steps weights of -1, 0 and +1, but {name} of shape {tuple(param.shape)} has others; "
                f"round it first, for example to param.sign()"
            )


class _WithLionW(TransformOptimizer):
    @staticmethod
    @torch.no_grad()
    def lionw(
        p: Tensor, grad: Tensor, exp_avg: Tensor, lr: float, initial_lr: float, wd: float, beta1: float, beta2: float
    ) -> None:
        """One step in place: of the parameter `p`, and of its running mean `exp_avg`."""
        chain = decoupled_lionw((beta1, beta2), wd, initial_lr=initial_lr)
        step_leaf(chain, lr, False, p, grad, {"scale_by_lion.moment": exp_avg})


# What schedulers and frameworks call a chain's hyper-parameter.
_IN_CHAINS = {
    "weight_decay": ("sign_decay.weight_decay", "decay.weight_decay"),
    "momentum": ("scale_by_lion.beta1", "scale_by_adam.beta1", "momentum.beta"),
}
# What a class has of its own.
_BASES = {"ScaledOptum": _WithMemory, "TernaryVote": _OfTernaryWeights, "DecoupledLionW": _WithLionW}


def class_of(recipe: Recipe) -> type[TransformOptimizer]:
    """The torch class of a recipe: it takes the recipe's arguments between `params`, `lr` and the driver's options."""
    default = inspect.Parameter.empty if recipe.lr is None else recipe.lr
    before = [inspect.Parameter("params", POSITIONAL)]
    if not recipe.fixed_lr:
        before.append(inspect.Parameter("lr", POSITIONAL, default=default))
    after = [inspect.Parameter(name, KEYWORD, default=value) for name, value in _OPTIONS.items()]
    signature = recipe.signature(before, after)

    def __init__(self: TransformOptimizer, /, *args: Any, **kwargs: Any) -> None:
        kwargs = without_flags(type(self).__name__, signature.parameters, kwargs)
        arguments = {"lr": recipe.lr, **recipe.bind(f"{type(self).__name__}()", signature, *args, **kwargs)}
        params, lr = arguments.pop("params"), arguments.pop("lr")
        options = {name: arguments.pop(name) for name in _OPTIONS}
        TransformOptimizer.__init__(self, params, lr, recipe, arguments, **options)

    itself = inspect.Parameter("self", POSITIONAL)
    # to mypy a function has no signature of its own to set
    __init__.__signature__ = signature.replace(parameters=[itself, *signature.parameters.values()])  # type: ignore[attr-defined]
    __init__.__doc__ = recipe.documentation(_ARGUMENTS if recipe.fixed_lr else _ARGUMENTS + _RATE, _REMARK)
    body = {
        "__module__": __name__,
        "__doc__": __init__.__doc__,
        "__init__": __init__,
        "densifies_sparse_gradients": recipe.densifies_sparse_gradients,
    }
    return type(recipe.torch_class, (_BASES.get(recipe.torch_class, TransformOptimizer),), body)


class ChainOptimizer(TransformOptimizer):
    """Any chain of transformations as a torch optimizer: `p = p - lr*u`.

    Every hyper-parameter of every transformation is in the param groups, as `<transformation>.<field>`; a group may
    give its own, and it may be changed between steps. `weight_decay` is another name for the decay's, and `momentum`
    for the momentum's `beta`.

    >>> import fusedbun, torch
    >>> from fusedbun.transforms import Decay, Momentum
    >>> layer = torch.nn.Linear(2, 2)
    >>> groups = [{"params": layer.weight}, {"params": layer.bias, "decay.weight_decay": 0.0}]
    >>> optimizer = fusedbun.ChainOptimizer(groups, [Momentum(0.9), Decay(0.1)], lr=1e-2)
    >>> [group["decay.weight_decay"] for group in optimizer.param_groups]
    [0.1, 0.0]

    Args:
        params: parameters, named parameters or param groups.
        transforms: the transformations in their order, or a chain of them.
        lr: the learning rate, in [0, inf); a float or a tensor of one element.
        maximize: climb instead of descend.
        stochastic_rounding: round bfloat16 parameters without a bias instead of to the nearest.
        seed: any integer; it decides the noise of all rounding.
        stacked: how many leading axes make a parameter a stack, each slice of which is stepped as a parameter of its
            own, or a rule `(path, param) -> number`.
        implementation: how it is computed, with the same result: "kernel" by code generated for the chain, on the CPU;
            "compiled" by torch.compile; "tiles" by eager torch, a few rows at a time; "definition" by the rules as
            written; None: by the best there is. Sparse gradients and tensor subclasses are always stepped by the
            definition.
        unset: arguments of torch's own optimizers that this one does not have, such as `foreach`: False or None.
    """

    def __init__(
        self,
        params: ParamsT,
        transforms: Iterable[Transform],
        lr: float | Tensor,
        *,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        stacked: Stacked = 0,
        implementation: str | None = None,
        **unset: bool | None,
    ) -> None:
        if unknown := without_flags(type(self).__name__, (), unset):
            raise TypeError(
                f"{type(self).__name__}() got an unexpected keyword argument {next(iter(unknown))!r}; its arguments "
                f"are {', '.join(('params', 'transforms', 'lr', *_OPTIONS))}"
            )
        chain = transforms if isinstance(transforms, Chain) else Chain(tuple(transforms))
        hyperparameters = chain.hyperparameters()
        names = {other: own for other, owns in _IN_CHAINS.items() for own in owns if own in hyperparameters}
        recipe = Recipe(chain.with_hyperparameters, type(self).__name__, other_names=names)
        options: dict[str, Any] = {"maximize": maximize, "stochastic_rounding": stochastic_rounding, "seed": seed}
        options["stacked"] = stacked or chain.stacked
        super().__init__(params, lr, recipe, hyperparameters, implementation=implementation, **options)


if TYPE_CHECKING:  # type checkers run nothing, so what is made below has to be declared to them

    class _Made(TransformOptimizer):
        def __init__(self, params: ParamsT, *args: Any, **kwargs: Any) -> None: ...

    class Fusedbun(_Made): ...

    class FusedbunW(_Made): ...

    class SM3(_Made): ...

    class ScaledOptum(_Made, _WithMemory): ...

    class TernaryVote(_Made): ...

    class MupAdam(_Made): ...

    class MupAdamW(_Made): ...

    class MupSGD(_Made): ...

    class DecoupledLionW(_Made, _WithLionW): ...

    FusionOptimizer = Fusedbun
    SignSGD = ScaledOptum
else:
    CLASSES = {recipe.torch_class: class_of(recipe) for recipe in RECIPES.values()}
    CLASSES |= {alias: CLASSES[recipe.torch_class] for recipe in RECIPES.values() for alias in recipe.aliases}
    globals().update(CLASSES)
    __all__ = ["ChainOptimizer", *CLASSES]
