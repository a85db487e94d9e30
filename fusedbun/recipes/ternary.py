"""For networks with ternary weights: steps of one size, and steps by vote."""

from __future__ import annotations

from fusedbun.chain import Chain, chain
from fusedbun.hyper import NonNegative, Votes
from fusedbun.recipe import every, recipe
from fusedbun.transforms import Sign, SignDecay, Vote

__all__ = ["scaled_optum", "ternary_vote"]


@recipe(
    "ScaledOptum",
    aliases=("SignSGD",),
    lr=1e-2,
    densifies_sparse_gradients=True,
    training_lr=4e-3,
    planned={"no state": {}},
    tested={"": {"weight_decay": 0.1}},
    compiled=every(weight_decay=(0.0, 0.1)),
)
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


@recipe("TernaryVote", lr=1.0, fixed_lr=True, planned={"votes int8": {}}, tested={"": {"threshold": 2}})
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
