"""Gradient release: clipping under it, what it leaves alone, and what it refuses."""

import copy
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from makers import assert_same, assert_same_run, recommended, unchanged
from released import INF, NAN, SETTINGS, Network, clip_each, grads, loss_of, pair, released, train, with_rate
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.nn.utils import clip_grad_norm_

import fusedbun
from fusedbun import SM3, Fusedbun, ScaledOptum, release_gradients

# Clipping


@pytest.mark.parametrize("name", ["sm3-momentum", "decoupled-lionw", "fusedbun bfloat16 int8"])
@pytest.mark.parametrize("norm", [0.05, 1e9])
def test_clips_each_gradient_by_its_own_norm(name, norm):
    make, dtype = SETTINGS[name]
    ordinary, ours = pair(make, dtype=dtype)
    with released(*ours, clip_norm=norm):
        train(*ordinary, 5, before_step=lambda: clip_each(ordinary[0], norm))
        train(*ours, 5)
    assert_same_run(ours[1], ordinary[1])


class Given(nn.Module):
    """One parameter, whose gradient is given."""

    def __init__(self, gradient):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros_like(gradient))
        self.gradient = gradient

    def forward(self):
        return (self.weight * self.gradient).sum()


@pytest.mark.parametrize(
    "gradient", [[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [NAN, 1.0], [INF, 1.0], [-INF, 0.0], [INF, NAN]]
)
def test_clipping_treats_every_norm_as_torch_does(gradient):
    gradient = torch.tensor(gradient)
    wanted = nn.Parameter(torch.zeros(2))
    wanted.grad = gradient.clone()
    clip_grad_norm_([wanted], 1.0)
    model = Given(gradient)
    optimizer = fusedbun.ChainOptimizer(model.parameters(), [fusedbun.transforms.Momentum(0.0)], lr=1.0)
    with released(model, optimizer, clip_norm=1.0):
        model().backward()
    assert_same(-model.weight.detach(), wanted.grad)


def test_clipping_leaves_a_gradient_that_shares_its_memory():
    """Autograd may give two parameters one memory for their gradients, and the second is used later."""
    whole, first, second = (nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (1, 2), (2, 2)))
    model = nn.ParameterList([whole, first, second])
    optimizer = fusedbun.ChainOptimizer(model.parameters(), [fusedbun.transforms.Momentum(0.0)], lr=1.0)

    def backward():
        ((whole.view(-1) + torch.cat([first.view(-1), second.view(-1)])) ** 2).sum().backward()

    backward()
    assert whole.grad.data_ptr() == first.grad.data_ptr()
    model.zero_grad()
    with released(model, optimizer, clip_norm=1.0):
        backward()
    wanted = [torch.full(p.shape, 1 - 1 / math.sqrt(p.numel())) for p in model]
    torch.testing.assert_close([p.detach() for p in model], wanted)


def test_clips_the_rows_of_a_sparse_gradient():
    """A row that occurs twice counts with its sum."""
    embedding = nn.Embedding(5, 2, sparse=True)
    nn.init.zeros_(embedding.weight)
    optimizer = fusedbun.ChainOptimizer(embedding.parameters(), [fusedbun.transforms.Momentum(0.0)], lr=1.0)
    with released(embedding, optimizer, clip_norm=1.0):
        embedding(torch.tensor([1, 1, 3])).sum().backward()
    wanted = torch.zeros(5, 2)
    wanted[1], wanted[3] = 2 / math.sqrt(10), 1 / math.sqrt(10)
    torch.testing.assert_close(-embedding.weight.detach(), wanted)


