"""fusedbun's optimizers for PyTorch."""

from fusedbun.optim.driver import TransformOptimizer
from fusedbun.optim.optimizers import ChainOptimizer, Fusedbun, FusionOptimizer

__all__ = ["ChainOptimizer", "Fusedbun", "FusionOptimizer", "TransformOptimizer"]
