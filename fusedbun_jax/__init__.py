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
from fusedbun_jax.groups import by_name
from fusedbun_jax.lift import lift, lifted
from fusedbun_jax.metrics import MetricsState, with_metrics
from fusedbun_jax.optimizers import (
    decoupled_lionw,
    factory,
    fusedbun,
    mup_adam,
    mup_adamw,
    mup_sgd,
    scaled_optum,
    sm3,
    ternary_vote,
)
from fusedbun_jax.portable import flax_mapping, load_state, save_state
from fusedbun_jax.rounding import round_stochastically, round_to_params
from fusedbun_jax.schedules import sm3_schedule
from fusedbun_jax.sharding import state_shardings
from fusedbun_jax.state import TransformState
from fusedbun_jax.step import SteppingTransformation, from_chain

centralize = lifted(transforms.Centralize)
clip_rms = lifted(transforms.ClipRMS)
decay = lifted(transforms.Decay)
momentum = lifted(transforms.Momentum)
rms_scale = lifted(transforms.RMSScale)
scale_by_adam = lifted(transforms.ScaleByAdam)
scale_by_lion = lifted(transforms.ScaleByLion)
scale_by_mup = lifted(transforms.ScaleByMup)
sign = lifted(transforms.Sign)
sign_decay = lifted(transforms.SignDecay)
sm3_accumulate = lifted(transforms.SM3Accumulate)
sparse_mask = lifted(transforms.SparseMask)
vote = lifted(transforms.Vote)

__all__ = [
    "MetricsState",
    "SteppingTransformation",
    "TransformState",
    "by_name",
    "centralize",
    "chain",
    "clip_rms",
    "decay",
    "decoupled_lionw",
    "factory",
    "flax_channel_axis",
    "flax_mapping",
    "from_chain",
    "fusedbun",
    "lift",
    "lifted",
    "load_state",
    "momentum",
    "mup_adam",
    "mup_adamw",
    "mup_sgd",
    "rms_scale",
    "round_stochastically",
    "round_to_params",
    "save_state",
    "scale_by_adam",
    "scale_by_lion",
    "scale_by_mup",
    "scaled_optum",
    "sign",
    "sign_decay",
    "sm3",
    "sm3_accumulate",
    "sm3_schedule",
    "sparse_mask",
    "state_shardings",
    "ternary_vote",
    "vote",
    "with_metrics",
]
