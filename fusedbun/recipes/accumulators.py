"""Second moments from a vector for each axis: FusedbunW, Fusedbun and SM3."""

from __future__ import annotations

from typing import Literal

from fusedbun.chain import Chain, chain
from fusedbun.hyper import Axis, NonNegative, PerParam, Positive, StateAbove0, UnitInterval, is_concrete_zero
from fusedbun.recipe import Settings, every, momentum_in, recipe
from fusedbun.storage.codes import MomentDtype
from fusedbun.transforms import Centralize, Clip, ClipRMS, Decay, Momentum, RMSScale, SM3Accumulate, SparseMask

__all__ = ["fusedbun", "fusedbunw", "sm3"]

_PLAIN = {"nesterov": False, "lagged": False, "clip": None}


@recipe(
    "FusedbunW",
    lr=1e-3,
    like_optax=True,
    training_lr=3e-3,
    listed=[{"momentum_dtype": "int4"}],
    planned=momentum_in("int8", "int4", "bfloat16", "float32"),
    tested={
        "default": {"momentum_dtype": None, "weight_decay": 0.1},
        "plain": {**_PLAIN, "momentum_dtype": None},
        "not lagged": {"lagged": False, "momentum_dtype": None, "clip": 0.5},
        "without momentum": {"betas": (0.0, 0.9), "momentum_dtype": None},
        "last axis": {"channel_axis": -1, "momentum_dtype": None},
    },
    compiled=every(weight_decay=(0.0, 0.01), momentum_dtype=("int8", None)),
    compiled_for_networks=every(weight_decay=(0.0, 0.01), momentum_dtype=("int4",)),
    compiled_for_bfloat16=every(momentum_dtype=("int8", "int4"), stochastic_rounding=(False, True)),
)
def fusedbunw(
    betas: tuple[StateAbove0, UnitInterval] = (0.9, 0.999),
    eps: NonNegative = 1e-8,
    weight_decay: NonNegative = 1e-2,
    *,
    nesterov: bool = True,
    lagged: bool = True,
    clip: Positive | None = 10.0,
    momentum_dtype: MomentDtype = "int8",
    channel_axis: PerParam[Axis] = 0,
) -> Chain:
    """FusedbunW: AdamW's arguments at AdamW's learning rate, with an eighth of its state, in one pass over memory.

        sm3_accumulate → rms_scale → clip → momentum → decay
        p = p - lr*u

    Args:
        betas: the shares of the past that the momentum and the accumulators keep, in [0, 1); both are corrected for
            their start, as AdamW's are.
        eps: added to the root, in [0, inf).
        weight_decay: decoupled weight decay, in [0, inf): a step multiplies by `1 - lr*weight_decay`.
        nesterov: Nesterov's momentum.
        lagged: let the second moment use the step before's statistics of all axes but the first (one pass over memory).
        clip: the largest size of an element of the scaled update, in (0, inf); None: no clipping.
        channel_axis: the axis whose statistics are this step's where `lagged`; another than 0 takes a second pass. In
            Flax `fusedbun_jax.flax_channel_axis` does to a network what 0 does to the same one in torch.

    State: for a matrix a vector for each axis and the momentum, in int8 codes 1.05 bytes a parameter; for k <= 1 axes
        two arrays of the parameter's shape. An int32 step counter.
    Source: Loshchilov, Hutter 2019 (arXiv 1711.05101) for AdamW; Anil, Gupta, Koren, Singer 2019 (arXiv 1901.11150)
        for the accumulators; Shazeer, Stern 2018 (arXiv 1804.04235) for their product.
    """
    beta1, beta2 = betas
    return chain(
        SM3Accumulate(
            beta2, statistic="mean", combine="product", lagged=lagged, channel_axis=channel_axis, bias_correction=True
        ),
        RMSScale(eps),
        None if clip is None else Clip(clip),
        Momentum(beta1, dampening=beta1, nesterov=nesterov, bias_correction=True, dtype=momentum_dtype),
        Decay(weight_decay),
    )


