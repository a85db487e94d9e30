"""The optimizers: each is a function from its hyper-parameters to a chain of transformations.

The torch class and the optax factory of the same name are made from the recipe, and take its arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any, Literal, ParamSpec

from fusedbun.chain import Chain, chain
from fusedbun.derive import INITIAL_LR
from fusedbun.hyper import (
    Axis,
    NonNegative,
    PerParam,
    Positive,
    UnitInterval,
    Votes,
    checked,
    is_concrete_zero,
)
from fusedbun.mup import Constraint, MupScale, Types, independent, relative_decay
from fusedbun.storage.codes import MomentDtype, SecondMomentDtype
from fusedbun.transforms import (
    Centralize,
    ClipRMS,
    Decay,
    Momentum,
    RMSScale,
    ScaleByAdam,
    ScaleByLion,
    ScaleByMup,
    Sign,
    SignDecay,
    SM3Accumulate,
    SparseMask,
    Vote,
)

P = ParamSpec("P")
Betas = tuple[UnitInterval, UnitInterval]


def no_notice(hyperparameters: Mapping[str, Any]) -> None:
    """There is nothing to warn of."""


def notice_strong_decay(hyperparameters: Mapping[str, Any]) -> str | None:
    """A warning for those who are used to a weight decay that the learning rate multiplies."""
    weight_decay = hyperparameters["weight_decay"]
    if not isinstance(weight_decay, Real) or weight_decay < 1e-3:
        return None
    return (
        f"weight_decay={weight_decay!r} multiplies every weight by {1 - float(weight_decay):g} in each step at the "
        f"initial learning rate, for it is not multiplied by the learning rate; 1e-4 and less is usual"
    )


@dataclass(frozen=True)
class Recipe:
    """A recipe as the drivers find it; calling it is calling the function.

    Args:
        make: the function; an argument `initial_lr` is filled in by the driver.
        torch_class: the name of its torch class.
        lr: the learning rate's default; None where it has to be given.
        fixed_lr: the learning rate is `lr` and cannot be changed.
        notice: a warning that some hyper-parameters deserve, or None.
    """

    make: Callable[..., Chain]
    torch_class: str
    lr: float | None = None
    fixed_lr: bool = False
    notice: Callable[[Mapping[str, Any]], str | None] = no_notice

    @cached_property
    def wants_initial_lr(self) -> bool:
        """Whether the function has an argument `initial_lr`."""
        return INITIAL_LR in inspect.signature(self.make).parameters


RECIPES: dict[str, Recipe] = {}


def recipe(torch_class: str, **about: Any) -> Callable[[Callable[P, Chain]], Callable[P, Chain]]:
    """Enters a function among the recipes, with its arguments checked by their annotations."""

    def enter(function: Callable[P, Chain]) -> Callable[P, Chain]:
        make = checked(function)
        RECIPES[function.__name__] = Recipe(make, torch_class, **about)
        return make

    return enter


@recipe("Fusedbun")
def fusedbun(
    eps: NonNegative = 1e-8,
    beta_decay: UnitInterval = 0.8,
    Lambda: NonNegative = 0.01,
    momentum_beta: UnitInterval = 0.9,
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
        Lambda: decoupled weight decay, in [0, inf).
        momentum_beta: the share of the past that the momentum keeps, in [0, 1); at 0 no momentum is stored.
        centralize: take each channel's mean from its gradient (parameters of two or more axes).
        use_rms: divide by the root of the second moment. The accumulators are kept up to date without it too, so it
            can be switched on in the middle of a run.
        nesterov: Nesterov's momentum.
        clip_rms: the largest root mean square of a parameter's scaled update, in (0, inf); None: no clipping.
        lagged: let the second moment use the step before's statistics of all axes but the first (one pass over memory).
            Where outputs are not the first axis, as in Flax, set clip_rms=1 with it: a unit that wakes up is otherwise
            divided by what it was before.
        channel_axis: the axis that `centralize` keeps.
        momentum_dtype: what the momentum is stored in: "float32", "bfloat16", "int8", "int4", "param" for the
            parameter's dtype, or None for what is computed in. Fewer bits are rounded stochastically; int8 and int4
            are codes with an exponent for every 32, and leave parameters of fewer than two axes in float32.

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


def notice_no_memory(hyperparameters: Mapping[str, Any]) -> str | None:
    """A warning for means that forget everything in each step."""
    if hyperparameters["statistic"] == "mean" and is_concrete_zero(hyperparameters["beta"]):
        return "with statistic='mean' and beta=0 the second moment is this step's alone; beta=0.95 is usual"
    return None


@recipe("SM3", lr=0.1, notice=notice_no_memory)
def sm3(
    momentum: UnitInterval = 0.0,
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
        momentum_dtype: what the momentum is stored in: "float32", "bfloat16", "int8", "int4", "param" for the
            parameter's dtype, or None for what is computed in. Fewer bits are rounded stochastically; int8 and int4
            are codes with an exponent for every 32, and leave parameters of fewer than two axes in float32.

    State: `sum(n_i)` float32 numbers for a parameter of shape `(n_1 … n_k)`, k > 1, and its own shape for k <= 1;
        with momentum one more array of its shape.
    Source: Anil, Gupta, Koren, Singer 2019 (arXiv 1901.11150).
    """
    damped = Momentum(momentum, dampening=momentum, dtype=momentum_dtype)
    return chain(SM3Accumulate(beta, statistic, "min"), RMSScale(0.0, eps), damped)


