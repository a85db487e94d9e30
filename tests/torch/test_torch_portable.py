"""Portable state of DTensors: gathered array by array, written by one process, loaded by all for their own parts."""

from functools import partial

import pytest
import torch
from makers import gradient, parameters
from processes import placed, run_in_processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import fusedbun
from fusedbun import SM3

SHAPES = ((5,), (7, 64), (6, 4, 3, 3))
MAKE = partial(SM3, lr=0.01, momentum=0.9, momentum_dtype="int8", stochastic_rounding=True)


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def begun(split, steps):
    params = [split(p.detach()).requires_grad_() for p in parameters(*SHAPES, dtype=torch.bfloat16)]
    optimizer = MAKE([(f"p{i}", p) for i, p in enumerate(params)])
    stepped(params, optimizer, split, steps)
    return params, optimizer


def stepped(params, optimizer, split, steps):
    for step in steps:
        for i, p in enumerate(params):
            p.grad = split(gradient(torch.empty(SHAPES[i], dtype=torch.bfloat16), step, i))
        optimizer.step()


def in_processes(rank, folder):
    mesh = init_device_mesh("cpu", (2,))
    split = lambda x: placed(x, mesh, [Shard(0)])  # noqa: E731
    params, optimizer = begun(split, range(3))
    fusedbun.save_state(optimizer, f"{folder}/sharded")
    copies = [p.detach().clone().requires_grad_() for p in params]
    other = MAKE([(f"p{i}", p) for i, p in enumerate(copies)])
    fusedbun.load_state(other, f"{folder}/whole")
    stepped(copies, other, split, range(3, 6))
    error = None
    try:
        fusedbun.save_state(optimizer, f"{folder}/no/such/folder")
    except OSError as caught:
        error = str(caught)
    return [whole(p.detach()) for p in copies], error


@pytest.mark.long
def test_sharded_state_is_saved_and_loaded(tmp_path):
    params, optimizer = begun(torch.clone, range(3))
    fusedbun.save_state(optimizer, tmp_path / "whole")
    results = run_in_processes(2, in_processes, tmp_path, str(tmp_path))
    assert (tmp_path / "sharded").read_bytes() == (tmp_path / "whole").read_bytes()
    stepped(params, optimizer, torch.clone, range(3, 6))
    for found, error in results:
        assert "such" in error
        for p, q in zip(params, found, strict=True):
            torch.testing.assert_close(q, p.detach(), rtol=0, atol=0)


def test_sparse_rows_are_saved_and_loaded(tmp_path):
    table = torch.nn.Embedding(10, 3, sparse=True)
    optimizer = SM3(table.named_parameters(), lr=0.1)
    table(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    fusedbun.save_state(optimizer, tmp_path / "a")
    other = SM3(table.named_parameters(), lr=0.1)
    fusedbun.load_state(other, tmp_path / "a")
    ours, theirs = optimizer.state[table.weight], other.state[table.weight]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("release", [False, True])
def test_what_was_prepared_for_a_step_is_prepared_anew(release, tmp_path):
    """A step after loading is that of the loaded state, though the optimizer has stepped before."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = SM3(model.named_parameters(), lr=0.1, momentum=0.9)

    def step(scale):
        optimizer.zero_grad()
        (scale * model(torch.ones(2, 4)).square()).sum().backward()
        optimizer.step()

    handle = fusedbun.release_gradients(model, optimizer) if release else None
    step(1.0)
    fusedbun.save_state(optimizer, tmp_path / "a")
    values = [p.detach().clone() for p in model.parameters()]
    step(2.0)
    wanted = [p.detach().clone() for p in model.parameters()]
    step(3.0)
    with torch.no_grad():
        for p, value in zip(model.parameters(), values, strict=True):
            p.copy_(value)
    fusedbun.load_state(optimizer, tmp_path / "a")
    step(2.0)
    for p, value in zip(model.parameters(), wanted, strict=True):
        assert torch.equal(p, value)
    assert (handle is None) or optimizer.gradient_release is handle
