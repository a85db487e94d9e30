"""fusedbun: memory-efficient optimizers, defined once, for PyTorch and for JAX.

The torch classes and `param_groups` load torch when they are first used; everything else needs NumPy only.
The optax side is the package `fusedbun_jax`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fusedbun import recipes as recipes
from fusedbun import transforms as transforms
from fusedbun.chain import Chain as Chain
from fusedbun.chain import chain as chain
from fusedbun.groups import stacked_experts as stacked_experts
from fusedbun.schedules import sm3_schedule as sm3_schedule
from fusedbun.transform import Signal as Signal
from fusedbun.transform import Slot as Slot
from fusedbun.transform import Transform as Transform
from fusedbun.version import __version__ as __version__

if TYPE_CHECKING:
    from fusedbun.tools.plan import plan as plan
    from fusedbun.torch import create as create
    from fusedbun.torch import load_state as load_state
    from fusedbun.torch import param_groups as param_groups
    from fusedbun.torch import release_gradients as release_gradients
    from fusedbun.torch import save_state as save_state
    from fusedbun.torch.optimizers import *  # noqa: F403 - its names are the recipes'

_OF_TORCH = {"ChainOptimizer", "create", "load_state", "param_groups", "release_gradients", "save_state"}
_OF_TORCH |= {name for recipe in recipes.RECIPES.values() for name in recipe.torch_names}

_NAMES = {"Chain", "Signal", "Slot", "Transform", "chain", "plan", "recipes", "sm3_schedule", "stacked_experts"}
_NAMES |= {"transforms", *_OF_TORCH}

if not TYPE_CHECKING:  # who reads this without running it finds the names above
    __all__ = sorted(_NAMES)


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
    return sorted(_NAMES)
