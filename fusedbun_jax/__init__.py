"""fusedbun's optimizers and transformations for optax."""

from __future__ import annotations

try:
    import optax  # noqa: F401 - a missing extra is named here, once
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"fusedbun_jax needs JAX and optax ({error.name} is missing): pip install 'fusedbun[jax]'", name=error.name
    ) from error

from fusedbun import transforms
from fusedbun.chain import chain
from fusedbun_jax.axes import flax_channel_axis
from fusedbun_jax.lift import TransformState, from_chain, lift, lifted, round_to_params
from fusedbun_jax.optimizers import factory, fusedbun

centralize = lifted(transforms.Centralize)
clip_rms = lifted(transforms.ClipRMS)
decay = lifted(transforms.Decay)
momentum = lifted(transforms.Momentum)
rms_scale = lifted(transforms.RMSScale)
sm3_accumulate = lifted(transforms.SM3Accumulate)
sparse_mask = lifted(transforms.SparseMask)

__all__ = [
    "TransformState",
    "centralize",
    "chain",
    "clip_rms",
    "decay",
    "factory",
    "flax_channel_axis",
    "from_chain",
    "fusedbun",
    "lift",
    "lifted",
    "momentum",
    "rms_scale",
    "round_to_params",
    "sm3_accumulate",
    "sparse_mask",
]
