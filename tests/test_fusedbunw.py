"""FusedbunW: its formula, written apart in NumPy, what it shares with AdamW, and what a step of it costs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import fusedbun_jax as fj
from fusedbun import FusedbunW, Signal, namespace, recipes
from fusedbun.compiler import schedule, trace
from fusedbun.reference import Reference
from fusedbun.transforms import Clip

SHAPES = {"scalar": (), "vector": (7,), "matrix": (5, 8), "cube": (3, 4, 5), "kernel": (6, 2, 3, 3), "row": (1, 9)}
STEPS = 6
LR, EPS, DECAY = 0.02, 1e-3, 0.1
SETTINGS = {
    "default": {},
    "plain": {"nesterov": False, "lagged": False, "clip": None},
    "clipped": {"clip": 0.8, "lagged": False},
    "without momentum": {"betas": (0.0, 0.9)},
}


def by_numpy(p, grads, betas=(0.9, 0.999), nesterov=True, lagged=True, clip=10.0):
    """Steps of one parameter, in float64."""
    beta1, beta2 = betas
    k = max(1, p.ndim)
    axes = [np.zeros([n if i == j else 1 for j, n in enumerate(p.shape)]) for i in range(k)]
    m = np.zeros(p.shape)
    for t, g in enumerate(grads, 1):
        s, before = g * g, axes
        means = [s.mean(tuple(j for j in range(k) if j != i), keepdims=True) if k > 1 else s for i in range(k)]
        axes = [beta2 * a + (1 - beta2) * mean for a, mean in zip(axes, means, strict=True)]
        nu = axes[0] / (1 - beta2**t)
        for i in range(1, k):
            seen = before if lagged else axes
            c = seen[i].mean()
            nu = nu * (seen[i] / c if c else 1.0)
        if lagged and k > 1:
            nu = np.maximum(nu, (1 - beta2) * s)
        u = g / (np.sqrt(nu) + EPS)
        if clip is not None:
            u = np.clip(u, -clip, clip)
        m = beta1 * m + (1 - beta1) * u
        mean = beta1 * m / (1 - beta1 ** (t + 1)) + (1 - beta1) * u / (1 - beta1**t) if nesterov else m / (1 - beta1**t)
        p = p - LR * (mean + DECAY * p)
    return p


def problem():
    rng = np.random.default_rng(3)
    params = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    scale = [10.0 ** rng.uniform(-2, 2) for _ in range(STEPS)]
    return params, [{name: s * rng.standard_normal(shape) for name, shape in SHAPES.items()} for s in scale]


def with_torch(params, steps, **given):
    tensors = {name: torch.nn.Parameter(torch.tensor(p)) for name, p in params.items()}
    optimizer = FusedbunW(tensors.items(), lr=LR, eps=EPS, weight_decay=DECAY, momentum_dtype=None, **given)
    for grads in steps:
        for name, p in tensors.items():
            p.grad = torch.tensor(grads[name])
        optimizer.step()
    return {name: p.detach().numpy() for name, p in tensors.items()}


def with_optax(params, steps, betas=(0.9, 0.999), **given):
    tx = fj.fusedbunw(LR, *betas, eps=EPS, weight_decay=DECAY, momentum_dtype=None, **given)
    p = {name: jnp.asarray(x) for name, x in params.items()}
    state, update = tx.init(p), jax.jit(tx.update)
    for grads in steps:
        updates, state = update({name: jnp.asarray(g) for name, g in grads.items()}, state, p)
        p = optax.apply_updates(p, updates)
    return p


def with_numpy(params, steps, **given):
    return Reference(params, recipes.fusedbunw(eps=EPS, weight_decay=DECAY, momentum_dtype=None, **given), LR).run(
        steps
    )


@pytest.mark.parametrize("run", [with_numpy, with_torch, with_optax])
@pytest.mark.parametrize("name", SETTINGS)
def test_is_its_formula_in_double_precision(run, name, x64):
    params, steps = problem()
    found = run(params, steps, **SETTINGS[name])
    for key, p in params.items():
        want = by_numpy(p, [grads[key] for grads in steps], **SETTINGS[name])
        np.testing.assert_allclose(np.asarray(found[key]), want, rtol=1e-12, atol=1e-12, err_msg=key)


@pytest.mark.parametrize("name", ["matrix", "cube"])
def test_the_channel_axis_is_that_of_the_layout_turned_round(name):
    params, steps = problem()
    turned = {"p": params[name].T}, [{"p": grads[name].T} for grads in steps]
    want = by_numpy(params[name], [grads[name] for grads in steps])
    np.testing.assert_allclose(with_numpy(*turned, channel_axis=-1)["p"].T, want, rtol=1e-12, atol=1e-12)
    assert np.abs(with_numpy(*turned)["p"].T - want).max() > 1e-6


@pytest.mark.parametrize("beta2", [0.9, 0.999])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_on_vectors_without_momentum_it_is_adamw(beta2, decay):
    rng = np.random.default_rng(0)
    start, steps = rng.standard_normal(50).astype(np.float32), rng.standard_normal((20, 50)).astype(np.float32)
    ours, theirs = (torch.nn.Parameter(torch.tensor(start)) for _ in range(2))
    plain = {"nesterov": False, "clip": None}
    one = FusedbunW([ours], 0.01, (0.0, beta2), weight_decay=decay, **plain)
    other = torch.optim.AdamW([theirs], 0.01, (0.0, beta2), weight_decay=decay)
    txs = fj.fusedbunw(0.01, 0.0, beta2, weight_decay=decay, **plain), optax.adamw(0.01, 0.0, beta2, weight_decay=decay)
    in_optax, states = [jnp.asarray(start)] * 2, [tx.init(jnp.asarray(start)) for tx in txs]
    updating = [jax.jit(tx.update) for tx in txs]
    for g in steps:
        for p, optimizer in ((ours, one), (theirs, other)):
            p.grad = torch.tensor(g)
            optimizer.step()
        for i, update in enumerate(updating):
            updates, states[i] = update(jnp.asarray(g), states[i], in_optax[i])
            in_optax[i] = optax.apply_updates(in_optax[i], updates)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(*in_optax, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(in_optax[0], theirs.detach().numpy(), rtol=1e-6, atol=1e-6)


MASKS = {
    "tree": {"a": {"kernel": True, "bias": False}, "b": {"kernel": False}},
    "prefix": {"a": True, "b": False},
    "function": lambda params: jax.tree.map(lambda x: x.size > 4, params),
    "nobody": False,
}


@pytest.mark.parametrize("how", ["update", "step"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_the_mask_leaves_out_what_optaxs_does(mask, how):
    params = {"a": {"kernel": jnp.arange(6.0) + 1, "bias": jnp.ones(3)}, "b": {"kernel": jnp.arange(4.0) - 9}}
    given = {"weight_decay": 0.5, "mask": mask}
    ours = fj.fusedbunw(0.01, 0.0, 0.9, nesterov=False, clip=None, **given)
    theirs = optax.adamw(0.01, 0.0, 0.9, **given)
    p, q = params, params
    state, other = ours.init(p), theirs.init(q)
    for _ in range(3):
        grads = jax.tree.map(jnp.cos, q)
        if how == "step":
            p, state = jax.jit(ours.step)(grads, state, p)
        else:
            updates, state = jax.jit(ours.update)(grads, state, p)
            p = optax.apply_updates(p, updates)
        updates, other = theirs.update(grads, other, q)
        q = optax.apply_updates(q, updates)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), p, q)


def test_a_mask_that_leaves_a_parameter_unsaid_is_refused():
    tx = fj.fusedbunw(0.1, mask={"a": True})
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    with pytest.raises(ValueError, match="the mask says nothing of 'b'"):
        tx.init(params)
    with pytest.raises(TypeError, match="the mask must be a tree of True and False, but it holds 'kernel'"):
        fj.fusedbunw(0.1, mask="kernel").init(params)


def test_groups_of_others_keep_what_they_say_and_decay_by_themselves():
    """As Hugging Face's Trainer and timm make them."""
    decays, spared = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    groups = [
        {"params": [decays], "weight_decay": 0.5, "lr_scale": 0.25},
        {"params": [spared], "weight_decay": 0.0, "lr": 0.02},
    ]
    optimizer = FusedbunW(groups, lr=0.1)
    for p in (decays, spared):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert optimizer.param_groups[0]["lr_scale"] == 0.25
    torch.testing.assert_close(decays.detach(), torch.full((4, 3), 1 - 0.1 * 0.5))
    assert torch.equal(spared.detach(), torch.ones(4, 3))


