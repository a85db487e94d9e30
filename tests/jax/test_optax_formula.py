"""The steps of a matrix and a vector against the formulas, written out once more in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from factories import FACTORIES, gradients, parameters, run

from fusedbun_jax import fusedbun

STEPS = 4


def fusedbun_by_numpy(
    p,
    grads,
    lr,
    eps=1e-8,
    beta_decay=0.8,
    Lambda=0.01,
    momentum_beta=0.9,
    centralize=False,
    use_rms=False,
    nesterov=False,
    clip_rms=None,
    lagged=False,
    channel_axis=0,
):
    rows, columns, m = np.zeros(p.shape[0]), np.zeros(p.shape[-1]), np.zeros(p.shape)
    for g in grads:
        u = g.copy()
        if centralize and u.ndim == 2:
            u -= u.mean(axis=1 - channel_axis % 2, keepdims=True)
        u[np.abs(u) <= eps] = 0.0
        old_columns = columns
        if u.ndim == 2:
            rows = beta_decay * rows + (1 - beta_decay) * (u**2).mean(axis=1)
            columns = beta_decay * columns + (1 - beta_decay) * (u**2).mean(axis=0)
            seen = old_columns if lagged else columns
            nu = np.outer(rows, seen) / seen.mean() if seen.any() else np.outer(rows, np.ones_like(seen))
            nu = np.maximum(nu, (1 - beta_decay) * u**2) if lagged else nu
        else:
            rows = nu = beta_decay * rows + (1 - beta_decay) * u**2
        if use_rms:
            u /= np.sqrt(nu) + eps
        if clip_rms is not None:
            u /= max(1.0, np.sqrt((u**2).mean()) / clip_rms)
        m = momentum_beta * m + u
        u = momentum_beta * m + u if nesterov else m
        p = p - lr * (u + Lambda * p)
    return p


def sm3_by_numpy(p, grads, lr, momentum=0.0, beta=0.0, eps=1e-30):
    rows, columns, m = np.zeros(p.shape[0]), np.zeros(p.shape[-1]), np.zeros(p.shape)
    for g in grads:
        low = np.minimum(rows[:, None], columns[None, :]) if p.ndim == 2 else rows
        nu = low + g**2 if beta == 0 else beta * low + (1 - beta) * g**2
        if p.ndim == 2:
            rows, columns = np.maximum(rows, nu.max(axis=1)), np.maximum(columns, nu.max(axis=0))
        else:
            rows = np.maximum(rows, nu)
        m = momentum * m + (1 - momentum) * g / np.sqrt(nu + eps)
        p = p - lr * m
    return p


WITH_ACCUMULATORS = [name for name, f in FACTORIES.items() if f.make is fusedbun or name.startswith("sm3")]


@pytest.mark.parametrize("leaf", ["kernel", "bias"])
@pytest.mark.parametrize("name", WITH_ACCUMULATORS)
def test_steps_equal_the_formulas(name, leaf, x64):
    start = {leaf: parameters(jnp.float64)["layer"][leaf]}
    grads = [np.asarray(gradients(start, i)[leaf]) for i in range(STEPS)]
    settings = dict(FACTORIES[name].settings)
    if name == "flax":
        settings["channel_axis"] = -1
    by_numpy = sm3_by_numpy if name.startswith("sm3") else fusedbun_by_numpy
    got, _ = run(FACTORIES[name](0.1), start, STEPS)
    np.testing.assert_allclose(got[leaf], by_numpy(np.asarray(start[leaf]), grads, 0.1, **settings), rtol=1e-12)
