"""Gradient release: the ordinary step's numbers, with one gradient alive at a time; and what it refuses."""

import copy
import gc
import math
import pickle
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
from makers import MAKERS, assert_same, assert_same_run, every_optimizer, recommended, unchanged
from test_torch_checkpoint import through_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

import fusedbun
from fusedbun import SM3, DecoupledLionW, Fusedbun, MupAdamW, ScaledOptum, TernaryVote, release_gradients
from fusedbun.compiler import native
from fusedbun.optim import dispatch

WORDS, WIDTH = 13, 8
NAN, INF = float("nan"), float("inf")


class Network(nn.Module):
    """A network whose first and last layers are one parameter, with parameters of 0, 1 and 2 axes."""

    def __init__(self, dtype=torch.float32, sparse=False, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(WORDS, WIDTH, sparse=sparse)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if not sparse:
            self.head.weight = self.embedding.weight
        self.to(dtype)

    def forward(self, words):
        x = self.embedding(words)
        return self.head(self.norm(torch.tanh(self.hidden(x)) * self.scale))


def loss_of(model, step, part=0):
    words = torch.randint(WORDS, (6, 2), generator=torch.Generator().manual_seed(100 * step + part))
    return nn.functional.cross_entropy(model(words[:, 0]).float(), words[:, 1])


def train(model, optimizer, steps, parts=1, scheduler=None, before_step=lambda: None):
    """Steps as one writes them; returns nothing that depends on a release."""
    for step in range(steps) if isinstance(steps, int) else steps:
        for part in range(parts):
            loss_of(model, step, part).backward()
        before_step()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


def pair(make, named=False, **options):
    """Two networks of the same values, each with its optimizer."""
    models = [Network(**options) for _ in range(2)]
    if make is TernaryVote:
        for model in models:
            for param in model.parameters():
                param.data.sign_()
    return [(model, make(model.named_parameters() if named else model.parameters())) for model in models]


def released(model, optimizer, **options):
    return release_gradients(model, optimizer, **options)


def grads(model):
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


# The same numbers


def with_rate(make, **options):
    return partial(make, lr=0.05, **options)


SETTINGS = {
    **{name: (with_rate(make), torch.float32) for name, make in MAKERS.items()},
    "fusedbun int8": (with_rate(recommended, momentum_dtype="int8"), torch.float32),
    "fusedbun bfloat16 int8": (
        with_rate(recommended, momentum_dtype="int8", stochastic_rounding=True),
        torch.bfloat16,
    ),
    "fusedbun bfloat16 int4": (
        with_rate(recommended, momentum_dtype="int4", stochastic_rounding=True, seed=3),
        torch.bfloat16,
    ),
    "fusedbun bfloat16 bfloat16": (with_rate(recommended, momentum_dtype="bfloat16"), torch.bfloat16),
    "sm3 bfloat16": (with_rate(SM3, stochastic_rounding=True), torch.bfloat16),
    "lion bfloat16 int8": (
        with_rate(DecoupledLionW, momentum_dtype="int8", stochastic_rounding=True),
        torch.bfloat16,
    ),
    "mup-adamw bfloat16": (
        with_rate(MupAdamW, mup=lambda path, param: "norm", momentum_dtype="int4", second_moment_dtype="bfloat16"),
        torch.bfloat16,
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
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


@pytest.mark.parametrize("implementation", ["kernel", "blocks", "definition"])
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
    ordinary, ours = pair(with_rate(SM3, implementation="blocks"))
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


@pytest.mark.parametrize("implementation", [None, "blocks", "definition"])
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


# Clipping


def clip_each(model, norm):
    for param in model.parameters():
        torch.nn.utils.clip_grad_norm_([param], norm)


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
