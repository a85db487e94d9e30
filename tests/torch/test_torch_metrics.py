"""Metrics: what a step did to each parameter, as plain torch finds it; over several processes as in one."""

import copy
import math
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from makers import (
    FEW,
    MAKERS,
    assert_same,
    assert_same_run,
    copies,
    every_optimizer,
    gradient,
    parameters,
    run,
    sweep_of_dtypes,
)
from sweeps import sweep
from test_torch_ternary_vote import ternary
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fusedbun import SM3, DecoupledLionW, Fusedbun, FusedbunW, TernaryVote
from fusedbun.torch import TransformOptimizer

SHAPES = ((), (5,), (4, 3), (2, 3, 4))
KEYS = ["l2_norm/moment", "l2_norm/param", "l2_norm/update", "l2_norm/grad", "cosine/update_grad", "cosine/moment_grad"]


def report(optimizer, names=None):
    found = {}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for name, param in zip(names or map(str, range(len(params))), params, strict=True):
        assert optimizer.report_per_parameter_metrics(param, name, found) is found
    return found


def plainly(before, param, grad, moment, name):
    """The metrics of one parameter, written out."""
    param, grad = param.detach().double(), grad.double()
    vectors = {"param": param, "update": before.double() - param, "grad": grad}
    vectors |= {} if moment is None else {"moment": moment.double()}
    wanted = {f"l2_norm/{k}/{name}": v.flatten().norm() for k, v in vectors.items()}
    for v in vectors.keys() & {"update", "moment"}:
        lengths = vectors[v].flatten().norm() * grad.flatten().norm()
        wanted[f"cosine/{v}_grad/{name}"] = (vectors[v] * grad).sum() / lengths if lengths else torch.tensor(0.0)
    return wanted


def moment_of(optimizer, param):
    (*found,) = (value for key, value in optimizer.state[param].items() if key.endswith(".moment"))
    return found[0].clone() if found else None


def assert_metrics(found, wanted, rtol):
    assert found.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(float(found[key]), float(wanted[key]), rtol=rtol, atol=rtol, msg=key)


TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6}


@sweep(
    ("name", "dtype"),
    [(name, dtype) for name in (*MAKERS, "ternary-vote") for dtype in TOLERANCE],
    short=lambda name, dtype: dtype == torch.float32 or MAKERS.get(name) in FEW,
)
def test_are_what_plain_torch_finds_in_the_parameters_own_group(name, dtype):
    """Two groups of different learning rates; of bfloat16 parameters the update is the one that was rounded."""
    params = (ternary if name == "ternary-vote" else parameters)(*SHAPES, dtype=dtype)
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    if name == "ternary-vote":
        optimizer = TernaryVote(groups, threshold=1)
    else:
        groups[1]["lr"] = 0.3
        optimizer = MAKERS[name](groups, lr=0.01)
    optimizer.record_metrics = True
    for step in range(3):
        before = [p.detach().clone() for p in params]
        run(optimizer, range(step, step + 1))
        wanted = {}
        for i, (p, b) in enumerate(zip(params, before, strict=True)):
            wanted |= plainly(b, p, gradient(p, step, i), moment_of(optimizer, p), f"layers/{i}.weight")
        optimizer.zero_grad()  # they were recorded while there was a gradient
        found = report(optimizer, [f"layers/{i}.weight" for i in range(len(params))])
        assert_metrics(found, wanted, TOLERANCE[dtype])
        has_moment = name in ("fusedbun", "decoupled-lionw", "mup-adam")
        assert not has_moment or {key.removesuffix("/layers/0.weight") for key in found if "/0" in key} == set(KEYS)
        assert name not in ("sm3", "scaled-optum", "ternary-vote") or not any("moment" in key for key in found)


@every_optimizer
def test_recording_changes_no_number(make):
    params = parameters(*SHAPES)
    plain, recorded = make(params, lr=0.1), make(copies(params), lr=0.1)
    recorded.record_metrics = True
    run(plain, 3)
    run(recorded, 3)
    assert_same_run(plain, recorded)


@every_optimizer
def test_nothing_is_recorded_unless_asked_for(make):
    params = parameters(*SHAPES)
    optimizer = make(params, lr=0.1)
    assert optimizer.record_metrics is False
    assert TransformOptimizer.record_metrics is False
    run(optimizer, 2)
    assert report(optimizer) == {}