def test_one_counter_serves_both_corrections_and_the_noise():
    p = torch.nn.Parameter(torch.ones(8, 64, dtype=torch.bfloat16))
    optimizer = FusedbunW([p], stochastic_rounding=True)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert [key for key, x in optimizer.state[p].items() if x.numel() == 1] == ["step"]
    assert optimizer.state[p]["step"].item() == 3
    tx = fj.fusedbunw(0.1, stochastic_rounding=True)
    state = tx.init(jnp.ones((8, 64), jnp.bfloat16))
    assert [x.dtype.name for x in jax.tree.leaves(state) if "int" in x.dtype.name and x.size == 1] == ["int32"]


def test_a_state_without_its_counter_is_refused():
    p = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = FusedbunW([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    del optimizer.state[p]["step"]
    before = p.detach().clone()
    with pytest.raises(ValueError, match="for sm3_accumulate, but 'step' is missing"):
        optimizer.step()
    assert torch.equal(p.detach(), before)


BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "uint8": 1}


@pytest.mark.parametrize(
    ("dtype", "momentum_dtype", "at_most"),
    [("float32", "int8", 14.1), ("bfloat16", "int8", 8.1), ("float32", "int4", 13.2), ("bfloat16", "int4", 7.2)],
)
def test_a_step_goes_over_memory_once(dtype, momentum_dtype, at_most):
    """What a step reads and writes, for each element of a matrix that is large."""
    program = trace(recipes.fusedbunw(momentum_dtype=momentum_dtype), 2, dtype=dtype)
    assert len(schedule(program).passes) == 1
    shape = (4096, 4096)
    state = sum(math.prod(x.shape(shape)) * BYTES.get(x.dtype, 4) for x in program.arrays.values())
    moved = 3 * BYTES[dtype] + 2 * state / math.prod(shape)  # the gradient is read, all else is read and written
    assert moved <= at_most


@pytest.mark.parametrize(("momentum_dtype", "at_most"), [("int8", 1.06), ("int4", 0.57), (None, 4.01)])
def test_the_state_of_a_matrix(momentum_dtype, at_most):
    p = torch.nn.Parameter(torch.zeros(1024, 1024))
    p.grad = torch.ones_like(p)
    given = {} if momentum_dtype == "int8" else {"momentum_dtype": momentum_dtype}
    optimizer = FusedbunW([p], **given)
    optimizer.step()
    assert sum(x.nbytes for x in optimizer.state[p].values()) / p.numel() <= at_most


def test_clip_keeps_nan():
    u = np.array([-np.inf, -3.0, 0.5, np.nan, np.inf])
    found = Clip(2.0).update(namespace, Signal(u), {}, u)[0].update
    np.testing.assert_array_equal(found, [-2.0, -2.0, 0.5, np.nan, 2.0])
