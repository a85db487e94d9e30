"""Gradient release: the ordinary step's numbers, with one gradient alive at a time."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from makers import assert_same, assert_same_run, every_optimizer, recommended, unchanged
from released import SETTINGS, WIDTH, Network, clip_each, grads, loss_of, pair, released, train, with_rate
from sweeps import sweep
from test_torch_checkpoint import through_file
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

from fusedbun import SM3, Fusedbun, TernaryVote
from fusedbun.compiler.cpp import native
from fusedbun.torch import dispatch

# The same numbers


@sweep("name", SETTINGS, short=lambda name: name not in ("fusedbun bfloat16 bfloat16", "mup-adamw bfloat16"))
def test_twenty_steps_are_the_ordinary_ones(name):
    """Under a schedule; the parameters' names decide the noise of rounding."""
    make, dtype = SETTINGS[name]
    ordinary, ours = pair(make, named=True, dtype=dtype)
    with released(*ours):
        for model, optimizer in (ordinary, ours):
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            train(model, optimizer, 20, scheduler=scheduler)
    assert_same_run(ours[1], ordinary[1])
    assert any((p != q).any() for p, q in zip(ours[0].parameters(), Network(dtype).parameters(), strict=True))


def test_twenty_steps_of_ternary_vote():
    ordinary, ours = pair(TernaryVote)
    for optimizer in (ordinary[1], ours[1]):
        optimizer.param_groups[0]["threshold"] = 2
    with released(*ours):
        train(*ordinary, 20)
        train(*ours, 20)
    assert_same_run(ours[1], ordinary[1])


@pytest.mark.parametrize("implementation", ["kernel", "tiles", "definition"])
def test_every_implementation_of_single_parameters(implementation):
    ordinary, ours = pair(with_rate(SM3, momentum=0.9, implementation=implementation))
    with released(*ours):
        train(*ordinary, 3)
        train(*ours, 3)
    assert_same_run(ours[1], ordinary[1])


@every_optimizer
def test_begins_and_ends_in_the_middle_of_a_run(make):
    ordinary, ours = pair(partial(make, lr=0.05))
    train(*ordinary, 6)
    train(*ours, 2)
    handle = released(*ours)
    train(*ours, range(2, 4))
    handle.remove()
    loss_of(ours[0], 4).backward()
    assert grads(ours[0]).keys() == dict(ours[0].named_parameters()).keys()
    ours[0].zero_grad()
    train(*ours, range(4, 6))
    assert_same_run(ours[1], ordinary[1])


@pytest.mark.parametrize("name", ["sm3-momentum", "fusedbun bfloat16 int8", "lion bfloat16 int8"])
def test_a_resumed_run_continues_as_if_it_had_not_stopped(name):
    """In a new process's optimizer, and in the same one, which lets go of the state that it had."""
    make, dtype = SETTINGS[name]
    ordinary, ours = pair(make, dtype=dtype)
    train(*ordinary, 8)
    with released(*ours):
        train(*ours, 3)
    model = Network(dtype, seed=1)
    optimizer = make(model.parameters())
    with released(model, optimizer):
        train(model, optimizer, 1)
        old = [weakref.ref(x) for state in optimizer.state.values() for x in state.values()]
        model.load_state_dict(ours[0].state_dict())
        optimizer.load_state_dict(through_file(ours[1].state_dict()))
        assert all(x() is None for x in old)
        train(model, optimizer, range(3, 8))
    assert_same_run(optimizer, ordinary[1])


def test_hyper_parameters_are_read_when_a_parameter_is_stepped():
    ordinary, ours = pair(with_rate(Fusedbun))
    with released(*ours):
        for step, change in enumerate([{}, {"lr": 0.2}, {"use_rms": True}, {"momentum_beta": 0.0}, {"Lambda": 0.5}]):
            for model, optimizer in (ordinary, ours):
                optimizer.param_groups[0].update(change)
                train(model, optimizer, range(step, step + 1))
            assert_same_run(ours[1], ordinary[1])


