"""Lion, with a decay of its own."""

from __future__ import annotations

from numbers import Real

from fusedbun.chain import Chain, chain
from fusedbun.hyper import NonNegative
from fusedbun.mup import relative_decay
from fusedbun.recipe import Betas, Settings, every, momentum_in, recipe
from fusedbun.storage.codes import MomentDtype
from fusedbun.transforms import Decay, ScaleByLion

__all__ = ["decoupled_lionw"]


def notice_strong_decay(hyperparameters: Settings) -> str | None:
    """A warning for those who are used to a weight decay that the learning rate multiplies."""
    weight_decay = hyperparameters["weight_decay"]
    if not isinstance(weight_decay, Real) or weight_decay < 1e-3:
        return None
    return (
        f"weight_decay={weight_decay!r} multiplies every weight by {1 - float(weight_decay):g} in each step at the "
        f"initial learning rate, for it is not multiplied by the learning rate; 1e-4 and less is usual"
    )


@recipe(
    "DecoupledLionW",
    lr=1e-4,
    notice=notice_strong_decay,
    training_lr=6e-4,
    listed=[{"momentum_dtype": "int8"}],
    planned=momentum_in("float32", "bfloat16", "int8"),
    tested={"": {"weight_decay": 1e-4}},
    compiled=every(weight_decay=(0.0, 0.1)),
    compiled_for_bfloat16=every(momentum_dtype=("param", "int8"), stochastic_rounding=(True,)),
)
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
