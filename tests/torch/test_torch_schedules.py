"""torch's schedulers, of the momentum too, averages of weights, tensor learning rates, and the gradient scaler."""

import copy
import warnings

import pytest
import torch
from makers import (
    SHAPES,
    assert_same,
    assert_same_run,
    copies,
    every_optimizer,
    every_optimizer_with_state,
    first_lr,
    gradient,
    parameters,
    run,
    unchanged,
)
from torch.optim import lr_scheduler as schedules
from torch.optim import swa_utils as averages

from fusedbun import ChainOptimizer, ScaledOptum, TernaryVote
from fusedbun.transforms import Sign

SCHEDULES = {
    "StepLR": lambda o: schedules.StepLR(o, step_size=2, gamma=0.5),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, T_max=6),
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, max_lr=0.5, total_steps=8, cycle_momentum=False),
    "CyclicLR": lambda o: schedules.CyclicLR(o, base_lr=0.01, max_lr=0.2, step_size_up=2, cycle_momentum=False),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=3), schedules.ExponentialLR(o, 0.5)], milestones=[3]
    ),
}


def scheduled(optimizer, schedule, steps=7):
    """Runs the optimizer under the schedule and returns the learning rate of each step."""
    scheduler, rates = schedule(optimizer), []
    for step in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        run(optimizer, range(step, step + 1))
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@every_optimizer
def test_a_scheduler_gives_each_step_its_learning_rate(make, schedule):
    params = parameters(*SHAPES)
    optimizer, by_hand = make(params, lr=0.1), make(copies(params), lr=0.1)
    torchs_own = torch.optim.SGD(copies(params), lr=0.1)
    rates = scheduled(optimizer, schedule)
    assert rates == scheduled(torchs_own, schedule)
    assert len(set(rates)) > 2
    assert first_lr(by_hand) == first_lr(optimizer)
    for step, rate in enumerate(rates):
        by_hand.param_groups[0]["lr"] = rate
        run(by_hand, range(step, step + 1))
    assert_same_run(optimizer, by_hand)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@every_optimizer
def test_a_scheduler_moves_a_tensor_in_place(make, schedule):
    params = parameters(*SHAPES, dtype=torch.float64)
    by_float = make(copies(params), lr=0.1)
    lr = torch.tensor(0.1, dtype=torch.float64)
    optimizer = make(params, lr=lr)
    rates = scheduled(optimizer, schedule)
    assert optimizer.param_groups[0]["lr"] is lr
    assert rates == pytest.approx(scheduled(by_float, schedule), rel=1e-12)
    for p, q in zip(params, by_float.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@every_optimizer
def test_reduce_on_plateau(make):
    optimizer = make(parameters((4, 3)), lr=0.1)
    scheduler = schedules.ReduceLROnPlateau(optimizer, patience=1, factor=0.5)
    for loss in (1.0, 1.0, 1.0, 1.0, 1.0):
        run(optimizer, 1)
        scheduler.step(loss)
    assert optimizer.param_groups[0]["lr"] == 0.025


@every_optimizer
def test_a_schedule_continues_from_saved_states(make):
    def start(params):
        optimizer = make(params, lr=0.1)
        return optimizer, schedules.CosineAnnealingLR(optimizer, T_max=8)

    def train(optimizer, scheduler, steps):
        for step in steps:
            run(optimizer, range(step, step + 1))
            scheduler.step()

    whole = start(parameters(*SHAPES))
    train(*whole, range(3))
    saved, params = [part.state_dict() for part in whole], copies(whole[0].param_groups[0]["params"])
    resumed = start(params)
    for part, state in zip(reversed(resumed), reversed(saved), strict=True):  # the optimizer last, as torch advises
        part.load_state_dict(state)
    train(*whole, range(3, 6))
    train(*resumed, range(3, 6))
    assert_same_run(whole[0], resumed[0])


CYCLES = {
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, max_lr=0.5, total_steps=8),
    "CyclicLR": lambda o: schedules.CyclicLR(o, base_lr=0.01, max_lr=0.2, step_size_up=2),
}
every_cycle = pytest.mark.parametrize("cycle", CYCLES.values(), ids=CYCLES.keys())


def own_name(optimizer):
    """What the class itself calls its momentum."""
    return {"Fusedbun": "momentum_beta", "ChainOptimizer": "momentum.beta"}.get(type(optimizer).__name__, "momentum")


def momentum_of(optimizer):
    (group,) = optimizer.param_groups
    return group["betas"][0] if "betas" in group else group[own_name(optimizer)]


def set_momentum(optimizer, value):
    (group,) = optimizer.param_groups
    if "betas" in group:
        group["betas"] = (value, *group["betas"][1:])
    else:
        group[own_name(optimizer)] = value


