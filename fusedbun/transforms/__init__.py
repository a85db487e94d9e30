"""The transformations: each is one rule for one leaf, in a module of its own, named as in a chain."""

from fusedbun.transforms.centralize import Centralize as Centralize
from fusedbun.transforms.clip import Clip as Clip
from fusedbun.transforms.clip_rms import ClipRMS as ClipRMS
from fusedbun.transforms.decay import Decay as Decay
from fusedbun.transforms.momentum import Momentum as Momentum
from fusedbun.transforms.rms_scale import RMSScale as RMSScale
from fusedbun.transforms.scale_by_adam import ScaleByAdam as ScaleByAdam
from fusedbun.transforms.scale_by_lion import ScaleByLion as ScaleByLion
from fusedbun.transforms.scale_by_mup import ScaleByMup as ScaleByMup
from fusedbun.transforms.sign import Sign as Sign
from fusedbun.transforms.sign_decay import SignDecay as SignDecay
from fusedbun.transforms.sm3_accumulate import SM3Accumulate as SM3Accumulate
from fusedbun.transforms.sparse_mask import SparseMask as SparseMask
from fusedbun.transforms.vote import Vote as Vote

__all__ = sorted(name for name, thing in globals().items() if isinstance(thing, type))
