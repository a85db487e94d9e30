"""What the suite of the package pytorch_optimizer asks of an optimizer; its wrappers and schedulers around ours.

`tests/peers.py` says of each of its tests where it is.
"""

from __future__ import annotations

import copy
import inspect

import pytest
import pytorch_optimizer as peer
import torch
from makers import MAKERS, assert_same, assert_same_run, copies, every_optimizer, gradient, parameters, run
from pytorch_optimizer import lr_scheduler as schedules
from sweeps import sweep
from test_torch_optimizer_info import INFOS
from torch import nn

from fusedbun import SM3
from fusedbun.recipes import RECIPES

# Learning rates at which two clusters of points are told apart in twenty steps.
RATES = {"sm3": 0.5, "sm3-momentum": 0.5, "mup-adam": 0.5, "mup-adamw": 0.5, "mup-sgd": 2.0}
every_optimizer_at_its_rate = pytest.mark.parametrize(
    ("make", "lr"), [(make, RATES.get(name, 0.1)) for name, make in MAKERS.items()], ids=MAKERS
)


class Clusters:
    """Two clusters of points, and a small network to tell them apart."""

    def __init__(self, dtype=torch.float32):
        torch.manual_seed(42)
        ones = torch.ones(50, 1)
        self.points = torch.cat([torch.randn(50, 2) + 2, torch.randn(50, 2) - 2]).to(dtype)
        self.labels = torch.cat([ones, 0 * ones]).to(dtype)
        self.model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)).to(dtype)

    @property
    def params(self):
        return list(self.model.parameters())

    def loss(self):
        made = self.model(self.points)
        return nn.functional.binary_cross_entropy_with_logits(made, self.labels.to(made.dtype))

    def train(self, step, times, steps=20):
        """Asserts that the steps make the loss so many times smaller."""
        before = self.loss().item()
        for _ in range(steps):
            step()
        assert all(p.isfinite().all() for p in self.params)
        assert before > times * self.loss().item()


def plain(clusters, optimizer):
    def step():
        optimizer.zero_grad()
        clusters.loss().backward()
        optimizer.step()

    return step


# Training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_optimizer_at_its_rate
def test_two_clusters_are_told_apart(make, lr, dtype):
    """In bfloat16 under autocast."""
    clusters = Clusters(dtype)
    step = plain(clusters, make(clusters.params, lr=lr))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        clusters.train(step, 10)


@every_optimizer_at_its_rate
def test_so_they_are_with_a_tensor_for_the_learning_rate(make, lr):
    clusters = Clusters()
    clusters.train(plain(clusters, make(clusters.params, lr=torch.tensor(lr))), 10)


# Learning rates at which it goes along Rosenbrock's valley in a thousand steps.
IN_THE_VALLEY = {
    "fusedbun": 1e-3,
    "fusedbun-recommended": 3e-3,
    "fusedbun-clipped-lagged": 0.01,
    "chain": 0.3,
    "fusedbunw": 0.3,
    "sm3": 1.0,
    "sm3-momentum": 0.3,
    "scaled-optum": 3e-3,
    "mup-adam": 0.3,
    "mup-adamw": 0.3,
    "mup-sgd": 3e-3,
    "decoupled-lionw": 0.03,
}


@sweep(("name", "lr"), IN_THE_VALLEY.items(), short=lambda name, lr: name == "fusedbunw", ids=IN_THE_VALLEY)
def test_the_valley_of_rosenbrock(name, lr):
    """From a loss of 62.5, round the bend that is at 5."""
    point = torch.tensor([-1.5, 1.5], requires_grad=True)
    optimizer = MAKERS[name]([point], lr=lr)
    (group,) = optimizer.param_groups
    if "weight_decay" in group:
        group["weight_decay"] = 0.0
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=1000)

    def loss():
        x, y = point
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2

    for _ in range(1000):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        scheduler.step()
    assert loss() < 3.0


@every_optimizer
def test_groups_of_which_some_parameters_have_no_gradient(make):
    """Gradients with graphs of their own, groups with and without a parameter that is trained, a closure's number."""
    trained, frozen, alone, still = parameters((1, 1), (1, 1), (1, 1), (1, 1))
    frozen.requires_grad_(False)
    still.requires_grad_(False)
    optimizer = make([{"params": [trained, frozen]}, {"params": [alone]}, {"params": [still]}], lr=0.1)
    optimizer.zero_grad()
    before = [p.detach().clone() for p in (trained, alone, frozen, still)]
    trained.grad, alone.grad = torch.autograd.grad((trained + alone).pow(2).sum(), [trained, alone], create_graph=True)
    assert optimizer.step(lambda: 0.1) == 0.1
    after = [p.detach() for p in (trained, alone, frozen, still)]
    assert_same(after[2:], before[2:])
    optimizer.zero_grad(set_to_none=True)
    assert trained.grad is alone.grad is None
    if "centralize" not in getattr(make, "keywords", {}):
        assert all((p != q).all() for p, q in zip(after[:2], before[:2], strict=True))


