"""DTensors: what is refused, how state is placed, and what may stand beside them."""

import copy
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from makers import gradient, parameters
from processes import placed, run_in_processes
from sweeps import only, sweep
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from fusedbun import SM3, ChainOptimizer, DecoupledLionW, Fusedbun, ScaledOptum, Signal, Transform, chain
from fusedbun.compiler.cpp.native import KernelError
from fusedbun.torch.sharding import parts as sharded_steps
from fusedbun.torch.sharding import placement

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
    assert type(state["step"]) is torch.Tensor


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


def test_a_gradient_has_to_be_placed_as_its_parameter_is(mesh):
    plain, param = torch.zeros(4, 4, requires_grad=True), sharded(mesh, Shard(0), Replicate(), shape=(4, 4))
    optimizer = SM3([("v", plain), ("w", param)], lr=0.1)
    plain.grad, param.grad = torch.ones(4, 4), torch.ones(4, 4)
    with pytest.raises(ValueError, match=r"gradient of parameter 'w' is on no mesh, but the parameter is on D"):
        optimizer.step()
    assert not plain.any()


def test_a_kernel_that_is_asked_for_has_to_suit_the_gradient(mesh):
    param = sharded(mesh, Shard(0), Replicate(), shape=(4, 4))
    optimizer = SM3([("w", param)], lr=0.1, implementation="kernel")
    param.grad_dtype = torch.float64
    param.grad = placed(torch.ones(4, 4, dtype=torch.float64), mesh, [Shard(0), Replicate()])
    with pytest.raises(KernelError, match=r"'w' part by part: its device, the dtype of its gradient"):
        optimizer.step()


def test_a_gradient_that_is_still_on_its_way_is_waited_for(mesh):
    param = sharded(mesh, Shard(0), Replicate(), shape=(4, 4))
    optimizer = ScaledOptum([param], lr=0.1)
    whole = DTensor.from_local(torch.ones(4, 4), mesh, [Partial(), Replicate()], run_check=False)
    param.grad = whole.redistribute(placements=[Shard(0), Replicate()], async_op=True)
    optimizer.step()
    assert param._version == 1
    torch.testing.assert_close(param.to_local().detach(), torch.full((2, 4), -0.1))


def test_state_that_comes_later_is_checked_too(mesh):
    param = sharded(mesh, Shard(1), Replicate(), shape=(4, 40))
    optimizer = SM3([("w", param)], lr=0.1, momentum_dtype="int8")
    optimizer.param_groups[0]["momentum"] = 0.9
    param.grad = param.detach().clone()
    with pytest.raises(ValueError, match=r"'momentum.moment' of parameter 'w' .* cuts its shape"):
        optimizer.step()


@pytest.mark.parametrize("rows", [13, 7, 50257])
@pytest.mark.parametrize("size", [(2, 2), (3, 2), (4, 2), (2, 4)])
def test_fsdp_cuts_what_tensor_parallelism_has_cut(mesh, rows, size):
    """As torch.chunk does, first by the one and then by the other."""
    found = []
    for row, column in product(*map(range, size)):
        at = placement.cut(Cut2d((rows, 1), size, (row, column), (_StridedShard(0, split_factor=size[1]), Shard(0))))
        found.append((at.shape[0], at.first[0]))
    wanted = []
    for row, column in product(*map(range, size)):
        parts = torch.arange(rows).chunk(size[1])
        part = parts[column] if column < len(parts) else torch.arange(0)
        pieces = part.chunk(size[0]) if len(part) else ()
        wanted.append((len(pieces[row]), int(pieces[row][0])) if row < len(pieces) else (0, None))
    assert [(n, first if n else None) for n, first in found] == wanted


class Cut2d:
    """What is asked of a DTensor on a mesh of two dimensions."""

    def __init__(self, shape, size, coordinate, placements):
        self.shape, self.ndim, self.placements = shape, len(shape), placements
        self.device_mesh = SimpleNamespace(
            get_coordinate=lambda: coordinate, size=lambda dim: size[dim], get_group=lambda dim: dim
        )


def test_what_is_cut_into_scattered_pieces_is_refused(mesh):
    param = placed(torch.zeros(8, 2), mesh, [_StridedShard(0, split_factor=2), Replicate()]).requires_grad_()
    with pytest.raises(ValueError, match="must be replicated or sharded in one piece"):
        SM3([param], lr=0.1)


def test_nan_is_the_largest_of_all(mesh):
    for dtype in (torch.float32, torch.float64):
        numbers = torch.tensor([-torch.nan, torch.nan, torch.inf, 3.0, 0.0, -1e-40, -2.0, -torch.inf], dtype=dtype)
        ordered = sharded_steps._ordered(numbers)
        assert ordered[0] == ordered[1] == ordered.max()
        assert ordered[1:].tolist() == sorted(ordered[1:].tolist(), reverse=True)
        back = sharded_steps._in_order(ordered).view(dtype)
        torch.testing.assert_close(back, numbers, rtol=0, atol=0, equal_nan=True)


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


def not_a_number(rank):
    """A NaN in one process's part is everyone's maximum and minimum."""
    mesh = init_device_mesh("cpu", (2,))
    for name in ("max", "min"):
        x = torch.tensor([torch.nan, 1.0, 2.0, -3.0] if rank else [1.0, torch.nan, -5.0, 7.0])
        sharded_steps._combine(sharded_steps.Collective((mesh.get_group(0),), name, x))
        wanted = [torch.nan, torch.nan, *([2.0, 7.0] if name == "max" else [-5.0, -3.0])]
        torch.testing.assert_close(x, torch.tensor(wanted), equal_nan=True)


def no_rows(rank):
    """The second process has none of the only row."""
    mesh = init_device_mesh("cpu", (2,))
    param = placed(torch.ones(1, 64), mesh, [Shard(0)]).requires_grad_()
    optimizer = DecoupledLionW([("w", param)], lr=0.1)
    param.grad = placed(torch.ones(1, 64), mesh, [Shard(0)])
    optimizer.step()
    other = DecoupledLionW([("w", param)], lr=0.1, momentum_dtype="int8")
    with pytest.warns(UserWarning, match="is converted"):
        other.load_state_dict(optimizer.state_dict(), convert=True)
    other.step()


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


@sweep("function", [plain_and_sharded, converted, data_parallel, not_a_number, no_rows], short=only(data_parallel))
def test_two_processes_do_what_one_does(function, tmp_path):
    run_in_processes(2, function, tmp_path)
