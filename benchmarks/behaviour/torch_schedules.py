"""Torch: every scheduler."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from benchmarks.behaviour.in_torch import assert_same, loss, network
from benchmarks.behaviour.uses import Contender, Part

PART = Part("Schedules")
STEPS = 12
FIXED = {"TernaryVote": "Its step is from one ternary weight to the next; it has no size that could be changed."}
CYCLED = {
    **FIXED,
    "ScaledOptum": "It has no momentum; give the schedule `cycle_momentum=False`.",
    "TernaryVote": "It has no learning rate to be changed, and no momentum.",
}


def sequential(optimizer: Any) -> Any:
    """A warm-up, and a cosine behind it."""
    first, second = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(optimizer, 8)
    return lr_scheduler.SequentialLR(optimizer, [first, second], [4])


def chained(optimizer: Any) -> Any:
    """The product of two."""
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.5, 3), lr_scheduler.ExponentialLR(optimizer, 0.9)], optimizer
    )


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
    "MultiplicativeLR": partial(lr_scheduler.MultiplicativeLR, lr_lambda=lambda step: 0.9),
    "StepLR": partial(lr_scheduler.StepLR, step_size=3),
    "MultiStepLR": partial(lr_scheduler.MultiStepLR, milestones=[3, 7]),
    "ConstantLR": partial(lr_scheduler.ConstantLR, factor=0.5),
    "LinearLR": partial(lr_scheduler.LinearLR, start_factor=0.1),
    "ExponentialLR": partial(lr_scheduler.ExponentialLR, gamma=0.9),
    "PolynomialLR": partial(lr_scheduler.PolynomialLR, total_iters=STEPS),
    "CosineAnnealingLR": partial(lr_scheduler.CosineAnnealingLR, T_max=STEPS),
    "CosineAnnealingWarmRestarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=4),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": partial(lr_scheduler.ReduceLROnPlateau, patience=1),
    "CyclicLR": partial(lr_scheduler.CyclicLR, base_lr=1e-4, max_lr=1e-2, step_size_up=4),
    "OneCycleLR": partial(lr_scheduler.OneCycleLR, max_lr=1e-2, total_steps=STEPS),
    "SWALR": partial(SWALR, swa_lr=1e-3, anneal_epochs=4),
}


def run(model: Any, optimizer: Any, schedule: Any, steps: range) -> list[float]:
    """The learning rate of each step."""
    rates = []
    for step in steps:
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step(*([1.0] if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else []))
    return rates


def resumed_to_the_bit(make_schedule: Callable[[Any], Any], contender: Contender) -> None:
    """The learning rates are those that `SGD` gets; a run that is saved and resumed in its middle ends the same."""
    plain = network(contender)
    sgd = torch.optim.SGD(plain.parameters(), lr=1e-2, momentum=0.9)
    wanted = run(plain, sgd, make_schedule(sgd), range(STEPS))
    whole = network(contender)
    optimizer = contender(whole.parameters())
    schedule = make_schedule(optimizer)
    rates = run(whole, optimizer, schedule, range(STEPS // 2))
    saved = copy.deepcopy([x.state_dict() for x in (whole, optimizer, schedule)])
    resumed = network(contender)
    again = contender(resumed.parameters())
    schedule_again = make_schedule(again)
    for target, state in zip((resumed, again, schedule_again), saved, strict=True):
        target.load_state_dict(state)
    run(resumed, again, schedule_again, range(STEPS // 2, STEPS))
    assert rates + run(whole, optimizer, schedule, range(STEPS // 2, STEPS)) == wanted, "the rates are other ones"
    assert_same(resumed, whole)


for name, make in SCHEDULES.items():
    PART.use(
        f"`{name}`",
        reasons=CYCLED if name in ("CyclicLR", "OneCycleLR") else FIXED,
        works_if=resumed_to_the_bit.__doc__,
    )(partial(resumed_to_the_bit, make))