# Arguments

NUMBERS = [
    (info, name)
    for info in INFOS
    for name, p in inspect.signature(info.cls).parameters.items()
    if isinstance(p.default, float) or name == "lr" or (isinstance(p.default, tuple) and p.default)
]


@pytest.mark.parametrize(("info", "name"), NUMBERS, ids=[f"{info.cls.__name__}-{name}" for info, name in NUMBERS])
def test_a_number_below_zero_is_refused_before_parameters_are_looked_at(info, name):
    default = inspect.signature(info.cls).parameters[name].default
    for value in ((-0.1, 0.1), (0.1, -0.1)) if isinstance(default, tuple) else (-0.1,):
        with pytest.raises(ValueError, match=rf"{name}.* must lie in .*-0.1"):
            info(None, **{name: value})


def test_every_class_has_numbers_here():
    named = {info.cls.__name__ for info, _ in NUMBERS}
    assert {r.torch_class for r in RECIPES.values() if not r.fixed_lr} <= named


@every_optimizer
def test_groups_that_the_package_makes_for_a_decay(make):
    """Weights with it, biases without; an optimizer that has none is told."""
    clusters, makes = Clusters(), peer.get_optimizer_parameters
    decayed = make(makes(clusters.model, 1e-4, ["bias"]), lr=0.1) if "weight_decay" in group_of(make) else None
    for optimizer in filter(None, (decayed, make(makes(clusters.model, 0.0, ["bias"]), lr=0.1))):
        run(optimizer, 1)
    if decayed:
        assert sorted({group["weight_decay"] for group in decayed.param_groups}) == [0.0, 1e-4]
    else:
        with pytest.raises(
            TypeError, match=r"does not read weight_decay=0.0001 of a param group; it has no weight decay"
        ):
            make(makes(clusters.model, 1e-4, ["bias"]), lr=0.1)


def group_of(make):
    return make(parameters((2,)), lr=0.1).param_groups[0]


# Sparse gradients


def test_sm3_steps_the_rows_of_a_sparse_gradient():
    """Ones twice: of 1 and of 1/sqrt(2)."""
    param = torch.zeros(5, 3, requires_grad=True)
    optimizer = SM3([param], lr=0.1)
    for _ in range(2):
        param.grad = torch.sparse_coo_tensor([[0, 2]], torch.ones(2, 3), (5, 3), check_invariants=True)
        optimizer.step()
    wanted = torch.zeros(5, 3)
    wanted[[0, 2]] = -0.1 * (1 + 2**-0.5)
    torch.testing.assert_close(param.detach(), wanted)


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_sparse_rows_of_sm3_equal_dense_vectors_that_are_zero_elsewhere(beta):
    """For vectors, whose rows have an accumulator each in both."""
    sparse, dense = (torch.ones(2, requires_grad=True) for _ in range(2))
    optimizers = [SM3([p], lr=1e-3, beta=beta) for p in (sparse, dense)]
    for step in range(3):
        dense.grad = gradient(dense, step)
        dense.grad[1] = 0.0
        sparse.grad = torch.sparse_coo_tensor([[0]], dense.grad[:1], (2,), check_invariants=True)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(sparse, dense)


def test_an_epsilon_of_zero_makes_no_nan_of_rows_that_have_a_gradient():
    param = torch.ones(2, 2, requires_grad=True)
    param.grad = torch.eye(2).to_sparse(1)
    SM3([param], eps=0.0).step()
    assert param.isfinite().all()


# Wrappers and schedulers of the package


def sharp(wrapper):
    """A step of those that go up first and then down from there."""

    def start(make, lr):
        clusters = Clusters()
        cls, given = getattr(make, "func", make), getattr(make, "keywords", {})
        first = [clusters.model] if wrapper is peer.WSAM else []
        optimizer = wrapper(*first, clusters.params, cls, lr=lr, **given)

        def step():
            clusters.loss().backward()
            optimizer.first_step(zero_grad=True)
            clusters.loss().backward()
            optimizer.second_step(zero_grad=True)

        return clusters, step

    return start


def around(wrap, times=1):
    def start(make, lr):
        clusters = Clusters()
        optimizer = wrap(make(clusters.params, lr=times * lr))
        return clusters, plain(clusters, optimizer)

    return start


