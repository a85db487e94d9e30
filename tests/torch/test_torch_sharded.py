"""DTensors: stepped part by part, a parameter becomes what it becomes in one process, and only vectors are sent."""

from functools import partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
from makers import MAKERS, gradient, parameters
from processes import placed, run_in_processes
from sweeps import sweep
from test_torch_ternary_vote import ternary
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from fusedbun import SM3, DecoupledLionW, Fusedbun, FusedbunW, MupAdamW, TernaryVote
from fusedbun.torch.sharding import placement

# Some leave a process with less than another, or with nothing; of those for codes every block stays whole.
SHAPES = ((), (5,), (7, 6), (1, 33), (6, 4, 3, 3))
IN_BLOCKS = ((), (9,), (7, 128), (2, 256), (5, 4, 32))
ELEMENTWISE = {"scaled-optum", "mup-adam", "mup-adamw", "mup-sgd", "decoupled-lionw"}
EXACT = ELEMENTWISE | {"ternary-vote", "sm3", "sm3-momentum", "chain"}

recommended = partial(Fusedbun, centralize=True, use_rms=True, nesterov=True)
STOCHASTIC = {"stochastic_rounding": True, "seed": 3}
FEWER_BITS = {
    "sm3 rounded": partial(SM3, **STOCHASTIC),
    "sm3 int8": partial(SM3, momentum=0.9, momentum_dtype="int8", **STOCHASTIC),
    "lion int8": partial(DecoupledLionW, momentum_dtype="int8", **STOCHASTIC),
    "lion in the parameter's": partial(DecoupledLionW, momentum_dtype="param"),
    "adam": partial(MupAdamW, mup=lambda path, param: "weight", momentum_dtype="int8", second_moment_dtype="bfloat16"),
    "fusedbunw": FusedbunW,
    "fusedbunw rounded": partial(FusedbunW, **STOCHASTIC),
    "fusedbun int8": partial(recommended, momentum_dtype="int8"),
    "fusedbun int4 rounded": partial(recommended, momentum_dtype="int4", **STOCHASTIC),
}
EXACT_IN_FEWER_BITS = {"sm3 rounded", "sm3 int8", "lion int8", "lion in the parameter's", "adam"}

# By the number of processes, the mesh and how its dimensions cut a parameter.
CUTS = {
    2: {"rows": ((2,), (Shard(0),)), "columns": ((2,), (Shard(1),)), "replicated": ((2,), (Replicate(),))},
    4: {
        "rows": ((4,), (Shard(0),)),
        "rows twice": ((2, 2), (Shard(0), Shard(0))),
        "replicated rows": ((2, 2), (Replicate(), Shard(0))),
        "rows and columns": ((2, 2), (Shard(0), Shard(1))),
    },
}


def cut_up(mesh, placements, x):
    """A tensor in parts; where it lacks an axis to be cut along, it is whole."""
    return placed(x, mesh, [p if not p.is_shard() or p.dim < x.ndim else Replicate() for p in placements])


def stepped(make, shapes, dtype, split, steps):
    is_ternary = make.keywords.get("threshold") if isinstance(make, partial) else None
    values = (ternary if is_ternary else parameters)(*shapes, dtype=dtype)
    params = [split(p.detach()).requires_grad_() for p in values]
    optimizer = make([(f"p{i}", p) for i, p in enumerate(params)], **({} if is_ternary else {"lr": 0.01}))
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = split(gradient(torch.empty(shapes[i], dtype=dtype), step, i))
        optimizer.step()
    return params, optimizer


def compare(found, wanted, is_exact, message):
    """Compares a part, or what every process has, with that of the whole."""
    if isinstance(found, DTensor):
        at = placement.cut(found)
        wanted = wanted[tuple(slice(f, f + n) for f, n in zip(at.first, at.shape, strict=True))]
        found = found.to_local()
    if is_exact or not wanted.is_floating_point():
        if not torch.equal(found, wanted):
            same = (found == wanted).double().mean().item()
            assert same > (1 if is_exact else 0.98), f"{message}: {same:.3f} of the numbers are the same"
    elif wanted.dtype == torch.bfloat16:
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2, msg=lambda text: f"{message}: {text}")
    else:
        tolerance = 1e-12 if wanted.dtype == torch.float64 else 2e-4
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance, msg=lambda text: f"{message}: {text}")


def everything(rank, count, cases, steps):
    failures = []
    for title, (sizes, placements) in CUTS[count].items():
        mesh = init_device_mesh("cpu", sizes)
        split = partial(cut_up, mesh, placements)
        for name, make, shapes, dtype, is_exact in cases():
            message = f"{name}, {dtype}, {title}"
            try:
                params, optimizer = stepped(make, shapes, dtype, split, steps)
                whole, reference = stepped(make, shapes, dtype, torch.clone, steps)
                for i, (p, q) in enumerate(zip(params, whole, strict=True)):
                    compare(p.detach(), q.detach(), is_exact, f"{message}, {shapes[i]}")
                    ours, theirs = optimizer.state[p], reference.state[q]
                    assert ours.keys() == theirs.keys(), message
                    for key, x in theirs.items():
                        compare(ours[key], x, is_exact, f"{message}, {key} of {shapes[i]}")
            except AssertionError as error:
                failures.append(str(error))
    return failures


