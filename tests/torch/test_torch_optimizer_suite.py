"""What torch's own suite (`test/test_optim.py`) asks of an optimizer, asked of every class with each of its inputs.

`tests/peers.py` says of each of torch's tests where it is; those of states are in test_torch_optimizer_states.py.
Steps are the definition's, where it is not implementations that a test is about: others equal it
(tests/test_equivalence.py).
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from makers import assert_same, assert_same_run, gradient, parameters, run, states, sweep_of_optimizers
from sweeps import sweep
from test_torch_optimizer_info import INFOS, INPUTS, each_class, each_input
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from fusedbun import ChainOptimizer, TernaryVote

SCHEDULES = {
    "constant": [],
    "StepLR": [lambda o: StepLR(o, gamma=0.9, step_size=10)],
    "ReduceLROnPlateau": [ReduceLROnPlateau],
}
# TernaryVote's learning rate is 1, and its weights can be -1, 0 and +1 only: it follows no schedule and may overshoot.
WITH_RATE = [info for info in INFOS if info.cls is not TernaryVote]
INPUTS_WITH_RATE = [(info, options) for info, options, _ in INPUTS if info in WITH_RATE]


def ids(inputs):
    return [f"{info.cls.__name__}-{'-'.join(options) or 'defaults'}" for info, options, *_ in inputs]


each_input_with_rate = pytest.mark.parametrize(("info", "options"), INPUTS_WITH_RATE, ids=ids(INPUTS_WITH_RATE))
each_class_with_rate = pytest.mark.parametrize("info", WITH_RATE, ids=lambda info: info.cls.__name__)


def by_definition(info, params, **options):
    return info(params, **{"implementation": "definition", **options})


class Line:
    """A weight and a bias, and the squares of what they make of one input."""

    def __init__(self, contiguous=True):
        generator = torch.Generator().manual_seed(0)
        weight, bias, self.input = (torch.randn(s, generator=generator) for s in ((10, 5, 2), (10, 2), (5,)))
        pick = (lambda x: x[..., 0].clone()) if contiguous else (lambda x: x[..., 0])
        self.params = [nn.Parameter(pick(weight)), nn.Parameter(pick(bias))]
        assert all(p.is_contiguous() == contiguous for p in self.params)

    def loss(self):
        weight, bias = self.params
        return (weight.mv(self.input) + bias).pow(2).sum()

    def closure(self, optimizer):
        def evaluate():
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        return evaluate

    def train(self, optimizer, schedule=(), steps=20):
        """The loss before and after."""
        schedulers, before = [make(optimizer) for make in schedule], self.loss().item()
        for _ in range(steps):
            loss = optimizer.step(self.closure(optimizer)).detach()
            for scheduler in schedulers:
                scheduler.step(*([loss] if isinstance(scheduler, ReduceLROnPlateau) else []))
        return before, self.loss().item()


# The loss goes the right way


@sweep(
    ("info", "options", "contiguous", "schedule"),
    (WAYS := [(*one, *how) for one, how in product(INPUTS_WITH_RATE, product((True, False), SCHEDULES))]),
    short=lambda info, options, contiguous, schedule: (
        options == info.inputs[0][0] or (contiguous, schedule) == (True, "constant")
    ),
    ids=[f"{name}-{one[-1]}{'' if one[-2] else '-strided'}" for name, one in zip(ids(WAYS), WAYS, strict=True)],
)
def test_the_loss_goes_the_right_way(info, options, contiguous, schedule):
    """Upwards without a decay, which would pull the parameters down."""
    for maximize in (False, True):
        line, undecayed = Line(contiguous), {"weight_decay": 0.0} if maximize and "weight_decay" in options else {}
        optimizer = by_definition(info, line.params, **{**options, **undecayed, "lr": 1e-3, "maximize": maximize})
        before, after = line.train(optimizer, SCHEDULES[schedule])
        assert (after > before) if maximize else (after < before)


@pytest.mark.parametrize("schedule", list(SCHEDULES.values())[1:], ids=list(SCHEDULES)[1:])
@each_class_with_rate
def test_so_it_does_with_a_learning_rate_for_each_group(info, schedule):
    line = Line()
    weight, bias = line.params
    groups = [{"params": [weight]}, {"params": [bias], "lr": 0.01}]
    before, after = line.train(by_definition(info, groups, lr=1e-3), schedule)
    assert after < before


@each_input_with_rate
def test_weight_decay_can_be_left_out_of_a_group(info, options):
    """Also by optimizers that have none, and by the name that is not their own."""
    line = Line()
    weight, bias = line.params
    undecayed = {name: value for name, value in options.items() if name != "Lambda"}
    groups = [{"params": [weight], **options}, {"params": [bias], **undecayed, "weight_decay": 0.0}]
    before, after = line.train(by_definition(info, groups))
    assert after < before


@each_input_with_rate
def test_a_learning_rate_of_almost_nothing_moves_nothing(info, options):
    line, other = Line(), nn.Parameter(torch.ones(2))
    groups = [{"params": line.params, "lr": 1e-3, **options}, {"params": [other]}]
    optimizer = by_definition(info, groups, lr=1e-28)
    for _ in range(20):
        line.closure(optimizer)()
        other.grad = torch.rand(2)
        optimizer.step()
    assert_same(other.detach(), torch.ones(2))
    assert (line.loss() < Line().loss()).item()


# Tensor learning rates

TENSOR_RATES = [
    (info, options, implementation)
    for (info, options), implementation in product(INPUTS_WITH_RATE, ("definition", "tiles", "kernel", "compiled"))
    if implementation != "compiled" or options == info.inputs[0][0]  # each graph takes seconds to compile
]


@pytest.fixture
def compiler():
    """A compiler without graphs."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@sweep(
    ("info", "options", "implementation"),
    TENSOR_RATES,
    short=lambda info, options, implementation: (
        implementation in ("definition", "tiles") or (implementation == "kernel" and options == info.inputs[0][0])
    ),
    ids=[f"{name}-{one[-1]}" for name, one in zip(ids(TENSOR_RATES), TENSOR_RATES, strict=True)],
)
def test_a_tensor_learning_rate_equals_a_number(info, options, implementation, compiler):
    """With every implementation, and where a scheduler fills it in its place."""
    number, tensor = Line(), Line()
    rate = torch.tensor(1e-3, dtype=torch.float64)
    optimizers = [
        info(line.params, **{**options, "lr": lr, "implementation": implementation})
        for line, lr in ((number, 1e-3), (tensor, rate))
    ]
    schedulers = [StepLR(optimizer, step_size=2, gamma=0.5) for optimizer in optimizers]
    for _ in range(5):
        for line, optimizer, scheduler in zip((number, tensor), optimizers, schedulers, strict=True):
            optimizer.step(line.closure(optimizer))
            scheduler.step()
    assert optimizers[1].param_groups[0]["lr"] is rate
    assert rate.item() == 1e-3 / 4
    torch.testing.assert_close(tensor.params, number.params, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(states(optimizers[1]), states(optimizers[0]), rtol=1e-6, atol=1e-7)


# Implementations

OF_IMPLEMENTATIONS = [(*one, implementation) for one, implementation in product(INPUTS, ("tiles", "kernel"))]


@sweep(
    ("info", "options", "state", "implementation"),
    OF_IMPLEMENTATIONS,
    short=lambda info, options, state, implementation: implementation == "tiles",  # kernels of float64
    ids=[f"{name}-{one[-1]}" for name, one in zip(ids(OF_IMPLEMENTATIONS), OF_IMPLEMENTATIONS, strict=True)],
)
def test_an_implementation_equals_the_definition_whatever_has_a_gradient(info, options, state, implementation):
    """In float64, with a step in which nothing has a gradient, layers that are frozen and unfrozen, and a scalar."""
    shapes = ((3, 2), (3,), (1, 3), (1,), ())
    optimizers = [
        info(info.params(*shapes, dtype=torch.float64), implementation=name, **options)
        for name in ("definition", implementation)
    ]
    for step in range(7):
        for optimizer in optimizers:
            for i, p in enumerate(optimizer.param_groups[0]["params"]):
                is_frozen = step == 2 or (3 <= step < 5 and i in (2, 3))
                p.grad = None if is_frozen else gradient(p, step, i)
            optimizer.step()
        mine, theirs = ([p.detach() for p in o.param_groups[0]["params"]] for o in reversed(optimizers))
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(states(optimizers[1]), states(optimizers[0]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("default", [torch.float64, torch.float16])
@each_input
def test_the_default_dtype_changes_nothing(info, options, state, default):
    optimizers = []
    for dtype in (torch.float32, default):
        params = info.params((4, 3), (5,), ())
        torch.set_default_dtype(dtype)
        try:
            optimizers.append(info(params, implementation="tiles", **options))
            run(optimizers[-1], 3)
        finally:
            torch.set_default_dtype(torch.float32)
    assert_same_run(*optimizers)


@each_class
def test_parameters_are_stepped_once_they_have_memory(info):
    """A step of what has none says nothing and does nothing."""
    with torch.device("meta"):
        model = nn.Linear(2, 3)
    optimizer = info(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    optimizer = info(model.parameters())
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e3)
    for _ in range(9):  # votes of TernaryVote
        optimizer.step()
    assert all((p < 1).all() and p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("implementation", ["kernel", "tiles", "definition"])
@sweep_of_optimizers
def test_a_parameter_twice_in_a_group_is_warned_of_and_stepped_twice(make, implementation):
    (twice,), (once,) = parameters((4, 3)), parameters((4, 3))
    with pytest.warns(UserWarning, match="a parameter group with duplicate parameters"):
        optimizer = make([twice, twice], lr=0.1, implementation=implementation)
    wanted = make([once], lr=0.1, implementation=implementation)
    for step in range(2):
        twice.grad, once.grad = gradient(twice, step), gradient(once, step)
        optimizer.step()
        wanted.step()
        wanted.step()
    torch.testing.assert_close(twice, once, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(states(optimizer)[0], states(wanted)[0], rtol=1e-6, atol=1e-7)


# Gradients


def rosenbrock(point):
    x, y = point.detach()
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


# The record of ChainOptimizer has a momentum, which sparse gradients leave out.
TAKES_SPARSE = [info for info in INFOS if info.sparse != "refused" and info.cls is not ChainOptimizer]


@pytest.mark.parametrize("info", TAKES_SPARSE, ids=lambda info: info.cls.__name__)
def test_rosenbrock_by_sparse_gradients(info):
    """One coordinate after the other, in pieces that have to be summed, as by dense gradients."""
    sparse, dense = (torch.tensor([1.5, 1.5], dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizers, start = [by_definition(info, [p], lr=1e-2) for p in (sparse, dense)], sparse.detach().clone()
    for step in range(300):
        for p, optimizer in zip((sparse, dense), optimizers, strict=True):
            x, y = p.detach()
            at = step % 2
            slope = torch.stack((-400 * x * (y - x**2) - 2 * (1 - x), 200 * (y - x**2)))[at]
            pieces = torch.stack((slope / 4, slope - slope / 4))
            p.grad = torch.sparse_coo_tensor([[at, at]], pieces, (2,), check_invariants=True)
            if p is dense:
                p.grad = p.grad.to_dense()
            optimizer.step()
    torch.testing.assert_close(sparse, dense, rtol=5e-6, atol=5e-6)
    assert rosenbrock(sparse) < rosenbrock(start) / 20


@each_input
def test_without_a_gradient_a_step_does_nothing(info, options, state):
    params = [p.detach() for p in info.params((2, 3), (2, 3))]
    before, optimizer = [p.clone() for p in params], by_definition(info, params, **options)
    assert optimizer.step(lambda: 1.0) == 1.0
    assert_same(params, before)
    assert not optimizer.state


@each_input
def test_a_gradient_of_zero_moves_nothing(info, options, state):
    """Without a decay."""
    (param,) = info.params((5, 1))
    before, optimizer = param.detach().clone(), by_definition(info, [param], **options)
    (group,) = optimizer.param_groups
    if "weight_decay" in group:
        group["weight_decay"] = 0.0
    for _ in range(2):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    assert_same(param.detach(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@each_class
def test_a_gradient_of_another_dtype_is_taken_where_torch_lets_it_be(info, dtype):
    mixed, plain = info.params((4, 3))[0], info.params((4, 3))[0]
    mixed.grad_dtype = None
    optimizer, wanted = info([mixed]), by_definition(info, [plain])
    for step in range(2):
        mixed.grad = gradient(mixed, step).to(dtype)
        plain.grad = mixed.grad.float()
        optimizer.step()
        wanted.step()
    torch.testing.assert_close(mixed, plain, rtol=1e-5, atol=1e-6)
