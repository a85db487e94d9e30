"""fusedbun: memory-efficient optimizers, defined once, for PyTorch and for JAX.

The torch classes and `param_groups` load torch when they are first used; everything else needs NumPy only.
The optax side is the package `fusedbun_jax`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fusedbun import recipes, transforms
from fusedbun.chain import Chain, chain
from fusedbun.schedules import sm3_schedule
from fusedbun.transform import Signal, Slot, Transform

if TYPE_CHECKING:
    from fusedbun.tools.plan import plan
    from fusedbun.torch import (
        SM3,
        ChainOptimizer,
        DecoupledLionW,
        Fusedbun,
        FusionOptimizer,
        MupAdam,
        MupAdamW,
        MupSGD,
        ScaledOptum,
        SignSGD,
        TernaryVote,
        load_state,
        param_groups,
        release_gradients,
        save_state,
    )

__version__ = "0.1.0"

_OF_TORCH = (
    "ChainOptimizer",
    "FusionOptimizer",
    "SignSGD",
    "load_state",
    "param_groups",
    "release_gradients",
    "save_state",
    *(r.torch_class for r in recipes.RECIPES.values()),
)

__all__ = [
    "SM3",
    "Chain",
    "ChainOptimizer",
    "DecoupledLionW",
    "Fusedbun",
    "FusionOptimizer",
    "MupAdam",
    "MupAdamW",
    "MupSGD",
    "ScaledOptum",
    "SignSGD",
    "Signal",
    "Slot",
    "TernaryVote",
    "Transform",
    "chain",
    "load_state",
    "param_groups",
    "plan",
    "recipes",
    "release_gradients",
    "save_state",
    "sm3_schedule",
    "transforms",
]


def __getattr__(name: str) -> Any:
    if name == "plan":  # when first used, for it imports the compiler
        return import_module("fusedbun.tools.plan").plan
    if name not in _OF_TORCH:
        raise AttributeError(f"module 'fusedbun' has no attribute {name!r}")
    try:
        import fusedbun.torch as classes
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ModuleNotFoundError(
            f"fusedbun.{name} needs PyTorch: pip install 'fusedbun[torch]'", name="torch"
        ) from error
    return getattr(classes, name)


def __dir__() -> list[str]:
    return sorted(__all__)