def few():
    """A maximum and a mean, without codes and with them, by tiles; and a kernel."""
    for name in ("sm3-momentum", "fusedbun-recommended"):
        yield name, partial(MAKERS[name], implementation="tiles"), SHAPES, torch.float32, name in EXACT
    for name in ("sm3 int8", "fusedbun int4 rounded"):
        make = partial(FEWER_BITS[name], implementation="tiles")
        yield name, make, IN_BLOCKS, torch.bfloat16, name in EXACT_IN_FEWER_BITS
    yield "sm3-momentum", MAKERS["sm3-momentum"], ((7, 6),), torch.float32, True


def in_blocks():
    for name, make in {**MAKERS, "ternary-vote": partial(TernaryVote, threshold=2)}.items():
        for dtype in (torch.float32, torch.float64):
            yield name, partial(make, implementation="tiles"), SHAPES, dtype, name in EXACT


def in_fewer_bits_in_blocks():
    for name, make in FEWER_BITS.items():
        yield name, partial(make, implementation="tiles"), IN_BLOCKS, torch.bfloat16, name in EXACT_IN_FEWER_BITS


def in_kernels():
    """Few, for a kernel of every phase, number of axes and way of cutting takes seconds to compile."""
    for name in ("sm3-momentum", "fusedbun-recommended", "decoupled-lionw"):
        yield name, MAKERS[name], ((5,), (7, 6)), torch.float32, name in EXACT
    for name in ("sm3 int8", "fusedbun int4 rounded"):
        yield name, FEWER_BITS[name], ((7, 128),), torch.bfloat16, name in EXACT_IN_FEWER_BITS


def every_kernel():
    for name, make in MAKERS.items():
        yield name, make, SHAPES, torch.float32, name in EXACT
    for name, make in FEWER_BITS.items():
        yield name, make, IN_BLOCKS, torch.bfloat16, name in EXACT_IN_FEWER_BITS


@sweep(
    ("count", "cases", "steps"),
    [(2, few, 3), *product(CUTS, (in_blocks, in_fewer_bits_in_blocks, in_kernels, every_kernel), (20,))],
    short=lambda count, cases, steps: cases is few,
)
def test_several_processes_do_what_one_does(count, cases, steps, tmp_path):
    """Maxima to the bit, means to rounding; noise and codes are those of the whole."""
    for failures in run_in_processes(count, everything, tmp_path, count, cases, steps):
        assert not failures, "\n".join(failures[:20])


# What is sent


class Counted:
    """Counts the collectives of a step, and the bytes that a process puts into them."""

    def __init__(self, monkeypatch):
        self.calls, self.bytes = 0, 0
        for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather", "broadcast"):
            monkeypatch.setattr(dist, name, self.counting(getattr(dist, name)))

    def counting(self, collective):
        def counted(x, *args, **kwargs):
            self.calls += 1
            self.bytes += x.numel() * x.element_size()
            return collective(x, *args, **kwargs)

        return counted


def sent(make, shapes, sizes, placements):
    with pytest.MonkeyPatch.context() as monkeypatch:
        mesh = init_device_mesh("cpu", sizes)
        split = partial(cut_up, mesh, placements)
        _, optimizer = stepped(make, shapes, torch.float32, split, steps=1)
        counted = Counted(monkeypatch)
        optimizer.step()
    return counted.calls, counted.bytes


def what_is_sent(rank, count):
    few, many = [(64, 32), (40,), (16, 8, 3, 3)], [(64, 32), (40,), (16, 8, 3, 3)] * 9
    found = {}
    for title, (sizes, placements) in CUTS[count].items():
        for name in MAKERS:
            make = partial(MAKERS[name], implementation="tiles")
            found[title, name] = [sent(make, shapes, sizes, placements) for shapes in (few, many[:27])]
    return found


@pytest.mark.long
@pytest.mark.parametrize("count", CUTS)
def test_only_vectors_are_sent_in_a_number_of_calls_that_no_parameter_adds_to(count, tmp_path):
    along_axes = 4 * (64 + 32 + 40 + 16 + 8 + 3 + 3)
    (found, *_) = run_in_processes(count, what_is_sent, tmp_path, count)
    for (title, name), ((calls, sent_bytes), (calls_of_many, bytes_of_many)) in found.items():
        assert calls_of_many == calls <= 6, (title, name)
        assert bytes_of_many == 9 * sent_bytes, (title, name)
        assert sent_bytes <= 4 * along_axes, (title, name)
        if name in ELEMENTWISE or title == "replicated":
            assert calls == 0, (title, name)
