"""fusedbun's optimizers for PyTorch."""

from fusedbun.torch.dispatch import IMPLEMENTATIONS
from fusedbun.torch.driver import TransformOptimizer
from fusedbun.torch.groups import param_groups
from fusedbun.torch.optimizers import (
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
)
from fusedbun.torch.portable import load_state, save_state
from fusedbun.torch.release import GradientRelease, release_gradients

__all__ = [
    "IMPLEMENTATIONS",
    "SM3",
    "ChainOptimizer",
    "DecoupledLionW",
    "Fusedbun",
    "FusionOptimizer",
    "GradientRelease",
    "MupAdam",
    "MupAdamW",
    "MupSGD",
    "ScaledOptum",
    "SignSGD",
    "TernaryVote",
    "TransformOptimizer",
    "load_state",
    "param_groups",
    "release_gradients",
    "save_state",
]
