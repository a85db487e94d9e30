"""The optimizers: each is a function from its hyper-parameters to a chain of transformations.

The torch class and the optax factory of the same name are made from the recipe, and take its arguments.
"""

from __future__ import annotations

from fusedbun.chain import Chain, chain
from fusedbun.hyper import Axis, NonNegative, PerParam, Positive, UnitInterval, checked
from fusedbun.transforms import Centralize, ClipRMS, Decay, Momentum, RMSScale, SM3Accumulate, SparseMask


@checked
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
        Momentum(momentum_beta, nesterov=nesterov),
        Decay(Lambda),
    )