def test_clipping_by_the_global_norm_is_refused():
    _, (model, optimizer) = pair(with_rate(SM3))
    other = nn.Linear(2, 1)
    other(torch.ones(1, 2)).sum().backward()
    handle = released(model, optimizer, accumulate=2)
    message = r"cannot be clipped by their global norm.*clip_norm=.*remove\(\)"
    for _ in range(2):
        loss_of(model, 0).backward()
        before = copy.deepcopy(grads(model))
        for clip in (clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
            for params in (model.parameters(), model.hidden.weight, [*other.parameters(), model.scale]):
                with unchanged(optimizer), pytest.raises(RuntimeError, match=message):
                    clip(params, 1.0)
        assert_same(grads(model), before)
    assert clip_grad_norm_(other.parameters(), 1.0) > 1
    torch.testing.assert_close(clip_grad_norm_(other.parameters(), 1.0), torch.tensor(1.0))
    optimizer.step()
    handle.remove()
    loss_of(model, 1).backward()
    clip_grad_norm_(model.parameters(), 1e-3)
    assert clip_grad_norm_(model.parameters(), 1.0) <= 1.001e-3


# What is not under release


def test_parameters_of_only_one_of_them():
    """The model's own keep their gradients; the optimizer's own are stepped in its step, and so are those frozen."""
    ordinary, ours = pair(lambda params: SM3([p for p in params if p.ndim < 2]))
    elsewhere = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    for (model, optimizer), param in zip((ordinary, ours), elsewhere, strict=True):
        model.norm.bias.requires_grad_(False)
        optimizer.add_param_group({"params": param, "lr": 0.3})
    handle = released(*ours)
    late = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    for (model, optimizer), param, new in zip((ordinary, ours), elsewhere, late, strict=True):
        optimizer.add_param_group({"params": new})
        for step in range(3):
            model.norm.bias.requires_grad_(step > 0)
            (loss_of(model, step) * (param * param).sum() * new.sum()).backward()
            if optimizer is ours[1]:
                kept = {"embedding.weight", "hidden.weight"} | ({"norm.bias"} if step else set())
                assert grads(model).keys() == kept
                assert param.grad is not None
            optimizer.step()
            optimizer.zero_grad()
    assert_same_run(ours[1], ordinary[1])
    assert_same(ours[0].embedding.weight.grad, ordinary[0].embedding.weight.grad)
    handle.remove()


def test_param_groups_that_change():
    """A parameter is found where it has gone to; one that was taken away is an error that names it."""
    model = Network()
    optimizer = SM3([{"params": [p]} for p in model.parameters()])
    with released(model, optimizer):
        train(model, optimizer, 1)
        optimizer.param_groups.reverse()
        train(model, optimizer, 1)
        optimizer.param_groups[:] = [g for g in optimizer.param_groups if g["params"][0] is not model.scale]
        with pytest.raises(RuntimeError, match=r"'scale' is no longer among the optimizer's parameters; end .*remove"):
            loss_of(model, 1).backward()


def test_copies_are_not_under_release():
    _, (model, optimizer) = pair(with_rate(SM3))
    with released(model, optimizer):
        train(model, optimizer, 1)
        for twin, its in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
            assert its.gradient_release is None
            with unchanged(its):
                loss_of(twin, 1).backward()
            assert grads(twin)
        loss_of(model, 1).backward()
        assert not grads(model)


# What is refused


def test_an_error_in_the_backward_pass():
    """It says which parameter; those before it have been stepped, it and the others are as they were."""
    model = Network(sparse=True)
    optimizer = Fusedbun(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    with released(model, optimizer):
        with pytest.raises(TypeError, match=r"is sparse.*sparse=False") as caught:
            loss_of(model, 0).backward()
        (note,) = caught.value.__notes__
        assert "the gradient of 'embedding.weight' was complete" in note
        assert grads(model).keys() == {"embedding.weight"}
        assert model.embedding.weight not in optimizer.state
        assert_same(model.embedding.weight.detach(), before["embedding.weight"])
        assert (model.head.weight != before["head.weight"]).any()
        with unchanged(optimizer), pytest.raises(TypeError, match="is sparse"):
            optimizer.step()
        optimizer.zero_grad()
        optimizer.step()
        model.embedding.sparse = False
        train(model, optimizer, 1)
    assert (model.embedding.weight != before["embedding.weight"]).any()


def test_a_bad_hyper_parameter_in_the_backward_pass():
    _, (model, optimizer) = pair(with_rate(SM3))
    with released(model, optimizer):
        optimizer.param_groups[0]["lr"] = -1.0
        with unchanged(optimizer, groups=False), pytest.raises(ValueError, match=r"lr must lie in \[0, inf\)"):
            loss_of(model, 0).backward()
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.step()
        assert not grads(model)


def test_a_second_release():
    _, (model, optimizer) = pair(with_rate(SM3))
    other = SM3([model.scale, model.norm.bias], lr=0.1)
    handle = released(model, optimizer)
    with pytest.raises(RuntimeError, match=r"this SM3 is under gradient release already; call remove\(\)"):
        released(model, optimizer)
    with pytest.raises(RuntimeError, match=r"'scale' is under gradient release by another optimizer already; call rem"):
        released(model, other)
    assert other.gradient_release is None
    for step in range(2):
        loss_of(model, step).backward()  # each is stepped once
        optimizer.step()
    handle.remove()
    handle.remove()
    with released(model, optimizer):
        handle.remove()  # of another one, which goes on
        loss_of(model, 2).backward()
        assert not grads(model)
    loss_of(model, 3).backward()
    assert grads(model)


BAD = {
    "accumulate of 0": ({"accumulate": 0}, ValueError, "accumulate must be an integer from 1 up, but it is 0"),
    "accumulate of 1.5": ({"accumulate": 1.5}, TypeError, "accumulate must be an integer from 1 up, but it is 1.5"),
    "accumulate of True": ({"accumulate": True}, TypeError, "accumulate must be an integer from 1 up, but it is True"),
    "a norm of 0": ({"clip_norm": 0.0}, ValueError, r"clip_norm must lie in \(0, inf\) or None, but it is 0.0"),
    "a norm of NaN": ({"clip_norm": NAN}, ValueError, r"clip_norm must lie in \(0, inf\) or None, but it is nan"),
    "a norm in words": ({"clip_norm": "1"}, TypeError, r"clip_norm must be a number in \(0, inf\) or None.*'1'"),
    "a list": ({"model": []}, TypeError, r"model must be a torch.nn.Module, but it is \[\] \(list\)"),
    "torch's optimizer": (
        {"optimizer": torch.optim.SGD([torch.zeros(1, requires_grad=True)])},
        TypeError,
        "optimizer must be one of fusedbun's, such as fusedbun.SM3, but it is a SGD",
    ),
    "compiled": (
        {"optimizer": SM3(Network().parameters(), implementation="compiled")},
        ValueError,
        "the SM3 has implementation='compiled', .* all parameters together; leave implementation out",
    ),
    "another model": ({"model": nn.Linear(2, 1)}, ValueError, "steps none of the model's 2 parameters that need"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_attach_nothing(case):
    changed, error, message = BAD[case]
    _, (model, optimizer) = pair(with_rate(SM3))
    with pytest.raises(error, match=f"release_gradients: .*{message}"):
        release_gradients(**{"model": model, "optimizer": optimizer, **changed})
    assert optimizer.gradient_release is None
    loss_of(model, 0).backward()
    assert grads(model)


def test_a_frozen_model():
    model = Network().requires_grad_(False)
    with pytest.raises(ValueError, match="none of the model's 6 parameters that need a gradient"):
        released(model, SM3(model.parameters()))


def test_grad_scaler_is_refused():
    _, (model, optimizer) = pair(with_rate(ScaledOptum))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    message = r"GradScaler cannot be used with it.*bfloat16.*remove\(\)"
    with released(model, optimizer, accumulate=2):
        for unscales in (False, True):
            scaler.scale(loss_of(model, 0)).backward()
            if unscales:
                scaler.unscale_(optimizer)
            with unchanged(optimizer), pytest.raises(RuntimeError, match=message):
                scaler.step(optimizer)
            scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        optimizer.step()  # it left nothing behind
        disabled = torch.amp.GradScaler("cpu", enabled=False)
        disabled.scale(loss_of(model, 0)).backward()
        disabled.step(optimizer)
    assert not grads(model)
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(optimizer)
    scaler.update()


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_models_that_are_spread_over_processes(process_group):
    advice = "reduced over processes.*release the plain module.*register_hook"
    model = nn.parallel.DistributedDataParallel(Network())
    for wrapped, name in ((model, "the model"), (nn.Sequential(model), "'0'")):
        with pytest.raises(TypeError, match=f"{name} is a DistributedDataParallel, .*{advice}"):
            released(wrapped, SM3(model.parameters()))
    layer = nn.Linear(2, 1)
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), init_device_mesh("cpu", (1,))))
    with pytest.raises(TypeError, match=f"'weight' is a DTensor, .*{advice}"):
        released(layer, SM3(layer.parameters()))


def test_gradients_that_hooks_change_before(process_group):
    """As one averages them over processes without a wrapper."""
    ordinary, ours = pair(with_rate(recommended))

    def average(gradient):
        whole = gradient.clone()
        dist.all_reduce(whole)
        return whole / 4

    with released(*ours):
        for model, optimizer in (ordinary, ours):
            for param in model.parameters():
                param.register_hook(average)
            train(model, optimizer, 3)
    assert_same_run(ours[1], ordinary[1])
