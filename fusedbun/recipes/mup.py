"""Adam, AdamW and SGD with u-muP's learning rates."""

from __future__ import annotations

from numbers import Real
from typing import Any

from fusedbun.chain import Chain, chain
from fusedbun.hyper import Axis, NonNegative, PerParam, StateAbove0, is_concrete_zero
from fusedbun.mup import Constraint, MupScale, Types, independent
from fusedbun.recipe import Betas, every, momentum_in, recipe
from fusedbun.storage.codes import MomentDtype, SecondMomentDtype
from fusedbun.transforms import Decay, Momentum, ScaleByAdam, ScaleByMup

__all__ = ["mup_adam", "mup_adamw", "mup_sgd"]

_ADAM: dict[str, Any] = {
    "lr": 1e-3,
    "training_lr": 0.06,
    "listed": [{"amsgrad": True}],
    "planned": {
        "moments float32": {"momentum_dtype": "float32", "second_moment_dtype": "float32"},
        "moments bfloat16": {"momentum_dtype": "bfloat16", "second_moment_dtype": "bfloat16"},
        "moments int8, bfloat16": {"momentum_dtype": "int8", "second_moment_dtype": "bfloat16"},
    },
    "compiled": every(weight_decay=(0.0, 0.1), amsgrad=(False, True)),
}


@recipe("MupAdam", tested={"": {}, "decay": {"weight_decay": 0.1}}, **_ADAM)
def mup_adam(
    betas: Betas = (0.9, 0.999),
    eps: NonNegative = 1e-8,
    weight_decay: NonNegative = 0.0,
    amsgrad: bool = False,
    *,
    independent_weight_decay: bool = True,
    allow_non_unit_scaling_params: bool = False,
    mup: Types = None,
    channel_axis: PerParam[Axis] = 0,
    momentum_dtype: MomentDtype = None,
    second_moment_dtype: SecondMomentDtype = None,
    initial_lr: NonNegative | None = None,
) -> Chain:
    """Adam with u-muP's learning rates: what is tuned on a narrow model serves a wide one.

        decay → scale_by_adam → scale_by_mup
        p = p - lr*scale*u

    Args:
        weight_decay: added to the gradient as `weight_decay*p` (an L2 penalty), in [0, inf).

    State: two arrays of the parameter's shape (amsgrad: three) and a step counter.
    Source: Blake et al. 2024 (arXiv 2407.17465); Kingma, Ba 2015 (arXiv 1412.6980).
    """
    scale = MupScale(mup, channel_axis, allow_non_unit_scaling_params)
    decay = independent(weight_decay, initial_lr, scale) if independent_weight_decay else weight_decay
    return chain(
        Decay(decay), ScaleByAdam(*betas, eps, amsgrad, momentum_dtype, second_moment_dtype), ScaleByMup(scale)
    )


@recipe(
    "MupAdamW",
    tested={
        "amsgrad": {"weight_decay": 0.1, "amsgrad": True},
        "coupled": {"weight_decay": 0.1, "independent_weight_decay": False, "betas": (0.5, 0.0)},
    },
    **_ADAM,
)
def mup_adamw(
    betas: Betas = (0.9, 0.999),
    eps: NonNegative = 1e-8,
    weight_decay: NonNegative = 0.0,
    amsgrad: bool = False,
    *,
    independent_weight_decay: bool = True,
    allow_non_unit_scaling_params: bool = False,
    mup: Types = None,
    channel_axis: PerParam[Axis] = 0,
    momentum_dtype: MomentDtype = None,
    second_moment_dtype: SecondMomentDtype = None,
    initial_lr: NonNegative | None = None,
) -> Chain:
    """AdamW with u-muP's learning rates: what is tuned on a narrow model serves a wide one.

        scale_by_adam → decay → scale_by_mup
        p = p - lr*scale*u

    Args:
        weight_decay: decoupled weight decay, in [0, inf).
        independent_weight_decay: divide weight_decay by the parameter's scaled initial learning rate, so that it
            follows the schedule but not the learning rate's size.

    State: two arrays of the parameter's shape (amsgrad: three) and a step counter.
    Source: Blake et al. 2024 (arXiv 2407.17465); Loshchilov, Hutter 2019 (arXiv 1711.05101).
    """
    scale = MupScale(mup, channel_axis, allow_non_unit_scaling_params)
    decay = independent(weight_decay, initial_lr, scale) if independent_weight_decay else weight_decay
    return chain(
        ScaleByAdam(*betas, eps, amsgrad, momentum_dtype, second_moment_dtype), Decay(decay), ScaleByMup(scale)
    )


@recipe(
    "MupSGD",
    lr=1e-3,
    recommended={"momentum": 0.9},
    training_lr=0.2,
    listed=[{"momentum": 0.9}],
    planned={"no momentum": {}, **momentum_in("float32", "bfloat16", "int8", momentum=0.9)},
    tested={
        "": {"momentum": 0.9, "dampening": 0.5, "readout_constraint": "to_output_scale"},
        "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    },
    compiled=[
        *every(weight_decay=(0.0, 0.1), momentum=(0.0, 0.9)),
        *every(weight_decay=(0.0, 0.1), momentum=(0.9,), nesterov=(True,)),
    ],
)
def mup_sgd(
    momentum: StateAbove0 = 0.0,
    dampening: StateAbove0 = 0.0,
    weight_decay: NonNegative = 0.0,
    nesterov: bool = False,
    *,
    readout_constraint: Constraint = None,
    independent_weight_decay: bool = True,
    allow_non_unit_scaling_params: bool = False,
    mup: Types = None,
    channel_axis: PerParam[Axis] = 0,
    momentum_dtype: MomentDtype = None,
    initial_lr: NonNegative | None = None,
) -> Chain:
    """SGD with u-muP's learning rates: what is tuned on a narrow model serves a wide one.

        decay → momentum → scale_by_mup
        p = p - lr*scale*u

    Args:
        momentum: the share of the past that the momentum keeps, in [0, 1); at 0 no momentum is stored.
        dampening: how much of a new gradient is left out, in [0, 1), except of the first.
        nesterov: Nesterov's momentum; with a momentum and no dampening only.
        readout_constraint: "to_output_scale" where the model's readout layer has this constraint.

    State: with momentum one array of the parameter's shape, and with dampening a step counter.
    Source: Blake et al. 2024 (arXiv 2407.17465).
    """
    if nesterov and (is_concrete_zero(momentum) or (isinstance(dampening, Real) and dampening != 0)):
        raise ValueError(
            f"nesterov=True needs a momentum above 0 and a dampening of 0, "
            f"but momentum={momentum!r} and dampening={dampening!r}"
        )
    scale = MupScale(mup, channel_axis, allow_non_unit_scaling_params, readout_constraint)
    decay = independent(weight_decay, initial_lr, scale) if independent_weight_decay else weight_decay
    dampening = 0.0 if is_concrete_zero(momentum) else dampening
    steady = Momentum(momentum, dampening, nesterov, undampened_start=True, dtype=momentum_dtype)
    return chain(Decay(decay), steady, ScaleByMup(scale))