def test_only_the_last_step_is_reported():
    """Not an earlier one of a parameter that has rested since, nor of a time when metrics were on."""
    p, q = parameters((4, 3), (5,))
    optimizer = Fusedbun([p, q], 0.1)
    optimizer.record_metrics = True
    run(optimizer, 1)
    assert len(report(optimizer)) == 12
    q.grad = None
    optimizer.step()
    assert {key[-1] for key in report(optimizer)} == {"0"}
    optimizer.record_metrics = False
    optimizer.step()
    assert report(optimizer) == {}
    assert report(optimizer, ["a", "b"]) == {}


def test_a_zero_vector_has_cosine_zero():
    (p,) = parameters((3,), dtype=torch.float64)
    optimizer = DecoupledLionW([p], lr=0.5)
    optimizer.record_metrics = True
    p.grad = torch.zeros_like(p)
    optimizer.step()
    found = report(optimizer)
    assert {key: found[key].item() for key in found if "param" not in key} == {
        f"{key}/0": 0.0 for key in KEYS if "param" not in key
    }


def test_a_nan_shows():
    (p,) = parameters((3,))
    optimizer = Fusedbun([p], 0.1)
    optimizer.record_metrics = True
    p.grad = torch.tensor([1.0, math.nan, 2.0])
    optimizer.step()
    assert all(value.isnan() for value in report(optimizer).values())


def test_of_a_sparse_gradient():
    p, q = parameters((6, 3), (0, 3))
    optimizer, before = SM3([p, q], lr=0.1), p.detach().clone()
    optimizer.record_metrics = True
    p.grad = torch.sparse_coo_tensor([[1, 4, 1]], gradient(p, 0)[:3], (6, 3), check_invariants=True)
    q.grad = torch.zeros_like(q)
    optimizer.step()
    wanted = plainly(before, p, p.grad.to_dense(), None, "0") | plainly(q.detach(), q, q.grad, None, "1")
    assert_metrics(report(optimizer), wanted, 2e-6)


def test_a_copied_optimizer_goes_on_recording():
    optimizer = Fusedbun(parameters((4, 3)), 0.1)
    optimizer.record_metrics = True
    other = copy.deepcopy(optimizer)
    assert report(other) == {}
    run(other, 1)
    assert len(report(other)) == 6


def test_metric_functions_may_be_the_users():
    class OnlyGradients(Fusedbun):
        metric_functions: ClassVar = {"l2_norm/grad": Fusedbun.metric_functions["l2_norm/grad"]}

    optimizer = OnlyGradients(parameters((4, 3)), 0.1)
    optimizer.record_metrics = True
    run(optimizer, 1)
    assert list(report(optimizer)) == ["l2_norm/grad/0"]
    assert list(Fusedbun.metric_functions) == KEYS


# MosaicML's


def mosaicml_update(optimizer, param):
    """The update that MosaicML's DecoupledLionW reports after a step, written out."""
    group, moment = optimizer.param_groups[0], optimizer.state[param]["scale_by_lion.moment"]
    step = torch.lerp(moment, param.grad, 1 - group["betas"][0]).sign() * group["lr"]
    decay = group["lr"] / group["first_lr"] * group["weight_decay"]
    return step - decay * param.detach()


def updates(weight_decay=0.0, gradients=(1.0,), lrs=(0.5, 0.5)):
    """Of two weights in groups of their own: the updates that ours reports, that MosaicML's would, the real ones."""
    params = [torch.tensor([4.0], dtype=torch.float64, requires_grad=True) for _ in lrs]
    groups = [{"params": p, "lr": lr} for p, lr in zip(params, lrs, strict=True)]
    optimizer = DecoupledLionW(groups, weight_decay=weight_decay)
    optimizer.record_metrics = True
    for g in gradients:
        before = [p.item() for p in params]
        for p in params:
            p.grad = torch.full_like(p, g)
        optimizer.step()
    found, sign = report(optimizer), math.copysign(1.0, gradients[-1])
    ours = [sign * float(found[f"cosine/update_grad/{i}"] * found[f"l2_norm/update/{i}"]) for i in range(2)]
    real = [b - p.item() for b, p in zip(before, params, strict=True)]
    return ours, [mosaicml_update(optimizer, p).item() for p in params], real


def test_mosaicmls_take_the_decay_with_the_wrong_sign():
    """And of the weight after the step."""
    ours, theirs, real = updates(weight_decay=5e-4)
    assert real == pytest.approx([0.5 + 5e-4 * 4] * 2, rel=1e-12)
    assert ours == pytest.approx(real, rel=1e-12)
    assert theirs == pytest.approx([0.5 - 5e-4 * (4 - 0.502)] * 2, rel=1e-12)


