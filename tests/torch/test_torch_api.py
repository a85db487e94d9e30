"""The optimizers keep to the interface of `torch.optim.Optimizer`: construction, closures, hooks, maximize."""

import inspect

import pytest
import torch
from makers import (
    SHAPES,
    assert_same,
    assert_same_run,
    copies,
    every_optimizer,
    gradient,
    parameters,
    run,
    states,
    sweep_of_optimizers,
)
from torch.optim.optimizer import register_optimizer_step_post_hook

import fusedbun
from fusedbun import SM3, Fusedbun, FusionOptimizer, recipes

FUSEDBUN_DEFAULTS = {
    "lr": 0.1,
    "eps": 1e-8,
    "beta_decay": 0.8,
    "Lambda": 0.01,
    "momentum_beta": 0.9,
    "centralize": False,
    "use_rms": False,
    "nesterov": False,
    "clip_rms": None,
    "lagged": False,
    "channel_axis": 0,
    "momentum_dtype": None,
    "maximize": False,
    "stochastic_rounding": False,
    "seed": 0,
    "stacked": 0,
}


@every_optimizer
def test_is_a_torch_optimizer_that_prints_its_groups(make):
    optimizer = make(parameters((2,)), lr=0.125)
    assert isinstance(optimizer, torch.optim.Optimizer)
    text = repr(optimizer)
    assert text.startswith(f"{type(optimizer).__name__} (")
    assert all(f"    {name}: {value}\n" in text for name, value in optimizer.defaults.items())


def test_fusion_optimizer_is_fusedbun():
    assert FusionOptimizer is Fusedbun
    assert fusedbun.torch.Fusedbun is Fusedbun


def test_defaults_and_groups_hold_the_recipes_names():
    params = parameters((2,))
    optimizer = Fusedbun(params, lr=0.1)
    assert optimizer.defaults == FUSEDBUN_DEFAULTS
    (group,) = optimizer.param_groups
    assert group == {"params": params, **FUSEDBUN_DEFAULTS}
    assert list(group)[2:-4] == list(inspect.signature(recipes.fusedbun).parameters)


def test_positional_arguments_come_in_the_order_of_the_first_fusedbun():
    params = parameters((2,))
    group = Fusedbun(params, 0.1, 0.2, 0.3, 0.4, 0.5, True, True).param_groups[0]
    names = ["params", "lr", "eps", "beta_decay", "Lambda", "momentum_beta", "centralize", "use_rms"]
    assert [group[name] for name in names] == [params, 0.1, 0.2, 0.3, 0.4, 0.5, True, True]
    assert list(inspect.signature(Fusedbun).parameters)[: len(names)] == names
    with pytest.raises(TypeError, match="too many positional arguments"):
        Fusedbun(params, 0.1, 0.2, 0.3, 0.4, 0.5, True, True, True)


def test_lr_is_required():
    with pytest.raises(TypeError, match=r"Fusedbun.*'lr'"):
        Fusedbun(parameters((2,)))


@pytest.mark.parametrize("outer", [torch.enable_grad, torch.no_grad])
@every_optimizer
def test_closure_is_called_once_with_gradients_enabled(make, outer):
    (param,) = parameters((4, 3))
    optimizer, calls = make([param], lr=0.1), []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    before = param.detach().clone()
    with outer():
        enabled = torch.is_grad_enabled()
        loss = optimizer.step(closure)
        assert torch.is_grad_enabled() == enabled
    assert calls == [True]
    assert_same(loss.detach(), (before**2).sum())
    (other,) = params = copies([before])
    other.grad = 2 * before
    without = make(params, lr=0.1)
    assert without.step() is None
    assert_same_run(optimizer, without)


@every_optimizer
def test_a_closure_that_fails_changes_nothing(make):
    (param,) = parameters((4, 3))
    optimizer, before = make([param], lr=0.1), param.detach().clone()
    param.grad = gradient(param, 0)

    def closure():
        raise FloatingPointError("no loss")

    with pytest.raises(FloatingPointError, match="no loss"):
        optimizer.step(closure)
    assert_same(param.detach(), before)
    assert not optimizer.state


