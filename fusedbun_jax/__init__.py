"""fusedbun's optimizers and transformations for optax."""

from __future__ import annotations

try:
    import optax  # noqa: F401 - a missing extra is named here, once
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"fusedbun_jax needs JAX and optax ({error.name} is missing): pip install 'fusedbun[jax]'", name=error.name
    ) from error

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fusedbun import transforms
from fusedbun.chain import chain as chain
from fusedbun_jax.config import create as create
from fusedbun_jax.flax import flax_channel_axis as flax_channel_axis
from fusedbun_jax.flax import flax_mapping as flax_mapping
from fusedbun_jax.flax import flax_stacked as flax_stacked
from fusedbun_jax.groups import by_name as by_name
from fusedbun_jax.layout import TransformState as TransformState
from fusedbun_jax.lift import lift as lift
from fusedbun_jax.lift import lifted as lifted
from fusedbun_jax.metrics import MetricsState as MetricsState
from fusedbun_jax.metrics import with_metrics as with_metrics
from fusedbun_jax.optimizers import FACTORIES
from fusedbun_jax.optimizers import factory as factory
from fusedbun_jax.portable import load_state as load_state
from fusedbun_jax.portable import save_state as save_state
from fusedbun_jax.rounding import round_stochastically as round_stochastically
from fusedbun_jax.rounding import round_to_params as round_to_params
from fusedbun_jax.schedules import sm3_schedule as sm3_schedule
from fusedbun_jax.sharding import state_shardings as state_shardings
from fusedbun_jax.step import SteppingTransformation as SteppingTransformation
from fusedbun_jax.step import from_chain as from_chain

_TRANSFORMS = [getattr(transforms, name) for name in transforms.__all__]
globals().update({transform.name: lifted(transform) for transform in _TRANSFORMS}, **FACTORIES)

if TYPE_CHECKING:  # type checkers run nothing: to them any other name is one of these functions

    def __getattr__(name: str) -> Callable[..., Any]: ...
else:
    __all__ = [name for name, thing in globals().items() if getattr(thing, "__module__", "").startswith("fusedbun")]
