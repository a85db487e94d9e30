"""DTensors: what is refused, how state is placed, and what may stand beside them."""

import copy

import pytest
import torch
import torch.distributed as dist
from makers import gradient, parameters
from processes import placed, run_in_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from fusedbun import SM3, ChainOptimizer, DecoupledLionW, Fusedbun, Signal, Transform, chain
from fusedbun.compiler.native import KernelError

MESH = (2, 2)


@pytest.fixture(scope="module")
def mesh():
    """The first of four processes, of which there are no others: nothing is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield init_device_mesh("cpu", MESH)
    dist.destroy_process_group()


def sharded(mesh, *placements, shape=(64, 64), dtype=torch.float32):
    return placed(torch.zeros(shape, dtype=dtype), mesh, placements).requires_grad_()


def test_state_is_cut_along_the_axes_that_it_has(mesh):
    param = sharded(mesh, Shard(0), Shard(1))
    (state,) = Fusedbun([param], lr=0.1, momentum_dtype="int8").state.values()
    assert {key: x.placements for key, x in state.items() if isinstance(x, DTensor)} == {
        "sm3_accumulate.axis0": (Shard(0), Replicate()),
        "sm3_accumulate.axis1": (Replicate(), Shard(1)),
        "momentum.moment": (Shard(0), Shard(1)),
        "momentum.moment.exponents": (Shard(0), Shard(1)),
    }
    assert state["momentum.moment.exponents"].to_local().shape == (32, 1, 1)
    assert type(state["momentum.moment.step"]) is torch.Tensor


def test_of_frozen_parameters_there_is_none(mesh):
    assert not SM3([sharded(mesh, Shard(0), Replicate()).requires_grad_(False)], lr=0.1).state


@pytest.mark.parametrize(
    ("placements", "given", "message"),
    [
        ((Partial(), Replicate()), {}, r"Fusedbun: parameter 'w' is placed as .*sum.*redistribute it"),
        ((Shard(0), Shard(1)), {"momentum_dtype": "int8"}, r"'momentum.moment' of parameter 'w' .* cuts its shape"),
        ((Shard(1), Shard(1)), {"momentum_dtype": "int4"}, r"shard it along its first axis, or keep .* in bfloat16"),
    ],
)
def test_what_cannot_be_stepped_in_parts_is_refused_before_anything_is_made(mesh, placements, given, message):
    model = nn.Module()
    model.w = nn.Parameter(DTensor.from_local(torch.zeros(32, 16), mesh, placements, run_check=False))
    optimizer = Fusedbun([("v", sharded(mesh, Shard(0), Replicate()))], lr=0.1, **given)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [*model.named_parameters()]})
    assert len(optimizer.param_groups) == len(optimizer.state) == 1


def test_a_rule_that_no_plan_expresses_is_refused(mesh):
    class Branching(Transform):
        name = "branching"

        def update(self, xp, signal, state, param):
            return (signal if signal.update.sum() > 0 else Signal(-signal.update)), state

    param = sharded(mesh, Shard(0), Replicate())
    optimizer = ChainOptimizer([("w", param)], chain(Branching()), 0.1)
    param.grad = sharded(mesh, Shard(0), Replicate()).detach()
    with pytest.raises(KernelError, match=r"cannot step parameter 'w' part by part: a rule"):
        optimizer.step()


# In several processes


def plain_and_sharded(rank):
    """Plain parameters, DTensors and bfloat16 beside one another, in two groups; one is left without a gradient."""
    mesh = init_device_mesh("cpu", (2,))
    shapes, dtypes = ((6, 4), (5,), (4, 4), (3, 2)), (torch.float32, torch.float32, torch.bfloat16, torch.float32)
    whole = [p.detach().to(dtype).requires_grad_() for p, dtype in zip(parameters(*shapes), dtypes, strict=True)]
    mixed = [
        placed(p.detach(), mesh, [Shard(0)]).requires_grad_() if i % 2 == 0 else copy.deepcopy(p)
        for i, p in enumerate(whole)
    ]
    optimizers = []
    for params in (whole, mixed):
        groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "momentum": 0.0}]
        optimizers.append(SM3(groups, lr=0.01, momentum=0.9, implementation=None))
    for step in range(4):
        for i, (p, q) in enumerate(zip(whole, mixed, strict=True)):
            p.grad = gradient(p, step, i) if (step, i) != (2, 2) else None
            q.grad = None if p.grad is None else placed(p.grad, mesh, [Shard(0)]) if i % 2 == 0 else p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(whole, mixed, strict=True):
        found = q.full_tensor() if isinstance(q, DTensor) else q
        assert torch.equal(found, p)
    # a gradient that is placed otherwise is brought to where its parameter is
    mixed[0].grad = placed(gradient(whole[0], 9), mesh, [Replicate()])
    whole[0].grad = gradient(whole[0], 9)
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(mixed[0].full_tensor(), whole[0])


def converted(rank):
    """Each process converts its part, with the noise of the whole."""
    mesh = init_device_mesh("cpu", (2,))
    (whole,) = parameters((6, 64))
    params = [whole, placed(whole.detach(), mesh, [Shard(0)]).requires_grad_()]
    states = []
    for param in params:
        optimizer = DecoupledLionW([("w", param)], lr=0.1)
        param.grad = gradient(whole, 0) if param is whole else placed(gradient(whole, 0), mesh, [Shard(0)])
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer = DecoupledLionW([("w", param)], lr=0.1, momentum_dtype="int8")
        with pytest.warns(UserWarning, match="is converted"):
            optimizer.load_state_dict(saved, convert=True)
        optimizer.step()
        states.append(optimizer.state[param])
    assert states[0].keys() == states[1].keys()
    for key, x in states[0].items():
        found = states[1][key]
        assert torch.equal(found.full_tensor() if isinstance(found, DTensor) else found, x)
    assert torch.equal(params[1].full_tensor(), whole)


def data_parallel(rank):
    """The same batch everywhere: the mean of the gradients is each of them."""
    networks = []
    for wrap in (lambda model: model, DistributedDataParallel):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        wrapped, optimizer = wrap(network), Fusedbun(network.named_parameters(), lr=1e-2, use_rms=True)
        for _ in range(5):
            wrapped(torch.linspace(-1, 1, 32).view(4, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        networks.append(network)
    for p, q in zip(*(network.parameters() for network in networks), strict=True):
        assert torch.equal(p, q)


@pytest.mark.slow
@pytest.mark.parametrize("function", [plain_and_sharded, converted, data_parallel])
def test_two_processes_do_what_one_does(function, tmp_path):
    run_in_processes(2, function, tmp_path)