@recipe("ScaledOptum", lr=1e-2)
def scaled_optum(weight_decay: NonNegative = 0.0) -> Chain:
    """ScaledOptum, or SignSGD: steps of one size, for networks with ternary weights.

        sign → sign_decay
        p = p - lr*(sign(g) + weight_decay*sign(p))

    Args:
        weight_decay: how much of a step goes to the decay, in [0, inf).

    State: none.
    Source: Bernstein, Wang, Azizzadenesheli, Anandkumar 2018 (arXiv 1802.04434).
    """
    return chain(Sign(), SignDecay(weight_decay))


@recipe("TernaryVote", lr=1.0, fixed_lr=True)
def ternary_vote(threshold: Votes = 8) -> Chain:
    """Ternary weights that step by one when the signs of their gradients agree often enough.

        vote
        p = clip(p - sign(v), -1, 1) where abs(v) >= threshold, v the sum of the gradients' signs since the last step

    The weights are -1, 0 or +1, and stay so. The learning rate is 1.

    Args:
        threshold: the size of the sum at which a weight steps, a whole number in [1, 127].

    State: one int8 array of the parameter's shape.
    """
    return chain(Vote(threshold))


@recipe("MupAdam", lr=1e-3)
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
        betas: the shares of the past that the mean and the mean of squares keep, in [0, 1).
        eps: added to the root, in [0, inf).
        weight_decay: added to the gradient as `weight_decay*p` (an L2 penalty), in [0, inf).
        amsgrad: divide by the largest mean of squares so far.
        independent_weight_decay: divide weight_decay by the parameter's scaled initial learning rate.
        allow_non_unit_scaling_params: step a parameter without a type with the scale 1 instead of raising an error.
        mup: the parameters' types, as a mapping by name, a tree of names or a rule `(path, param) -> type`; None reads
            the attributes that unit-scaling's modules set. See `fusedbun.mup.MupScale`.
        channel_axis: the axis of a parameter's outputs; its fan-in is the product of the others.
        momentum_dtype: what the mean is stored in: "float32", "bfloat16", "int8", "int4", "param" for the
            parameter's dtype, or None for what is computed in. Fewer bits are rounded stochastically; int8 and int4
            are codes with an exponent for every 32, and leave parameters of fewer than two axes in float32.
        second_moment_dtype: what the mean of squares is stored in, among the same; int8 and int4 are too coarse for it.

    State: two arrays of the parameter's shape (amsgrad: three) and a step counter.
    Source: Blake et al. 2024 (arXiv 2407.17465); Kingma, Ba 2015 (arXiv 1412.6980).
    """
    scale = MupScale(mup, channel_axis, allow_non_unit_scaling_params)
    decay = independent(weight_decay, initial_lr, scale) if independent_weight_decay else weight_decay
    return chain(
        Decay(decay), ScaleByAdam(*betas, eps, amsgrad, momentum_dtype, second_moment_dtype), ScaleByMup(scale)
    )


@recipe("MupAdamW", lr=1e-3)
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
        betas: the shares of the past that the mean and the mean of squares keep, in [0, 1).
        eps: added to the root, in [0, inf).
        weight_decay: decoupled weight decay, in [0, inf).
        amsgrad: divide by the largest mean of squares so far.
        independent_weight_decay: divide weight_decay by the parameter's scaled initial learning rate, so that it
            follows the schedule but not the learning rate's size.
        allow_non_unit_scaling_params: step a parameter without a type with the scale 1 instead of raising an error.
        mup: the parameters' types, as a mapping by name, a tree of names or a rule `(path, param) -> type`; None reads
            the attributes that unit-scaling's modules set. See `fusedbun.mup.MupScale`.
        channel_axis: the axis of a parameter's outputs; its fan-in is the product of the others.
        momentum_dtype: what the mean is stored in: "float32", "bfloat16", "int8", "int4", "param" for the
            parameter's dtype, or None for what is computed in. Fewer bits are rounded stochastically; int8 and int4
            are codes with an exponent for every 32, and leave parameters of fewer than two axes in float32.
        second_moment_dtype: what the mean of squares is stored in, among the same; int8 and int4 are too coarse for it.

    State: two arrays of the parameter's shape (amsgrad: three) and a step counter.
    Source: Blake et al. 2024 (arXiv 2407.17465); Loshchilov, Hutter 2019 (arXiv 1711.05101).
    """
    scale = MupScale(mup, channel_axis, allow_non_unit_scaling_params)
    decay = independent(weight_decay, initial_lr, scale) if independent_weight_decay else weight_decay
    return chain(
        ScaleByAdam(*betas, eps, amsgrad, momentum_dtype, second_moment_dtype), Decay(decay), ScaleByMup(scale)
    )