@sweep_of_optimizers
def test_maximize_climbs_as_negated_gradients_descend(make):
    params = parameters(*SHAPES)
    climbing, descending = make(params, lr=0.1, maximize=True), make(copies(params), lr=0.1)
    for step in range(3):
        for i, (p, q) in enumerate(zip(*(o.param_groups[0]["params"] for o in (climbing, descending)), strict=True)):
            p.grad = gradient(p, step, i)
            q.grad = -p.grad
        climbing.step()
        descending.step()
    assert_same_run(climbing, descending)


@every_optimizer
def test_maximize_can_be_a_groups_own_and_change(make):
    p, q = parameters((3,), (3,))
    optimizer = make([{"params": p, "maximize": True}, {"params": q}], lr=1.0)
    for maximize in (True, False):
        optimizer.param_groups[0]["maximize"] = maximize
        before, optimizer.state = [x.detach().clone() for x in (p, q)], type(optimizer.state)(dict)
        p.grad, q.grad = torch.full((3,), 1e3), torch.full((3,), 1e3)
        optimizer.step()
        assert ((p.detach() > before[0]) == maximize).all()
        assert (q.detach() < before[1]).all()


@every_optimizer
def test_gradients_are_only_read(make):
    """Also where they carry a graph of their own, as after `backward(create_graph=True)`."""
    params = parameters(*SHAPES)
    optimizer = make(params, lr=0.1)
    for i, p in enumerate(params):
        p.grad = gradient(p, 0, i).requires_grad_() * 1.0
    before = [p.grad.detach().clone() for p in params]
    optimizer.step()
    assert_same([p.grad.detach() for p in params], before)
    assert all(p.is_leaf and p.requires_grad for p in params)
    assert not any(value.requires_grad for state in states(optimizer) for value in state.values())


@pytest.mark.parametrize("set_to_none", [True, False])
@every_optimizer
def test_zero_grad(make, set_to_none):
    params = parameters(*SHAPES)
    optimizer = make(params, lr=0.1)
    run(optimizer, 1)
    optimizer.zero_grad(set_to_none)
    before = [p.detach().clone() for p in params]
    if set_to_none:
        assert all(p.grad is None for p in params)
        optimizer.step()
        assert_same([p.detach() for p in params], before)
    else:
        assert not any(p.grad.any() for p in params)
        optimizer.step()  # a momentum or a decay moves on
        rests = isinstance(optimizer, SM3) and not optimizer.defaults["momentum"]
        assert all((p != b).any() != rests for p, b in zip(params, before, strict=True))


@every_optimizer
def test_step_hooks_run_around_the_step(make):
    (param,) = parameters((4, 3))
    optimizer, seen = make([param], lr=0.1), []

    def note(moment):
        return lambda o, args, kwargs: seen.append((moment, o is optimizer, param.detach().clone()))

    param.grad, before = gradient(param, 0), param.detach().clone()
    handles = [
        optimizer.register_step_pre_hook(note("before")),
        optimizer.register_step_post_hook(note("after")),
        register_optimizer_step_post_hook(note("everywhere")),
    ]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    assert [(moment, ours) for moment, ours, _ in seen] == [("before", True), ("after", True), ("everywhere", True)]
    assert_same(seen[0][2], before)
    assert (seen[1][2] != before).all()
    assert_same(seen[2][2], seen[1][2])


@every_optimizer
def test_state_dict_hooks_run(make):
    params, seen = parameters((4, 3)), []
    optimizer = make(params, lr=0.1)
    optimizer.register_state_dict_pre_hook(lambda o: seen.append(len(o.state)))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "epoch": 7})
    run(optimizer, 1)
    saved = optimizer.state_dict()
    assert seen == [1]
    assert saved["epoch"] == 7
    make(copies(params), lr=0.1).load_state_dict(saved)  # what a hook adds does not disturb


@every_optimizer
def test_a_subclass_is_an_optimizer_too(make):
    class Counting(make.func if hasattr(make, "func") else make):
        steps = 0

        def step(self, closure=None):
            self.steps += 1
            return super().step(closure)

    extra = dict(getattr(make, "keywords", {}))
    params = parameters(*SHAPES)
    optimizer, wanted = Counting(params, lr=0.1, **extra), make(copies(params), lr=0.1)
    run(optimizer, 2)
    run(wanted, 2)
    assert optimizer.steps == 2
    assert_same_run(optimizer, wanted)
