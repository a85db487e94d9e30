"""The torch classes, one for each recipe, and the optimizer that takes any chain."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, Concatenate, ParamSpec

from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedbun import derive, recipes
from fusedbun.chain import Chain
from fusedbun.optim.driver import TransformOptimizer
from fusedbun.transform import Transform

P = ParamSpec("P")
Init = Callable[Concatenate[Any, ParamsT, float | Tensor, P], None]

_ARGUMENTS = """\
    params: parameters, named parameters or param groups; a group may give any of the arguments below its own value.
    lr: the learning rate, in [0, inf); a float or a tensor of one element.
"""
_REMARK = """
`maximize=True` climbs instead of descending.
"""


def initializer(recipe: Callable[P, Chain]) -> Init[P]:
    """The `__init__` of a recipe's class: the recipe's arguments between `params`, `lr` and `maximize`."""

    def __init__(self: TransformOptimizer, /, *args: Any, **kwargs: Any) -> None:
        try:
            bound = spelled_out.bind(self, *args, **kwargs)
        except TypeError as error:
            allowed = ", ".join([*spelled_out.parameters][1:])
            raise TypeError(f"{type(self).__name__}() {error}; its arguments are {allowed}") from None
        bound.apply_defaults()
        given = dict(bound.arguments)
        own = {name: given.pop(name) for name in ("self", "params", "lr", "maximize")}
        TransformOptimizer.__init__(self, own["params"], own["lr"], recipe, given, maximize=own["maximize"])

    before = [inspect.Parameter(name, derive.POSITIONAL) for name in ("self", "params", "lr")]
    spelled_out = derive.signature(recipe, before, [inspect.Parameter("maximize", derive.KEYWORD, default=False)])
    __init__.__signature__ = spelled_out  # type: ignore[attr-defined]
    __init__.__doc__ = derive.documentation(recipe, _ARGUMENTS, _REMARK)
    return __init__


class Fusedbun(TransformOptimizer):
    __init__ = initializer(recipes.fusedbun)
    __doc__ = __init__.__doc__


FusionOptimizer = Fusedbun


class ChainOptimizer(TransformOptimizer):
    """Any chain of transformations as a torch optimizer: `p = p - lr*u`.

    Every hyper-parameter of every transformation is in the param groups, as `<transformation>.<field>`; a group may
    give its own, and it may be changed between steps.

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
    """

    def __init__(
        self, params: ParamsT, transforms: Iterable[Transform], lr: float | Tensor, *, maximize: bool = False
    ) -> None:
        chain = transforms if isinstance(transforms, Chain) else Chain(tuple(transforms))
        super().__init__(params, lr, chain.with_hyperparameters, chain.hyperparameters(), maximize=maximize)