@every_cycle
@every_optimizer_with_state
def test_a_cycle_moves_the_momentum_of_every_optimizer_that_has_one(make, cycle):
    params = parameters(*SHAPES)
    optimizer, torchs_own = make(params, lr=0.1), torch.optim.SGD(copies(params), lr=0.1, momentum=0.9)
    by_hand, momenta = make(copies(params), lr=0.1), []
    schedulers = cycle(optimizer), cycle(torchs_own)
    for step in range(6):
        momenta.append(momentum_of(optimizer))
        assert momenta[-1] == torchs_own.param_groups[0]["momentum"]
        set_momentum(by_hand, momenta[-1])
        by_hand.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
        run(optimizer, range(step, step + 1))
        run(by_hand, range(step, step + 1))
        run(torchs_own, range(step, step + 1))
        for scheduler in schedulers:
            scheduler.step()
    assert len(set(momenta)) > 2
    assert_same_run(optimizer, by_hand)


@every_cycle
def test_a_cycle_for_an_optimizer_without_momentum_is_told_what_to_give(cycle):
    p = torch.nn.Parameter(torch.ones(2))
    for optimizer in (ScaledOptum([p]), TernaryVote([p]), ChainOptimizer([p], [Sign()], 0.1)):
        with pytest.raises(ValueError, match="`cycle_momentum`"):
            cycle(optimizer)


@every_cycle
@every_optimizer_with_state
def test_a_cycle_continues_from_saved_states(make, cycle):
    whole = make(parameters(*SHAPES), lr=0.1)
    scheduler = cycle(whole)
    for step in range(3):
        run(whole, range(step, step + 1))
        scheduler.step()
    resumed = make(copies(whole.param_groups[0]["params"]), lr=0.1)
    again = cycle(resumed)
    again.load_state_dict(scheduler.state_dict())
    resumed.load_state_dict(whole.state_dict())
    for step in range(3, 6):
        for optimizer, schedule in ((whole, scheduler), (resumed, again)):
            run(optimizer, range(step, step + 1))
            schedule.step()
    assert_same_run(whole, resumed)
    assert momentum_of(resumed) == momentum_of(whole)


@every_optimizer
def test_averages_of_weights(make):
    """SWA and EMA: their schedule of the learning rate, and their models, as with torch's own optimizers."""
    model, rates = torch.nn.Linear(4, 3), []
    for start in (lambda params: make(params, lr=0.1), lambda params: torch.optim.SGD(params, lr=0.1)):
        trained = copy.deepcopy(model)
        optimizer = start(trained.parameters())
        scheduler = averages.SWALR(optimizer, swa_lr=0.02, anneal_epochs=3)
        means = (
            averages.AveragedModel(trained),
            averages.AveragedModel(trained, multi_avg_fn=averages.get_ema_multi_avg_fn(0.5)),
        )
        rates.append([])
        for step in range(5):
            run(optimizer, range(step, step + 1))
            for mean in means:
                mean.update_parameters(trained)
            scheduler.step()
            rates[-1].append(optimizer.param_groups[0]["lr"])
        for mean in means:
            assert not torch.equal(mean.module.weight, trained.weight)
    assert rates[0] == rates[1]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_optimizer
def test_a_tensor_learning_rate_is_a_number(make, dtype, shape):
    """With any number of axes: it broadcasts to a 0-d parameter too."""
    params = parameters(*SHAPES)
    wanted, optimizer = make(copies(params), lr=0.125), make(params, lr=torch.full(shape, 0.125, dtype=dtype))
    run(wanted, 3)
    run(optimizer, 3)
    for p, q in zip(params, wanted.param_groups[0]["params"], strict=True):
        assert p.dtype == torch.float32
        torch.testing.assert_close(p, q, rtol=3e-7, atol=1e-7)


# Mixed precision


@every_optimizer
def test_gradient_scaler(make):
    """Scaled and unscaled by a power of two, a step is the same to the last bit; a step with an infinity is skipped."""
    params = parameters((4, 3), (5,))
    wanted, optimizer = make(copies(params), lr=0.1), make(params, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for step in range(4):
        run(wanted, range(step, step + 1))
        loss = sum((p * gradient(p, step, i)).sum() for i, p in enumerate(params))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_same_run(optimizer, wanted)

    params[1].grad[0] = torch.inf
    with unchanged(optimizer):
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**9


@every_optimizer
def test_autocast_trains_in_bfloat16(make):
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 4)
    optimizer = make(layer.parameters(), lr=0.01)
    inputs, wanted = torch.randn(32, 8), torch.randn(32, 4)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = torch.nn.functional.mse_loss(layer(inputs).float(), wanted)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in layer.parameters())


@every_optimizer
def test_a_scheduler_before_the_first_step_warns_as_for_torchs_own(make):
    """torch finds out that `step` was called by wrapping it; a wrapped `step` must still do so."""
    optimizer = make(parameters((2,)), lr=0.1)
    scheduler = schedules.ExponentialLR(optimizer, 0.5)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()
    optimizer = make(parameters((2,)), lr=0.1)
    scheduler = schedules.ExponentialLR(optimizer, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(optimizer, 1)
        scheduler.step()
    assert_same(optimizer.param_groups[0]["lr"], 0.05)