RECOMMENDED = {"centralize": True, "use_rms": True, "nesterov": True}
_SCALED = {"centralize": (True,), "use_rms": (True,)}


@recipe(
    "Fusedbun",
    aliases=("FusionOptimizer",),
    other_names={"weight_decay": "Lambda", "momentum": "momentum_beta"},
    recommended=RECOMMENDED,
    training_lr=3e-4,
    listed=[{"momentum_dtype": "int4"}],
    planned={
        "no momentum": {"centralize": True, "use_rms": True, "momentum_beta": 0.0},
        **momentum_in("float32", "bfloat16", "int8", "int4", **RECOMMENDED),
    },
    tested={
        "default": {},
        "recommended": RECOMMENDED,
        "clipped": {**RECOMMENDED, "clip_rms": 0.5},
        "lagged": {**RECOMMENDED, "lagged": True},
        "without momentum": {"centralize": True, "use_rms": True, "momentum_beta": 0.0, "Lambda": 0.0},
        "without memory": {"use_rms": True, "beta_decay": 0.0, "eps": 1e-3},
        "last axis": {**RECOMMENDED, "channel_axis": -1},
    },
    compiled=[
        {},
        *every(**_SCALED, nesterov=(True,), Lambda=(0.01, 0.0)),
        *every(**_SCALED, nesterov=(False,)),
        *every(**_SCALED, nesterov=(True, False), lagged=(True,)),
        *every(**_SCALED, nesterov=(True,), clip_rms=(1.0,)),
        *every(**_SCALED, nesterov=(True,), channel_axis=(-1,)),  # of Flax's layers
        *every(**_SCALED, momentum_beta=(0.0,)),
    ],
    compiled_for_networks=[
        *every(Lambda=(0.0,), momentum_beta=(0.9, 0.0)),
        *every(use_rms=(True,), nesterov=(True, False), Lambda=(0.01, 0.0)),
        *every(**_SCALED, nesterov=(True, False), lagged=(True, False), Lambda=(0.0,)),
        *every(**_SCALED, nesterov=(True, False), clip_rms=(1.0,), Lambda=(0.0,)),
        *every(**_SCALED, momentum_beta=(0.0,), lagged=(True, False), Lambda=(0.0,)),
    ],
    compiled_for_bfloat16=every(
        **_SCALED, nesterov=(True, False), momentum_dtype=("int8", "int4"), stochastic_rounding=(False, True)
    ),
)
def fusedbun(
    eps: NonNegative = 1e-8,
    beta_decay: UnitInterval = 0.8,
    Lambda: NonNegative = 0.01,
    momentum_beta: StateAbove0 = 0.9,
    centralize: bool = False,
    use_rms: bool = False,
    *,
    nesterov: bool = False,
    clip_rms: Positive | None = None,
    lagged: bool = False,
    channel_axis: PerParam[Axis] = 0,
    momentum_dtype: MomentDtype = None,
) -> Chain:
    """Fusedbun: SM3's accumulators, one vector per axis, with Adalite's centralization, RMS scaling and momentum.

        centralize → sparse_mask → sm3_accumulate → rms_scale → clip_rms → momentum → decay
        p = p - lr*u

    The recommended setting is `centralize=True, use_rms=True, nesterov=True`.

    Args:
        eps: the mask's threshold, and added to the root in `rms_scale`; in [0, inf).
        beta_decay: the share of the past that the accumulators keep, in [0, 1).
        Lambda: decoupled weight decay, in [0, inf); `weight_decay` is another name for it.
        momentum_beta: the share of the past that the momentum keeps, in [0, 1); at 0 no momentum is stored. `momentum`
            is another name for it.
        centralize: take each channel's mean from its gradient (parameters of two or more axes).
        use_rms: divide by the root of the second moment. The accumulators are kept up to date without it too, so it
            can be switched on in the middle of a run.
        nesterov: Nesterov's momentum.
        clip_rms: the largest root mean square of a parameter's scaled update, in (0, inf); None: no clipping.
        lagged: let the second moment use the step before's statistics of all axes but the first (one pass over memory).
            Where outputs are not the first axis, as in Flax, set clip_rms=1 with it: a unit that wakes up is otherwise
            divided by what it was before.
        channel_axis: the axis that `centralize` keeps.

    State: `sum(n_i)` float32 numbers for a parameter of shape `(n_1 … n_k)`, k > 1, and its own shape for k <= 1;
        with momentum one more array of its shape.
    Source: Anil, Gupta, Koren, Singer 2019 (arXiv 1901.11150) for the accumulators; Shazeer, Stern 2018
        (arXiv 1804.04235) for their product; Yong et al. 2020 (arXiv 2004.01461) for centralization.
    """
    return chain(
        Centralize(channel_axis) if centralize else None,
        SparseMask(eps),
        SM3Accumulate(beta_decay, statistic="mean", combine="product", lagged=lagged),
        RMSScale(eps) if use_rms else None,
        None if clip_rms is None else ClipRMS(clip_rms),
        Momentum(momentum_beta, nesterov=nesterov, dtype=momentum_dtype),
        Decay(Lambda),
    )