@recipe("MupSGD", lr=1e-3)
def mup_sgd(
    momentum: UnitInterval = 0.0,
    dampening: UnitInterval = 0.0,
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
        weight_decay: added to the gradient as `weight_decay*p` (an L2 penalty), in [0, inf).
        nesterov: Nesterov's momentum; with a momentum and no dampening only.
        readout_constraint: "to_output_scale" where the model's readout layer has this constraint.
        independent_weight_decay: divide weight_decay by the parameter's scaled initial learning rate.
        allow_non_unit_scaling_params: step a parameter without a type with the scale 1 instead of raising an error.
        mup: the parameters' types, as a mapping by name, a tree of names or a rule `(path, param) -> type`; None reads
            the attributes that unit-scaling's modules set. See `fusedbun.mup.MupScale`.
        channel_axis: the axis of a parameter's outputs; its fan-in is the product of the others.
        momentum_dtype: what the momentum is stored in: "float32", "bfloat16", "int8", "int4", "param" for the
            parameter's dtype, or None for what is computed in. Fewer bits are rounded stochastically; int8 and int4
            are codes with an exponent for every 32, and leave parameters of fewer than two axes in float32.

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


@recipe("DecoupledLionW", lr=1e-4, notice=notice_strong_decay)
def decoupled_lionw(
    betas: Betas = (0.9, 0.99),
    weight_decay: NonNegative = 0.0,
    *,
    momentum_dtype: MomentDtype = None,
    initial_lr: NonNegative | None = None,
) -> Chain:
    """Lion with a weight decay that follows the schedule, but not the learning rate's size.

        scale_by_lion → decay
        p = p*(1 - lr/initial_lr*weight_decay) - lr*sign(beta1*m + (1 - beta1)*g)

    Args:
        betas: the share of the mean in a step, and of the past that the mean keeps; in [0, 1).
        weight_decay: what every weight loses in a step at the initial learning rate, in [0, inf); 1e-3 or more gives a
            warning. Where the initial learning rate is 0 nothing decays.
        momentum_dtype: what the momentum is stored in: "float32", "bfloat16", "int8", "param" for the
            parameter's dtype, or None for what is computed in. Fewer bits are rounded stochastically; int8
            is codes with an exponent for every 32, and leaves parameters of fewer than two axes in float32.

    State: one array of the parameter's shape.
    Source: Chen et al. 2023 (arXiv 2302.06675).
    """
    if momentum_dtype == "int4":
        raise ValueError(
            'decoupled_lionw: momentum_dtype="int4" is too coarse, for a step is the sign of the momentum, however '
            'small that is, and losses are far higher; "int8" serves'
        )
    return chain(ScaleByLion(*betas, momentum_dtype), Decay(relative_decay(weight_decay, initial_lr)))
