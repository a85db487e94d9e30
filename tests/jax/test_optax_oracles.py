"""optax's own optimizers as oracles: 20 steps from the same start with the same gradients.

In float64 both agree to 1e-12 of each number's size, in float32 to 2e-6 of the distance that a parameter went.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from factories import gradients, jitted
from sweeps import sweep

from fusedbun_jax import decoupled_lionw, mup_adam, mup_adamw, mup_sgd, scaled_optum, sm3

STEPS = 20
RATE = optax.linear_schedule(0.0625, 0.0, 32)  # float32 has its values
SHAPES = {"0-d": (), "vector": (7,), "matrix": (5, 3), "thin": (4, 1), "cube": (2, 3, 4), "kernel": (3, 2, 2, 5)}


def output(path, param):
    """Every u-muP scale is 1."""
    return "output"


def lion_with_decay():
    # lion's decay is multiplied by the learning rate, ours by the learning rate over the initial one
    return optax.lion(RATE, b1=0.95, b2=0.9, weight_decay=5e-4 / 0.0625)


SM3 = optax.chain(optax.scale_by_sm3(b1=0.0, b2=1.0, eps=1e-30), optax.scale_by_learning_rate(RATE))
PAIRS = {
    "sm3": (lambda: sm3(RATE), lambda: SM3),
    "sm3 momentum": (lambda: sm3(0.0625, momentum=0.9, eps=1e-8), lambda: optax.sm3(0.0625, momentum=0.9)),
    "lion": (lambda: decoupled_lionw(RATE, (0.9, 0.99)), lambda: optax.lion(RATE, weight_decay=0.0)),
    "lion decay": (
        lambda: decoupled_lionw(RATE, (0.95, 0.9), 5e-4, initial_learning_rate=0.0625),
        lion_with_decay,
    ),
    "adam": (lambda: mup_adam(RATE, (0.8, 0.99), mup=output), lambda: optax.adam(RATE, 0.8, 0.99)),
    "adam L2": (
        lambda: mup_adam(RATE, weight_decay=0.1, independent_weight_decay=False, mup=output),
        lambda: optax.chain(optax.add_decayed_weights(0.1), optax.adam(RATE)),
    ),
    "adamw": (
        lambda: mup_adamw(RATE, eps=1e-3, weight_decay=0.1, independent_weight_decay=False, mup=output),
        lambda: optax.adamw(RATE, eps=1e-3, weight_decay=0.1),
    ),
    "adamw independent": (
        lambda: mup_adamw(RATE, weight_decay=1e-3, initial_learning_rate=0.0625, mup=output),
        lambda: optax.adamw(RATE, weight_decay=1e-3 / 0.0625),
    ),
    "sgd": (lambda: mup_sgd(RATE, mup=output), lambda: optax.sgd(RATE)),
    "sgd momentum": (lambda: mup_sgd(RATE, 0.9, mup=output), lambda: optax.sgd(RATE, 0.9)),
    "sgd nesterov": (lambda: mup_sgd(RATE, 0.9, nesterov=True, mup=output), lambda: optax.sgd(RATE, 0.9, True)),
    "sign": (lambda: scaled_optum(RATE), lambda: optax.sign_sgd(RATE)),
}

FEW = ("sm3 momentum", "adamw", "sgd nesterov", "sign")


def start(dtype, shapes):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


def trained(tx, params, steps=STEPS, gradient=lambda i, params: gradients(params, i)):
    p, state = params, tx.init(params)
    for i in range(steps):
        p, state = jitted(tx)(p, state, gradient(i, params))
    return p


def growing(i, params):
    return jax.tree.map(lambda p: 2.0**i * jnp.cos(p), params)


def check_that_they_differ_but_where_gradients_grow(ours, theirs, params):
    got, expected = trained(ours, params), trained(theirs, params)
    for leaf, p in expected.items():
        assert jnp.abs(got[leaf] - p).max() > 1e-4, leaf
    got, expected = trained(ours, params, gradient=growing), trained(theirs, params, gradient=growing)
    for leaf, p in expected.items():
        np.testing.assert_allclose(got[leaf], p, rtol=1e-12, err_msg=leaf)


def without(shapes, *names):
    return {name: shape for name, shape in shapes.items() if name not in names}


@sweep(
    ("name", "dtype"),
    [(name, dtype) for name in PAIRS for dtype in ("float64", "float32")],
    short=lambda name, dtype: dtype == "float64" and name in FEW,
)
def test_equals_optax(name, dtype, x64):
    ours, theirs = PAIRS[name]
    params = start(dtype, without(SHAPES, "0-d") if name.startswith("sm3") else SHAPES)
    got, expected = trained(ours(), params), trained(theirs(), params)
    for leaf, p in expected.items():
        distance = float(jnp.abs(p - params[leaf]).max())
        assert distance > 0.01
        tolerance = {"rtol": 1e-12} if dtype == "float64" else {"rtol": 2e-7, "atol": 2e-6 * distance}
        np.testing.assert_allclose(got[leaf], p, err_msg=leaf, **tolerance)


def test_amsgrad_differs_from_optaxs_in_what_it_takes_the_largest_of(x64):
    """Ours, as torch's, is the largest mean of squares, corrected afterwards; optax's the largest corrected one.

    Where a gradient grows both are the latest.
    """
    ours, theirs = mup_adam(RATE, amsgrad=True, mup=output), optax.amsgrad(RATE)
    check_that_they_differ_but_where_gradients_grow(ours, theirs, start("float64", SHAPES))


def test_sm3_that_forgets_differs_from_optaxs_in_that_accumulators_never_fall(x64):
    """Ours, as torch-SM3's, are the largest second moment so far; optax's `b2` lets them fall again."""
    theirs = optax.chain(optax.scale_by_sm3(b1=0.0, b2=0.9, eps=1e-30), optax.scale_by_learning_rate(RATE))
    params = start("float64", without(SHAPES, "0-d", "vector"))
    check_that_they_differ_but_where_gradients_grow(sm3(RATE, beta=0.9), theirs, params)


def test_amsgrad_equals_its_formula(x64):
    params = start("float64", {"matrix": (5, 3)})
    p = np.asarray(params["matrix"])
    m, v, w = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)
    for i in range(STEPS):
        g = np.asarray(gradients(params, i)["matrix"])
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = np.maximum(w, v)
        p = p - float(RATE(i)) * m / (1 - 0.9 ** (i + 1)) / (np.sqrt(w / (1 - 0.999 ** (i + 1))) + 1e-8)
    np.testing.assert_allclose(trained(mup_adam(RATE, amsgrad=True, mup=output), params)["matrix"], p, rtol=1e-12)


def test_the_first_step_of_adam_is_exact_in_float32():
    """It is the learning rate; optax computes `1 - beta**n` in float32, which loses digits."""
    params = start("float32", {"vector": (7,)})
    error = [
        float(jnp.abs(jnp.abs(trained(tx, params, 1)["vector"] - params["vector"]) - 0.5).max())
        for tx in (mup_adam(0.5, (0.9, 0.99999), mup=output), optax.adam(0.5, 0.9, 0.99999))
    ]
    assert error[0] < 1e-6
    assert error[1] > 1e-5


def test_optax_sm3_fails_on_0d_and_ours_does_not():
    params = {"0-d": jnp.float32(1.0)}
    theirs = optax.sm3(0.1)
    with pytest.raises(IndexError):
        theirs.update(params, theirs.init(params), params)
    updates, _ = sm3(0.1).update(params, sm3(0.1).init(params), params)
    assert updates["0-d"] == pytest.approx(-0.1)


def test_optax_sm3_always_holds_a_momentum_and_ours_does_not():
    params = {"matrix": jnp.ones((30, 40))}

    def numbers(tx):
        return sum(x.size for x in jax.tree.leaves(tx.init(params)))

    assert numbers(optax.sm3(0.1, momentum=0.0)) == 30 + 40 + 30 * 40
    absent, count = 2, 1  # of the axes that a matrix does not have, a number each
    assert numbers(sm3(0.1)) == 30 + 40 + absent + count
    assert numbers(sm3(0.1, momentum=0.9)) == 30 + 40 + absent + count + 30 * 40


def test_the_first_step_of_sgd_is_not_dampened(x64):
    """As in torch.optim.SGD; optax has no dampening."""
    params = start("float64", SHAPES)
    got = trained(mup_sgd(RATE, 0.9, 0.5, mup=output), params)
    for leaf, p in params.items():
        by_hand, m = p, gradients(params, 0)[leaf]
        for i in range(STEPS):
            g = gradients(params, i)[leaf]
            m = 0.9 * m + 0.5 * g if i else g
            by_hand = by_hand - float(RATE(i)) * m
        np.testing.assert_allclose(got[leaf], by_hand, rtol=1e-12, atol=1e-13, err_msg=leaf)
