"""Torch: what is put around a step."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import fusedbun
from benchmarks.behaviour.in_torch import (
    assert_moved,
    assert_same,
    batch,
    loss,
    network,
    stepped,
    train,
    trained,
    values,
    vectors,
)
from benchmarks.behaviour.torch_schedules import FIXED
from benchmarks.behaviour.uses import Contender, Part, is_ours

PART = Part("Around a step")
COARSE = {"TernaryVote": "A step of a weight is a whole 1, which is too coarse for a network of eight units."}


@PART.use("a loop that descends", reasons=COARSE)
def descends(contender: Contender) -> None:
    """After steps on one batch the loss is lower."""
    model = network(contender)
    optimizer, before = contender(model.parameters()), loss(model, 0).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss(model, 0).backward()
        optimizer.step()
    assert loss(model, 0).item() < before, "the loss is not lower"


@PART.use("two runs")
def twice(contender: Contender) -> None:
    """They are the same to the bit."""
    assert_same(trained(contender), trained(contender))


@PART.use("`zero_grad(set_to_none=False)`")
def zeroed(contender: Contender) -> None:
    """Gradients are zero and keep their memory, and the run is the one with gradients of None."""
    model = network(contender)
    optimizer = contender(model.parameters())
    for step in range(3):
        optimizer.zero_grad(set_to_none=False)
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
        loss(model, step).backward()
        optimizer.step()
    assert_same(model, trained(contender))


@PART.use("gradient accumulation")
def accumulated(contender: Contender) -> None:
    """Two backward passes and a step equal a step on the sum of both losses."""
    models = [network(contender) for _ in range(2)]
    optimizers = [contender(model.parameters()) for model in models]
    loss(models[0], 0).backward()
    loss(models[0], 1).backward()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        q.grad = p.grad.clone()
    for optimizer in optimizers:
        optimizer.step()
    assert_same(*models)
    assert_moved(models[0], contender)


@PART.use("`clip_grad_norm_`, `clip_grad_value_`")
def clipped(contender: Contender) -> None:
    """The step is the one with the clipped gradients, given by hand."""
    models = [network(contender) for _ in range(2)]
    optimizers = [contender(model.parameters()) for model in models]
    for model in models:
        loss(model, 0).backward()
    total = torch.stack([p.grad.norm() for p in models[1].parameters()]).norm()
    nn.utils.clip_grad_norm_(models[0].parameters(), 0.1)
    nn.utils.clip_grad_value_(models[0].parameters(), 0.01)
    for p in models[1].parameters():
        p.grad = (p.grad * (0.1 / (total + 1e-6)).clamp(max=1.0)).clamp(-0.01, 0.01)
    for optimizer in optimizers:
        optimizer.step()
    assert_same(*models, off=1e-4)


@PART.use("`step(closure)`")
def closure(contender: Contender) -> None:
    """The closure is called with gradients enabled, its loss returned, and the run is the plain one."""
    model = network(contender)
    optimizer = contender(model.parameters())
    for step in range(3):

        def evaluate(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            found = loss(model, step)
            found.backward()
            return found

        wanted = loss(model, step)
        assert_same(optimizer.step(evaluate).detach(), wanted.detach())
    assert_same(model, trained(contender))


@PART.use("`register_step_pre_hook`, `register_step_post_hook`")
def hooks(contender: Contender) -> None:
    """Both are called in every step, before and after the parameters move."""
    model = network(contender)
    optimizer, seen = contender(model.parameters()), []
    optimizer.register_step_pre_hook(lambda *_: seen.append(copy.deepcopy(values(model))))
    optimizer.register_step_post_hook(lambda *_: seen.append(copy.deepcopy(values(model))))
    train(model, optimizer, 2)
    assert len(seen) == 4
    assert_same(seen[1], seen[2])
    assert_same(seen[3], values(model))
    assert any(bool((seen[0][name] != x).any()) for name, x in seen[1].items())


@PART.use("`torch.profiler`")
def profiled(contender: Contender) -> None:
    """The step shows under the name of its class, and the run is the plain one."""
    model = network(contender)
    optimizer = contender(model.parameters())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(model, optimizer)
    assert f"Optimizer.step#{contender.name}.step" in {event.key for event in profile.key_averages()}
    assert_same(model, trained(contender))


@PART.use("`maximize=True`")
def maximized(contender: Contender) -> None:
    """A step with the gradients negated is the step that descends."""
    models = [network(contender) for _ in range(2)]
    for model, sign, settings in zip(models, (1, -1), ({}, {"maximize": True}), strict=True):
        optimizer = contender(model.parameters(), **settings)
        (sign * loss(model, 0)).backward()
        optimizer.step()
    assert_same(*models)
    assert_moved(models[0], contender)


@PART.use("a tensor as learning rate", reasons=FIXED)
def tensor_rate(contender: Contender) -> None:
    """It may be changed in its place, and the run is the one with the same numbers."""
    model, plain = network(contender), network(contender)
    rate = torch.tensor(1e-2)
    optimizer, wanted = contender(model.parameters(), lr=rate), contender(plain.parameters())
    for step, lr in enumerate((1e-2, 5e-3, 0.0)):
        rate.fill_(lr)
        wanted.param_groups[0]["lr"] = lr
        train(model, optimizer, range(step, step + 1))
        train(plain, wanted, range(step, step + 1))
    assert_same(model, plain, off=1e-6)


@PART.use("`torch.amp.GradScaler`")
def scaled(contender: Contender) -> None:
    """A step with scaled gradients is the plain one; one whose gradients are not finite is left out."""
    model = network(contender)
    optimizer, scaler = contender(model.parameters()), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss(model, step)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_same(model, trained(contender), off=1e-5)
    before = copy.deepcopy(values(model))
    optimizer.zero_grad()
    scaler.scale(loss(model, 0) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert_same(values(model), before)


@PART.use("`torch.autocast`")
def autocast(contender: Contender) -> None:
    """Forward in bfloat16, float32 parameters: they move, and stay float32."""
    model = network(contender)
    optimizer = contender(model.parameters())
    for step in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(model, step)
        found.backward()
        optimizer.step()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_moved(model, contender)


@PART.use("`AveragedModel`, equal weights (SWA)")
def averaged(contender: Contender) -> None:
    """The average is the mean of the weights after each step, and batch norms are updated behind it."""
    model = network(contender)
    optimizer, average, seen = contender(model.parameters()), AveragedModel(model), []
    for step in range(4):
        train(model, optimizer, range(step, step + 1))
        average.update_parameters(model)
        seen.append(copy.deepcopy(values(model)))
    update_bn([batch(0)], average)
    wanted = {name: torch.stack([one[name] for one in seen]).mean(0) for name in seen[0]}
    assert_same(values(average.module), wanted, off=1e-6)


@PART.use("`AveragedModel`, exponential (EMA)")
def exponential(contender: Contender) -> None:
    """The average is the one that is kept by hand."""
    model = network(contender)
    optimizer = contender(model.parameters())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    wanted = {}
    for step in range(4):
        train(model, optimizer, range(step, step + 1))
        average.update_parameters(model)
        wanted = {name: (wanted.get(name, p) + p) / 2 for name, p in values(model).items()}
    assert_same(values(average.module), wanted, off=1e-6)


@PART.use("metrics of each step", applies=is_ours)
def metrics(contender: Contender) -> None:
    """Each parameter's norms and cosines are reported, and recording them changes nothing."""
    model = network(contender)
    optimizer, found = contender(model.parameters()), {}
    optimizer.record_metrics = True
    train(model, optimizer)
    for name, p in model.named_parameters():
        optimizer.report_per_parameter_metrics(p, name, found)
    for name in values(model):
        assert found[f"l2_norm/update/{name}"] >= 0
        assert f"cosine/update_grad/{name}" in found
    assert_same(model, trained(contender))