def test_metrics_are_those_of_the_ordinary_step():
    reports = []
    ordinary, ours = pair(with_rate(recommended))
    with released(*ours):
        for model, optimizer in (ordinary, ours):
            optimizer.record_metrics = True
            train(model, optimizer, 2)
            loss_of(model, 2).backward()  # a step that has not ended reports nothing yet
            found = {}
            for name, param in model.named_parameters():
                optimizer.report_per_parameter_metrics(param, name, found)
            reports.append(found)
    assert reports[0].keys() == reports[1].keys()
    assert len(reports[0]) == 6 * len(list(ours[0].parameters()))
    assert_same(reports[1], reports[0])


def test_sparse_gradients():
    ordinary, ours = pair(with_rate(SM3), sparse=True)
    with released(*ours):
        train(*ordinary, 5)
        train(*ours, 5)
    assert_same_run(ours[1], ordinary[1])


def test_kernels_are_described_once(monkeypatch):
    _, (model, optimizer) = pair(with_rate(recommended))
    described = []
    describe = native.describe
    monkeypatch.setattr(native, "describe", lambda *args: described.append(args) or describe(*args))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    with released(model, optimizer):
        train(model, optimizer, 1)
        first = len(described)
        train(model, optimizer, 5, scheduler=scheduler)
    assert first == len(list(model.parameters()))
    assert len(described) == first


def test_compiling_is_for_all_parameters_together(monkeypatch):
    """Where it is the best there is, as on CUDA, the next best is taken."""
    monkeypatch.setitem(dispatch.BEST, "cpu", dispatch.BEST["cuda"])
    ordinary, ours = pair(with_rate(SM3, implementation="tiles"))
    ours = ours[0], SM3(ours[0].parameters(), lr=0.05)
    with released(*ours):
        train(*ordinary, 3)
        train(*ours, 3)
    assert_same_run(ours[1], ordinary[1])


# Memory


def alive(model):
    return sum(grad.numel() * grad.element_size() for grad in grads(model).values())


def watched(model):
    """The bytes of gradients that are there whenever one is complete, and weak references to all of them."""
    sizes, seen = [], []

    def look(param):
        sizes.append(alive(model))
        seen.append(weakref.ref(param.grad))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(look)
    return sizes, seen


@pytest.mark.parametrize("implementation", [None, "tiles", "definition"])
def test_one_gradient_at_a_time(implementation):
    _, (model, optimizer) = pair(with_rate(SM3, implementation=implementation))
    sizes, seen = watched(model)
    with released(model, optimizer):
        for step in range(3):
            loss_of(model, step).backward()
            assert not grads(model)
            optimizer.step()
    params = list(model.parameters())
    assert len(sizes) == 3 * len(params)  # a tied weight is complete once
    assert max(sizes) == max(param.numel() * param.element_size() for param in params)
    assert all(gradient() is None for gradient in seen)  # nothing else holds them either
    sizes.clear()
    loss_of(model, 3).backward()
    assert max(sizes) == sum(param.numel() * param.element_size() for param in params)


def test_nothing_keeps_the_model_or_the_optimizer_alive():
    model, other = Network(), Network()
    optimizer = SM3(model.parameters())
    handle = released(model, optimizer)
    train(model, optimizer, 1)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    before = copy.deepcopy(model.state_dict())
    loss_of(model, 1).backward()
    assert_same(model.state_dict(), before)
    assert grads(model)
    clip_grad_norm_(model.parameters(), 1.0)
    with released(model, SM3(model.parameters())):  # they are free
        pass
    handle.remove()
    optimizer = SM3(other.parameters())
    released(other, optimizer)
    train(other, optimizer, 1)
    gone = weakref.ref(other.hidden.weight)
    del other, optimizer
    gc.collect()
    assert gone() is None


# Several backward passes


