"""The formulas of the optimizers, written again in plain torch, give the classes' numbers."""

import math

import pytest
import torch
from makers import EVERY_SHAPE, SM3_CHAIN, assert_same, gradient, parameters

from fusedbun import SM3, ChainOptimizer, Fusedbun


def others(k, i):
    return [j for j in range(k) if j != i]


def fusedbun_step(p, g, state, lr, eps, beta, decay, momentum, centralize, use_rms, nesterov, clip, lagged):
    k, old, m = p.ndim, *state
    u = g - g.mean(tuple(range(1, k)), keepdim=True) if centralize and k > 1 else g
    u = u * (u.abs() > eps)
    means = [(u * u).mean(others(k, i), keepdim=True) for i in range(k)] if k > 1 else [u * u]
    new = [beta * a + (1 - beta) * mean for a, mean in zip(old, means, strict=True)]
    known = old if lagged and k > 1 else new
    c = known[0].mean()
    nu = new[0] * math.prod(a / c if c != 0 else 1.0 for a in known[1:])
    nu = nu.maximum((1 - beta) * u * u) if lagged and k > 1 else nu
    u = u / (nu.sqrt() + eps) if use_rms else u
    u = u / max(1.0, (u * u).mean().sqrt().item() / clip) if clip else u
    m = momentum * m + u
    u = momentum * m + u if nesterov else m
    return p - lr * (u + decay * p), (new, m)


def sm3_step(p, g, state, lr, beta, eps, momentum):
    k, old, m = p.ndim, *state
    nu = beta * torch.stack([a.expand_as(p) for a in old]).amin(0) + (1 - beta) * g * g
    new = [torch.maximum(a, nu.amax(others(k, i), keepdim=True) if k > 1 else nu) for i, a in enumerate(old)]
    m = momentum * m + (1 - momentum) * g / (nu + eps).sqrt()
    return p - lr * m, (new, m)


def sm3_of_means_step(p, g, state, lr, beta, eps, momentum):
    k, old, m = p.ndim, *state
    means = [(g * g).mean(others(k, i), keepdim=True) for i in range(k)] if k > 1 else [g * g]
    new = [beta * a + (1 - beta) * mean for a, mean in zip(old, means, strict=True)]
    nu = torch.stack([a.expand_as(p) for a in new]).amin(0)
    m = momentum * m + (1 - momentum) * g / (nu + eps).sqrt()
    return p - lr * m, (new, m)


def start(p):
    """The state at its start: an accumulator of zeros for each axis, and a momentum."""
    axes = [[n if i == j else 1 for j, n in enumerate(p.shape)] for i in range(max(1, p.ndim))]
    return [torch.zeros(shape, dtype=p.dtype) for shape in axes], torch.zeros_like(p)


def follow(optimizer, params, formula, change=lambda g: g):
    """Runs optimizer and formula side by side, and asserts that parameters and state agree after each step."""
    mine, state = [p.detach().clone() for p in params], [start(p.detach()) for p in params]
    for step in range(5):
        for i, p in enumerate(params):
            p.grad = change(gradient(p, step, i))
            mine[i], state[i] = formula(mine[i], p.grad, state[i])
        optimizer.step()
        for p, wanted, (accumulators, m) in zip(params, mine, state, strict=True):
            torch.testing.assert_close(p.detach(), wanted, rtol=1e-12, atol=1e-14)
            slots = optimizer.state[p]
            for i, a in enumerate(accumulators):
                torch.testing.assert_close(slots[f"sm3_accumulate.axis{i}"], a, rtol=1e-12, atol=0.0)
            if "momentum.moment" in slots:
                torch.testing.assert_close(slots["momentum.moment"], m, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("lagged", [False, True])
@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("use_rms", [False, True])
@pytest.mark.parametrize("centralize", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fusedbun_is_its_formula(momentum, centralize, use_rms, nesterov, clip, lagged):
    params = parameters(*EVERY_SHAPE, dtype=torch.float64)
    lr, eps, beta, decay = 0.02, 0.2, 0.7, 0.03  # an eps that masks some elements and shows in the root
    options = {"centralize": centralize, "use_rms": use_rms, "nesterov": nesterov, "lagged": lagged}
    optimizer = Fusedbun(params, lr, eps, beta, decay, momentum, clip_rms=clip, **options, implementation="definition")
    follow(
        optimizer,
        params,
        lambda p, g, state: fusedbun_step(p, g, state, lr, eps, beta, decay, momentum, clip=clip, **options),
    )
    assert all(("momentum.moment" in optimizer.state[p]) == (momentum > 0) for p in params)


def test_fusedbun_defaults_are_the_specification():
    params = parameters(*EVERY_SHAPE, dtype=torch.float64)
    off = {"centralize": False, "use_rms": False, "nesterov": False, "clip": None, "lagged": False}
    follow(
        Fusedbun(params, 0.01, implementation="definition"),
        params,
        lambda *a: fusedbun_step(*a, 0.01, 1e-8, 0.8, 0.01, 0.9, **off),
    )


@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1e12])
def test_fusedbun_is_its_formula_at_every_scale_of_gradients(scale):
    params = parameters(*EVERY_SHAPE, dtype=torch.float64)
    on = {"centralize": True, "use_rms": True, "nesterov": True, "clip": None, "lagged": False}
    optimizer = Fusedbun(params, 0.01, 1e-30, centralize=True, use_rms=True, nesterov=True, implementation="definition")
    follow(
        optimizer,
        params,
        lambda *a: fusedbun_step(*a, 0.01, 1e-30, 0.8, 0.01, 0.9, **on),
        change=lambda g: g * scale,
    )


def test_sm3_is_its_formula():
    params = parameters(*EVERY_SHAPE, dtype=torch.float64)
    follow(
        ChainOptimizer(params, SM3_CHAIN, 0.05, implementation="definition"),
        params,
        lambda *a: sm3_step(*a, 0.05, 0.9, 1e-30, 0.9),
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sm3_of_means_is_its_formula(momentum):
    params = parameters(*EVERY_SHAPE, dtype=torch.float64)
    follow(
        SM3(params, 0.05, momentum, beta=0.95, statistic="mean", implementation="definition"),
        params,
        lambda *a: sm3_of_means_step(*a, 0.05, 0.95, 1e-30, momentum),
    )


@pytest.mark.parametrize("lagged", [False, True])
def test_rows_without_a_gradient_only_decay(lagged):
    """An eps of 0 divides 0 by 0 there, and that is 0."""
    (p,) = parameters((4, 3), dtype=torch.float64)
    optimizer = Fusedbun([p], 0.1, eps=0.0, Lambda=0.5, use_rms=True, lagged=lagged)
    for step in range(3):
        before = p.detach().clone()
        p.grad = gradient(p, step) * torch.tensor([[1.0], [0.0], [1.0], [0.0]])
        optimizer.step()
        assert_same(p.detach()[1::2], before[1::2] - 0.1 * (0.5 * before[1::2]))
        assert p.isfinite().all()
        assert (p.detach()[::2] != before[::2]).all()
