"""fusedbun's optimizers for PyTorch."""

from typing import TYPE_CHECKING

from fusedbun.torch.config import create as create
from fusedbun.torch.dispatch import IMPLEMENTATIONS as IMPLEMENTATIONS
from fusedbun.torch.driver import TransformOptimizer as TransformOptimizer
from fusedbun.torch.groups import param_groups as param_groups
from fusedbun.torch.optimizers import *  # noqa: F403 - its names are the recipes'
from fusedbun.torch.portable import load_state as load_state
from fusedbun.torch.portable import save_state as save_state
from fusedbun.torch.release import GradientRelease as GradientRelease
from fusedbun.torch.release import release_gradients as release_gradients

if not TYPE_CHECKING:  # who reads it without running it finds the names above
    __all__ = [name for name, thing in globals().items() if getattr(thing, "__module__", "").startswith("fusedbun")]
    __all__ += ["IMPLEMENTATIONS"]
