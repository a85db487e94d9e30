"""The transformations: each is one rule for one leaf, in a module of its own, named as in a chain."""

from fusedbun.transforms.centralize import Centralize
from fusedbun.transforms.clip import Clip
from fusedbun.transforms.clip_rms import ClipRMS
from fusedbun.transforms.decay import Decay
from fusedbun.transforms.momentum import Momentum
from fusedbun.transforms.rms_scale import RMSScale
from fusedbun.transforms.scale_by_adam import ScaleByAdam
from fusedbun.transforms.scale_by_lion import ScaleByLion
from fusedbun.transforms.scale_by_mup import ScaleByMup
from fusedbun.transforms.sign import Sign
from fusedbun.transforms.sign_decay import SignDecay
from fusedbun.transforms.sm3_accumulate import SM3Accumulate
from fusedbun.transforms.sparse_mask import SparseMask
from fusedbun.transforms.vote import Vote

__all__ = [
    "Centralize",
    "Clip",
    "ClipRMS",
    "Decay",
    "Momentum",
    "RMSScale",
    "SM3Accumulate",
    "ScaleByAdam",
    "ScaleByLion",
    "ScaleByMup",
    "Sign",
    "SignDecay",
    "SparseMask",
    "Vote",
]