def schedule_free(optimizer):
    wrapped = peer.ScheduleFreeWrapper(optimizer)
    wrapped.train()
    return wrapped


def of_two_losses(make, lr):
    clusters = Clusters()
    optimizer = peer.PCGrad(make(clusters.params, lr=lr))

    def step():
        optimizer.zero_grad()
        made = clusters.model(clusters.points)
        optimizer.pc_backward([clusters.loss(), (made.sigmoid() - clusters.labels).abs().mean()])
        optimizer.step()

    return clusters, step


def in_half_precision(make, lr):
    clusters = Clusters(torch.float16)
    optimizer = peer.SafeFP16Optimizer(make(clusters.params, lr=lr))

    def step():
        optimizer.zero_grad()
        optimizer.backward(clusters.loss())
        optimizer.step()

    return clusters, step


WRAPPERS = {
    "Lookahead": around(peer.Lookahead),
    "OrthoGrad": around(peer.OrthoGrad),
    "TRAC": around(peer.TRAC, times=10),  # it begins with almost nothing of a step
    "ScheduleFreeWrapper": around(schedule_free),
    "SAM": sharp(peer.SAM),
    "LookSAM": sharp(peer.LookSAM),
    "FriendlySAM": sharp(peer.FriendlySAM),
    "WSAM": sharp(peer.WSAM),
    "PCGrad": of_two_losses,
    "SafeFP16Optimizer": in_half_precision,
}


WRAPPED = {f"{name}-{wrapper}": (name, wrapper) for name in MAKERS for wrapper in WRAPPERS}


@sweep(
    ("name", "wrapper"), WRAPPED.values(), short=lambda name, wrapper: name in ("fusedbunw", "mup-adamw"), ids=WRAPPED
)
def test_the_packages_wrappers_train_with_it(name, wrapper):
    clusters, step = WRAPPERS[wrapper](MAKERS[name], RATES.get(name, 0.1))
    clusters.train(step, 1.5, 60 if wrapper == "TRAC" else 20)


@every_optimizer
def test_a_wrappers_own_entries_in_shared_groups_change_nothing(make):
    """SAM and its like keep their numbers in the groups that they hand on."""
    params = parameters((4, 3), (5,))
    plainly, shared = make(params, lr=0.1), make([{"params": copies(params), "rho": 0.05, "alpha": 0.5}], lr=0.1)
    for optimizer in (plainly, shared):
        run(optimizer, 2)
    assert_same_run(plainly, shared)
    resumed = make(parameters((4, 3), (5,)), lr=0.1)
    resumed.load_state_dict(shared.state_dict())
    assert resumed.param_groups[0]["rho"] == 0.05


@every_optimizer
def test_a_wrapped_run_continues_from_its_saved_state(make):
    """Lookahead keeps the slow weights beside the optimizer's own dict."""
    whole, (p,) = parameters((4, 3)), parameters((4, 3))
    first = peer.Lookahead(make(whole, lr=0.1), k=2)
    run(first, 2)
    second = peer.Lookahead(make([p], lr=0.1), k=2)
    with torch.no_grad():
        p.copy_(whole[0])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for optimizer in (first, second):
        run(optimizer, range(2, 4))
    assert_same(p.detach(), whole[0].detach())


SCHEDULES = {
    "CosineAnnealingWarmupRestarts": lambda o: schedules.CosineAnnealingWarmupRestarts(
        o, 4, max_lr=0.1, min_lr=0.01, warmup_steps=2
    ),
    "CosineScheduler": lambda o: schedules.CosineScheduler(o, t_max=8, max_lr=0.1, min_lr=0.01, warmup_steps=2),
    "LinearScheduler": lambda o: schedules.LinearScheduler(o, t_max=8, max_lr=0.1, min_lr=0.01, warmup_steps=2),
    "PolyScheduler": lambda o: schedules.PolyScheduler(o, t_max=8, max_lr=0.1, min_lr=0.01, warmup_steps=2),
    "REXScheduler": lambda o: schedules.REXScheduler(o, total_steps=8, max_lr=0.1),
    "chebyshev": lambda o: schedules.get_chebyshev_schedule(o, 8),
    "WSD": lambda o: schedules.get_wsd_schedule(o, 2, 3, 3),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@every_optimizer
def test_the_packages_schedules_give_each_step_its_learning_rate(make, schedule):
    rates = []
    for start in (make, torch.optim.SGD):
        optimizer = start(parameters((2,)), lr=0.1)
        scheduler = schedule(optimizer)
        rates.append([])
        for step in range(6):
            run(optimizer, range(step, step + 1))
            scheduler.step()
            rates[-1].append(optimizer.param_groups[0]["lr"])
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 2
