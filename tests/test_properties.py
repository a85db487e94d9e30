"""Over shapes, dtypes and hyper-parameters that hypothesis finds: the realisations agree, and nothing leaks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes
from sweeps import only, sweep

import fusedbun
import fusedbun_jax
from fusedbun import recipes
from fusedbun.reference import Reference

unit = st.floats(0, 0.99)
shapes = st.just(()) | array_shapes(max_dims=5, max_side=6)
hyperparameters = st.fixed_dictionaries(
    {
        "eps": st.sampled_from([1e-8, 1e-4, 0.3]),
        "beta_decay": unit,
        "Lambda": st.floats(0, 1),
        "momentum_beta": st.just(0.0) | unit,
        "centralize": st.booleans(),
        "use_rms": st.booleans(),
        "nesterov": st.booleans(),
        "clip_rms": st.none() | st.floats(0.01, 10),
        "lagged": st.booleans(),
    }
)
seeds = st.integers(0, 2**32 - 1)


def found(few, many, *strategies):
    """Tests a property of what hypothesis draws from the strategies: of so many in `make test-long`."""

    def tested(holds):
        @sweep("count", [few, many], short=only(few))
        def test(count):
            settings(max_examples=count)(given(*strategies)(holds))()

        test.__doc__ = holds.__doc__
        return test

    return tested


def problem(shape, seed, steps=3):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape), [{"p": rng.standard_normal(shape)} for _ in range(steps)]


def by_torch(param, steps, lr, dtype, hyper):
    p = torch.nn.Parameter(torch.tensor(param, dtype=dtype))
    optimizer = fusedbun.Fusedbun([p], lr, **hyper)
    for grads in steps:
        p.grad = torch.tensor(grads["p"], dtype=dtype)
        optimizer.step()
    return p.detach().double().numpy()


def by_optax(param, steps, lr, dtype, hyper):
    tx = fusedbun_jax.fusedbun(lr, **hyper)
    p = jnp.asarray(param, dtype)
    state = tx.init(p)
    for grads in steps:
        updates, state = tx.update(jnp.asarray(grads["p"], dtype), state, p)
        p = optax.apply_updates(p, updates)
    return np.asarray(p, np.float64)


@found(2, 30, shapes, seeds, hyperparameters, st.floats(1e-3, 1))
def test_the_realisations_agree_in_float64(shape, seed, hyper, lr):
    param, steps = problem(shape, seed)
    want = Reference({"p": param}, recipes.fusedbun(**hyper), lr).run(steps)["p"]
    largest = np.abs(want - param).max() or 1.0
    with jax.enable_x64(True):
        got = by_optax(param, steps, lr, "float64", hyper)
    assert np.abs(got - want).max() <= 1e-12 * largest
    assert np.abs(by_torch(param, steps, lr, torch.float64, hyper) - want).max() <= 1e-12 * largest


@found(3, 30, shapes, seeds, hyperparameters, st.sampled_from(["float32", "bfloat16", "float16"]))
def test_torch_and_optax_agree_in_lower_precision(shape, seed, hyper, dtype):
    param, steps = problem(shape, seed)
    hyper = {**hyper, "eps": 1e-8, "centralize": hyper["centralize"] and len(shape) > 1 and min(shape) > 2}
    left = by_torch(param, steps, 0.01, getattr(torch, dtype), hyper)
    right = by_optax(param, steps, 0.01, dtype, hyper)
    size = max(np.abs(param).max(), np.abs(left).max())
    assert np.abs(left - right).max() <= 2 * torch.finfo(getattr(torch, dtype)).eps * size * len(steps)


@found(2, 15, array_shapes(min_dims=2, max_dims=4, max_side=6), seeds, st.floats(-1e3, 1e3))
def test_rows_without_a_residual_stay_finite_and_bounded(shape, seed, value):
    """Centralizing a constant row leaves rounding noise, which frameworks round apart and rms_scale lifts."""
    rng = np.random.default_rng(seed)
    param = rng.standard_normal(shape)
    rows = value * rng.standard_normal((shape[0],) + (1,) * (len(shape) - 1))
    steps = [{"p": np.broadcast_to(rows, shape)}] * 3
    hyper = {"centralize": True, "use_rms": True, "nesterov": True, "Lambda": 0.0}
    bound = 3 * 0.1 * 2.71 * np.sqrt(np.prod(shape)) / np.sqrt(0.2)  # |u| <= sqrt(size/(1 - beta)), times the momentum
    for got in (by_torch(param, steps, 0.1, torch.float32, hyper), by_optax(param, steps, 0.1, "float32", hyper)):
        assert np.isfinite(got).all()
        assert np.abs(got - param).max() <= bound


@found(3, 40, seeds, hyperparameters, st.sampled_from([np.nan, np.inf, -np.inf]), st.integers(0, 2))
def test_what_is_not_finite_stays_in_its_parameter(seed, hyper, bad, which):
    """A NaN or an infinity in one gradient is seen in that parameter, and in no other."""
    rng = np.random.default_rng(seed)
    params = {f"p{i}": rng.standard_normal((3, 4)) for i in range(3)}
    grads = {name: rng.standard_normal((3, 4)) for name in params}
    clean = {name: p.copy() for name, p in params.items()}
    spoilt = {**grads, f"p{which}": grads[f"p{which}"].copy()}
    spoilt[f"p{which}"][1, 2] = bad

    def steps(gradients):
        leaves = {name: torch.nn.Parameter(torch.tensor(p)) for name, p in clean.items()}
        optimizer = fusedbun.Fusedbun(leaves.values(), 0.1, **hyper)
        for name, p in leaves.items():
            p.grad = torch.tensor(gradients[name])
        optimizer.step()
        tx = fusedbun_jax.fusedbun(0.1, **hyper)
        tree = jax.tree.map(jnp.asarray, clean)
        updates, _ = tx.update(jax.tree.map(jnp.asarray, gradients), tx.init(tree), tree)
        return {n: p.detach().numpy() for n, p in leaves.items()}, optax.apply_updates(tree, updates)

    for want, got in zip(steps(grads), steps(spoilt), strict=True):
        for name in params:
            if name == f"p{which}":
                assert not np.isfinite(np.asarray(got[name])).all()
            else:
                np.testing.assert_array_equal(got[name], want[name])
