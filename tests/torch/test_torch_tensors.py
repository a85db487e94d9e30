"""Tensors of every kind: shapes, strides, precisions, empty ones, and numbers that are not finite."""

import math

import pytest
import torch
from makers import (
    EVERY_SHAPE,
    MAKERS,
    SHAPES,
    assert_same,
    assert_same_run,
    copies,
    every_optimizer,
    floating,
    full_size,
    gradient,
    parameters,
    run,
    set_gradients,
    sweep_of_dtypes,
    sweep_of_optimizers,
)
from sweeps import only, sweep

from fusedbun import ChainOptimizer, DecoupledLionW, Fusedbun, ScaledOptum
from fusedbun.transforms import Momentum, SM3Accumulate

LOW = [torch.bfloat16, torch.float16]


# Shapes and strides


@sweep("name", MAKERS, short=only("fusedbun-recommended", "sm3-momentum", "mup-adam"))
def test_every_number_of_axes_is_stepped(name):
    make = MAKERS[name]
    params = parameters(*EVERY_SHAPE)
    optimizer = make(params, lr=0.1)
    for step in range(3):
        before = [p.detach().clone() for p in params]
        run(optimizer, range(step, step + 1))
        assert all((p != b).any() and p.isfinite().all() for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)])
@every_optimizer
def test_an_empty_parameter_is_no_trouble_to_the_others(make, shape):
    empty, params = torch.zeros(shape, requires_grad=True), parameters((4, 3))
    optimizer, wanted = make([empty, *params], lr=0.1), make(copies(params), lr=0.1)
    for step in range(2):
        empty.grad, params[0].grad = torch.zeros(shape), gradient(params[0], step)
        optimizer.step()
        run(wanted, range(step, step + 1))
    assert_same(params[0].detach(), wanted.param_groups[0]["params"][0].detach())
    assert empty.shape == shape
    resumed = make([empty, *copies(params)], lr=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    assert_same_run(resumed, optimizer)


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "strided": lambda x: x.repeat_interleave(2, 0)[::2],
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("of", ["parameter", "gradient", "both"])
@pytest.mark.parametrize("layout", LAYOUTS)
@sweep_of_optimizers
def test_strides_change_nothing(make, layout, of):
    """Equal numbers in any layout give equal numbers, and the full-size state has the parameter's own."""
    arrange, (plain,) = LAYOUTS[layout], parameters((2, 3, 4, 5))
    param = (plain if of == "gradient" else arrange(plain)).detach().requires_grad_()
    assert_same(param.detach(), plain.detach())
    optimizer, wanted = make([param], lr=0.1), make([plain], lr=0.1)
    strides = param.stride()
    for step in range(3):
        plain.grad = gradient(plain, step)
        param.grad = plain.grad.clone() if of == "parameter" else arrange(plain.grad)
        assert of == "parameter" or not param.grad.is_contiguous()
        optimizer.step()
        wanted.step()
    torch.testing.assert_close(param.detach(), plain.detach(), rtol=1e-5, atol=1e-6)
    assert param.stride() == strides
    if layout in ("transposed", "channels_last"):
        assert all(value.stride() == strides for value in full_size(optimizer, param))


@every_optimizer
def test_an_expanded_gradient(make):
    """One number in memory for all elements."""
    p, q = parameters((4, 3)) + parameters((4, 3))
    optimizer, wanted = make([p], lr=0.1), make([q], lr=0.1)
    p.grad, q.grad = torch.ones(1).expand(4, 3), torch.ones(4, 3)
    assert p.grad.stride() == (0, 0)
    for _ in range(2):
        optimizer.step()
        wanted.step()
    assert_same_run(optimizer, wanted)


# Precisions


@sweep_of_optimizers
def test_precisions_mix_in_one_group(make):
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    params = [p for dtype in dtypes for p in parameters((4, 3), dtype=dtype)]
    alone = copies(params)
    together, optimizers = make(params, lr=0.1), [make([p], lr=0.1) for p in alone]
    for step in range(3):
        for p, q in zip(params, alone, strict=True):
            p.grad = gradient(p, step)
            q.grad = gradient(q, step)
        for optimizer in (together, *optimizers):
            optimizer.step()
    assert [p.dtype for p in params] == dtypes
    assert_same([p.detach() for p in params], [p.detach() for p in alone])
    for p, dtype in zip(params, dtypes, strict=True):
        wanted = torch.float64 if dtype == torch.float64 else torch.float32
        assert all(value.dtype == wanted for value in floating(together.state[p]))


@sweep_of_dtypes(LOW)
def test_smaller_precisions_are_computed_in_float32_and_rounded_once(make, dtype):
    """Step by step as a float32 optimizer whose parameters are rounded after each step, in its full-size state too."""
    params = parameters(*SHAPES, dtype=dtype)
    single = [p.detach().float().requires_grad_() for p in params]
    optimizer, wanted = make(params, lr=0.1), make(single, lr=0.1)
    for step in range(6):
        set_gradients(params, step)
        for p, q in zip(params, single, strict=True):
            q.grad = p.grad.float()
        optimizer.step()
        wanted.step()
        for p, q in zip(params, single, strict=True):
            assert (q != q.to(dtype).float()).any() or q.numel() < 6  # there is something to round
            q.data.copy_(q.to(dtype))
            assert_same(p.detach(), q.detach().to(dtype))
            assert_same(optimizer.state[p], wanted.state[q])


@pytest.mark.parametrize("dtype", LOW)
def test_smaller_precisions_are_the_formula_in_float64_rounded(dtype):
    """Almost every element is the exact result rounded once; the rest, ties to float32's eyes, are its neighbour."""
    (p,) = parameters((64, 32), dtype=dtype)
    optimizer, g = Fusedbun([p], 0.1, use_rms=True), gradient(p, 0)
    old, exact = p.detach().double(), g.double()
    rows, columns = (0.2 * (exact**2).mean(axis, keepdim=True) for axis in (1, 0))
    scaled = exact / ((rows * columns / rows.mean()).sqrt() + 1e-8)
    p.grad = g
    optimizer.step()
    wanted = (old - 0.1 * (scaled + 0.01 * old)).to(dtype)
    assert (p.detach() == wanted).double().mean() > 0.99
    torch.testing.assert_close(p.detach(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", LOW)
def test_accumulators_of_smaller_precisions_keep_growing(dtype):
    """A running sum in bfloat16 stops after a few hundred equal increments; theirs is float32."""
    param = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    optimizer = ChainOptimizer([param], [SM3Accumulate()], lr=0.0)
    for _ in range(1000):
        param.grad = torch.full((2, 3), 0.5, dtype=dtype)
        optimizer.step()
    assert_same(optimizer.state[param]["sm3_accumulate.axis0"], torch.full((2, 1), 250.0))


# Numbers that are not finite


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@every_optimizer
def test_what_is_not_finite_shows_in_its_own_parameter_only(make, value):
    for bad in range(len(SHAPES)):
        params = parameters(*SHAPES)
        optimizer, wanted = make(params, lr=0.1), make(copies(params), lr=0.1)
        clean = wanted.param_groups[0]["params"]
        for step in range(3):
            set_gradients(params, step)
            set_gradients(clean, step)
            if step == 1:
                params[bad].grad.view(-1)[0] = value
            optimizer.step()
            wanted.step()
        for i, (p, q) in enumerate(zip(params, clean, strict=True)):
            if i == bad:
                takes_signs = isinstance(optimizer, (ScaledOptum, DecoupledLionW))  # and an infinity has one
                assert bool(p.flatten()[0].isfinite()) == (takes_signs and abs(value) == torch.inf)
                assert not any(kept.isfinite().all() for kept in floating(optimizer.state[p]))
            else:
                assert_same(p.detach(), q.detach())
                assert_same(optimizer.state[p], wanted.state[q])


# Memory


def bytes_of(optimizer):
    """The bytes of memory that hold the state, each counted once."""
    storages = [value.untyped_storage() for slots in optimizer.state.values() for value in slots.values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def declared_bytes(optimizer):
    (group,) = optimizer.param_groups
    chain, each = optimizer.chain(group), {"float64": 8, "float32": 4, "int32": 4}
    arrays = [(p, x) for p in group["params"] for x in chain.arrays(p.shape, str(p.dtype).split(".")[1]).values()]
    return sum(math.prod(x.shape(p.shape)) * each[x.dtype] for p, x in arrays)


@sweep_of_dtypes((torch.float64, torch.float32, torch.bfloat16))
def test_state_takes_the_bytes_that_its_slots_declare(make, dtype):
    optimizer = make(parameters((40, 30), (6, 5, 4), (7,), (), dtype=dtype), lr=0.1)
    assert bytes_of(optimizer) == 0
    run(optimizer, 2)
    assert bytes_of(optimizer) == declared_bytes(optimizer)


@sweep("use_rms", [False, True], short=only(False))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fusedbun_keeps_one_vector_per_axis_and_with_momentum_one_array(dtype, use_rms):
    shapes, vectors = [(40, 30), (6, 5, 4), (7,), ()], 40 + 30 + 6 + 5 + 4 + 7 + 1
    full = 1200 + 120 + 7 + 1
    for momentum, numbers in ((0.0, vectors), (0.9, vectors + full)):
        params = parameters(*shapes, dtype=dtype)
        optimizer = Fusedbun(params, 0.1, momentum_beta=momentum, use_rms=use_rms)
        run(optimizer, 2)
        assert bytes_of(optimizer) == 4 * numbers
        sizes = [[v.numel() for k, v in optimizer.state[p].items() if "accumulate" in k] for p in params]
        assert sizes == [[40, 30], [6, 5, 4], [7], [1]]


def test_a_chain_without_state_keeps_none():
    params = parameters(*SHAPES)
    optimizer = ChainOptimizer(params, [Momentum(0.0)], lr=0.1)
    run(optimizer, 2)
    assert bytes_of(optimizer) == 0
    assert optimizer.state_dict()["state"] == {index: {} for index in range(len(params))}