def test_mosaicmls_take_the_moment_after_it_has_moved_on():
    """A step goes by the sign of 0.9*moment + 0.1*gradient, 0.00005 here; with the moment after it, -0.0008."""
    ours, theirs, real = updates(gradients=(1.0, -0.0895))
    assert ours == pytest.approx(real, rel=1e-12)
    assert real == [0.5, 0.5]
    assert theirs == [-0.5, -0.5]


def test_mosaicmls_take_the_first_groups_learning_rate_for_all():
    ours, theirs, real = updates(lrs=(0.5, 0.125))
    assert ours == pytest.approx(real, rel=1e-12)
    assert real == [0.5, 0.125]
    assert theirs == [0.5, 0.5]


# Over processes


@sweep_of_dtypes(TOLERANCE)
def test_reducing_in_one_process_is_the_identity_up_to_rounding(make, dtype):
    optimizer = make(parameters(*SHAPES, dtype=dtype), lr=0.1)
    optimizer.record_metrics = True
    run(optimizer, 2)
    found = report(optimizer) | {"loss/train/total": 3.0}
    summable = optimizer.pre_reduce_metrics(dict(found))
    assert summable["l2_norm/grad/2"] == found["l2_norm/grad/2"] ** 2
    assert_metrics(optimizer.dist_reduce_metrics(summable), found, TOLERANCE[dtype])
    assert optimizer.dist_reduce_metrics({}) == {}


SHARDED = {"matrix": (7, 3), "vector": (6,), "cube": (4, 2, 2), "one row": (1, 5)}
STEPS = 3


def gradients_of(step):
    return {name: gradient(torch.empty(s, dtype=torch.float64), step, i) for i, (name, s) in enumerate(SHARDED.items())}


def trained(make, split, whole=lambda x: x):
    """The metrics of the last step, and the parameters, after steps on what `split` leaves of each tensor."""
    values = parameters(*SHARDED.values(), dtype=torch.float64)
    params = {name: split(p.detach()).requires_grad_() for name, p in zip(SHARDED, values, strict=True)}
    optimizer = make(params.values())
    optimizer.record_metrics = True
    for step in range(STEPS):
        for name, g in gradients_of(step).items():
            params[name].grad = split(g)
        optimizer.step()
    found = optimizer.dist_reduce_metrics(optimizer.pre_reduce_metrics(report(optimizer, SHARDED)))
    return found, {name: whole(p.detach()) for name, p in params.items()}


def lion(params):
    return DecoupledLionW(params, lr=0.1, weight_decay=5e-4)


def in_a_process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        rows = trained(lion, lambda x: x.chunk(2)[rank].clone() if len(x) > rank else x[:0].clone())
        mesh = init_device_mesh("cpu", (2,))
        spread = trained(lion, lambda x: distribute_tensor(x, mesh, [Shard(0)]), lambda x: x.full_tensor())
        torch.save({"rows": rows, "spread": spread}, f"{folder}/{rank}")
    finally:
        dist.destroy_process_group()


@pytest.mark.long
def test_two_processes_with_shards_find_what_one_finds(tmp_path):
    """Parameters cut into rows by hand, and as DTensors; one leaves nothing to the second process."""
    torch.multiprocessing.spawn(in_a_process, (tmp_path,), nprocs=2)
    wanted, params = trained(lion, lambda x: x.clone())
    for rank in range(2):
        found = torch.load(f"{tmp_path}/{rank}")
        for metrics, _ in found.values():
            assert_metrics(metrics, wanted, 1e-13)
        assert_same(found["spread"][1], params)
        for name, part in found["rows"][1].items():
            assert_same(part, params[name].chunk(2)[rank] if len(params[name]) > rank else params[name][:0])


@pytest.mark.parametrize("implementation", ["kernel", "tiles", "definition"])
@pytest.mark.parametrize(("dtype", "near"), [("bfloat16", 5e-3), ("int8", 1e-2), ("int4", 0.1)])
def test_moments_in_codes_are_measured_by_their_numbers(dtype, near, implementation):
    """After a first step the codes are roundings of one and the same moment, of a matrix and of a stack."""
    for shape, stacked in (((6, 70), 0), ((3, 6, 70), 1), ((3, 0), 0)):
        found = {}
        for momentum_dtype in (None, dtype):
            given = implementation if 0 not in shape else None
            (p,) = params = parameters(shape)
            optimizer = FusedbunW(params, momentum_dtype=momentum_dtype, stacked=stacked, implementation=given)
            optimizer.record_metrics = True
            run(optimizer, 1)
            found[momentum_dtype] = report(optimizer, ["p"])
            assert p.isfinite().all()
        assert found[None].keys() == found[dtype].keys()
        for key, wanted in found[None].items():
            torch.testing.assert_close(found[dtype][key], wanted, rtol=near, atol=near, msg=key)