def notice_no_memory(hyperparameters: Settings) -> str | None:
    """A warning for means that forget everything in each step."""
    if hyperparameters["statistic"] == "mean" and is_concrete_zero(hyperparameters["beta"]):
        return "with statistic='mean' and beta=0 the second moment is this step's alone; beta=0.95 is usual"
    return None


@recipe(
    "SM3",
    lr=0.1,
    notice=notice_no_memory,
    recommended={"momentum": 0.9},
    training_lr=0.1,
    listed=[{"momentum": 0.9}],
    planned={"no momentum": {}, **momentum_in("float32", "bfloat16", "int8", "int4", momentum=0.9)},
    tested={"": {}, "momentum": {"momentum": 0.9, "beta": 0.9}, "of means": {"beta": 0.95, "statistic": "mean"}},
    compiled=every(momentum=(0.0, 0.9), beta=(0.0, 0.9)),
    compiled_for_networks=every(momentum=(0.0, 0.9), beta=(0.9,), statistic=("mean",)),
    compiled_for_bfloat16=[
        {"stochastic_rounding": True},
        *every(momentum=(0.9,), momentum_dtype=("param", "int8"), stochastic_rounding=(True,)),
    ],
)
def sm3(
    momentum: StateAbove0 = 0.0,
    beta: UnitInterval = 0.0,
    eps: NonNegative = 1e-30,
    *,
    statistic: Literal["max", "mean"] = "max",
    momentum_dtype: MomentDtype = None,
) -> Chain:
    """SM3-II: the smallest of a vector per axis bounds the second moment of every element.

        sm3_accumulate → rms_scale → momentum
        u = g / sqrt(nu + eps)
        p = p - lr*u

    In torch a sparse gradient (`nn.Embedding(sparse=True)`) reads and writes only the rows it touches, with one
    accumulator of `n_1` numbers; such a parameter has no momentum.

    Args:
        momentum: the share of the past that the momentum keeps, in [0, 1); its new part is damped by as much. At 0 no
            momentum is stored.
        beta: the share of the past that the second moment keeps, in [0, 1); at 0 squares are summed, and with "mean"
            nothing is kept.
        eps: added under the root, in [0, inf).
        statistic: "max", SM3's own, or "mean": the vectors hold running means of squares, and the smallest is no bound
            but follows the gradients closer. For beta=0.95 or so, a learning rate of a quarter to a half of AdamW's,
            and dense gradients.

    State: `sum(n_i)` float32 numbers for a parameter of shape `(n_1 … n_k)`, k > 1, and its own shape for k <= 1;
        with momentum one more array of its shape.
    Source: Anil, Gupta, Koren, Singer 2019 (arXiv 1901.11150).
    """
    damped = Momentum(momentum, dampening=momentum, dtype=momentum_dtype)
    return chain(SM3Accumulate(beta, statistic, "min"), RMSScale(0.0, eps), damped)
