"""fusedbun's optimizers for PyTorch."""

from fusedbun.optim.dispatch import IMPLEMENTATIONS
from fusedbun.optim.driver import TransformOptimizer
from fusedbun.optim.groups import param_groups
from fusedbun.optim.optimizers import (
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
from fusedbun.optim.portable import load_state, save_state
from fusedbun.optim.release import GradientRelease, release_gradients

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