@pytest.mark.parametrize("name", ["sm3-momentum", "fusedbun bfloat16 int8"])
def test_accumulation_over_several_passes(name):
    """All gradients are kept until the last pass, which frees them one by one."""
    make, dtype = SETTINGS[name]
    ordinary, ours = pair(make, dtype=dtype)
    model, optimizer = ours
    sizes, _ = watched(model)
    with released(model, optimizer, accumulate=3):
        train(*ordinary, 4, parts=3)
        train(model, optimizer, 4, parts=3)
        assert_same_run(optimizer, ordinary[1])
        loss_of(model, 4, 0).backward()
        loss_of(model, 4, 1).backward()
        assert alive(model) == sum(param.numel() * param.element_size() for param in model.parameters())
        sizes.clear()
        loss_of(model, 4, 2).backward()
        assert sorted(sizes, reverse=True) == sizes
        assert not grads(model)


def test_a_step_of_fewer_passes_uses_what_there_is():
    ordinary, ours = pair(with_rate(SM3, momentum=0.9))
    with released(*ours, accumulate=4, clip_norm=0.01):
        for (model, optimizer), before_step in ((ordinary, partial(clip_each, ordinary[0], 0.01)), (ours, None)):
            for step, parts in enumerate([4, 2, 4]):
                train(model, optimizer, [step], parts=parts, before_step=before_step or (lambda: None))
    assert_same_run(ours[1], ordinary[1])


def test_a_parameter_that_not_every_pass_reaches():
    torch.manual_seed(0)
    experts = [nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])]
    experts.append(copy.deepcopy(experts[0]))
    optimizers = [SM3(model.parameters()) for model in experts]
    with released(experts[1], optimizers[1], accumulate=2):
        for model, optimizer in zip(experts, optimizers, strict=True):
            for pick in ((0, 0), (0, 1), (1, 1)):
                for expert in pick:
                    model[expert](torch.ones(2, 3)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
    assert_same_run(*optimizers)


def test_a_second_gradient_before_the_step_is_refused_and_changes_nothing():
    ordinary, (model, optimizer) = pair(with_rate(SM3))
    train(*ordinary, 2)
    with released(model, optimizer):
        loss_of(model, 0).backward()
        message = r"gets another gradient after .* backward pass 1 of a step.*call optimizer.step\(\)"
        for _ in range(2):
            with unchanged(optimizer), pytest.raises(RuntimeError, match=message):
                loss_of(model, 1).backward()
            assert not grads(model)
        optimizer.zero_grad()
        optimizer.step()
        optimizer.step()  # a step of nothing is one too
        train(model, optimizer, [1])
    assert_same_run(optimizer, ordinary[1])


def checkpointed(model, reentrant):
    x = torch.ones(4, WIDTH, requires_grad=True)
    for _ in range(2):
        x = checkpoint(model.hidden, x, use_reentrant=reentrant)
    return x.square().sum()


def test_activation_checkpointing():
    ordinary, ours = pair(with_rate(SM3))
    with released(*ours):
        for model, optimizer in (ordinary, ours):
            for _ in range(3):
                checkpointed(model, False).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert_same_run(ours[1], ordinary[1])
        with pytest.raises(RuntimeError, match=r"'hidden.*use_reentrant=True gives several gradients in one pass"):
            checkpointed(ours[0], True).backward()


def test_a_compiled_model():
    ordinary, ours = pair(with_rate(SM3))
    with released(torch.compile(ours[0], backend="aot_eager"), ours[1]):
        compiled = torch.compile(ours[0], backend="aot_eager")
        train(torch.compile(ordinary[0], backend="aot_eager"), ordinary[1], 3)
        train(compiled, ours[1], 3)
    assert_same_run(ours[1], ordinary[1])


def test_a_closure():
    ordinary, ours = pair(with_rate(SM3))

    def closure(model, optimizer, step):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        return loss

    with released(*ours):
        for step in range(3):
            losses = [optimizer.step(partial(closure, model, optimizer, step)) for model, optimizer in (ordinary, ours)]
            assert_same(*losses)
    assert_same_run(ours[1], ordinary[1])