@PART.use("gradient release", applies=is_ours)
def released(contender: Contender) -> None:
    """Parameters are stepped in the backward pass, which leaves no gradients, and the run is the plain one."""
    model = network(contender)
    optimizer = contender(model.parameters())
    with fusedbun.release_gradients(model, optimizer):
        for step in range(3):
            loss(model, step).backward()
            assert all(p.grad is None for p in model.parameters())
            optimizer.step()
    assert_same(model, trained(contender))


@PART.use("a hook that steps after accumulation (`register_post_accumulate_grad_hook`)")
def hooked(contender: Contender) -> None:
    """An optimizer for each parameter, stepped in its hook: the run is the one with an optimizer for each."""
    models = [network(contender) for _ in range(2)]
    optimizers = [{p: contender([p]) for p in model.parameters()} for model in models]

    def step_one(p: torch.Tensor) -> None:
        optimizers[0][p].step()
        optimizers[0][p].zero_grad()

    for p in models[0].parameters():
        p.register_post_accumulate_grad_hook(step_one)
    for step in range(3):
        loss(models[0], step).backward()
        loss(models[1], step).backward()
        for optimizer in optimizers[1].values():
            optimizer.step()
            optimizer.zero_grad()
    assert_same(*models)


@PART.use("a gradient that is not finite")
def not_finite(contender: Contender) -> None:
    """It shows in the parameter that has it, and in no other."""
    params = vectors(contender, (4, 3), (5,))
    optimizer = stepped(contender, params, 1)
    params[0].grad = torch.full((4, 3), float("nan"))
    params[1].grad = torch.ones(5)
    optimizer.step()
    assert bool(params[1].isfinite().all())


@PART.use("a parameter whose gradient comes late, or is missing in a step")
def late(contender: Contender) -> None:
    """It rests without a gradient, and the others are stepped."""
    params = vectors(contender, (4, 3), (5,))
    optimizer = contender(params)
    for step in range(3):
        params[0].grad = torch.full((4, 3), 0.5)
        params[1].grad = torch.ones(5) if step == 1 else None
        before = params[1].detach().clone()
        optimizer.step()
        assert bool((params[1] != before).any()) == (step == 1)
