"""Derivatives through a step are finite, where nothing has moved yet too: by gradients, parameters, state and rate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from factories import FACTORIES, gradients, parameters
from sweeps import only, sweep

import fusedbun_jax as fj
from fusedbun_jax import namespace

MAKE = {name: (factory.make, factory.settings) for name, factory in FACTORIES.items() if not factory.ternary}
MAKE |= {
    "int8": (fj.fusedbun, {"use_rms": True, "momentum_dtype": "int8"}),
    "bfloat16": (fj.fusedbun, {"use_rms": True, "momentum_dtype": "bfloat16", "lagged": True}),
    "without eps": (fj.fusedbun, {"use_rms": True, "eps": 0.0, "momentum_beta": 0.0}),
    "sm3 of means": (fj.sm3, {"statistic": "mean", "beta": 0.9, "eps": 0.0}),
}
SHORT = ("recommended", "fusedbunw", "mup_adamw", "sm3 of means")


def zero(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def without_a_column(tree):
    return jax.tree.map(lambda x: x.at[..., 0].set(0), tree)


GIVEN = {"gradients": lambda tree: tree, "none": zero, "a column without": without_a_column}


def is_real(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


@sweep("name", MAKE, short=only(*SHORT))
def test_derivatives_are_finite(name):
    """After every first step, of every second one."""
    make, settings = MAKE[name]
    params = parameters()
    state = make(0.1, **settings).init(params)

    def end(rate, grads, params, real, state):
        """A number that all that a step changes has a part in."""
        leaves, tree = jax.tree.flatten(state)
        given = iter(real)
        tx = make(rate, **settings)
        updates, state = tx.update(grads, tree.unflatten([next(given) if is_real(x) else x for x in leaves]), params)
        after = [*jax.tree.leaves(optax.apply_updates(params, updates)), *filter(is_real, jax.tree.leaves(state))]
        return sum(jnp.sum(jnp.cos(x)) for x in after)

    slopes = jax.jit(jax.grad(end, argnums=(0, 1, 2, 3)))
    update = jax.jit(make(0.1, **settings).update)
    states = [state, *(update(change(gradients(params)), state, params)[1] for change in GIVEN.values())]
    for state in states:
        real = list(filter(is_real, jax.tree.leaves(state)))
        for change in GIVEN.values():
            for at in (params, zero(params)):
                found = slopes(jnp.float32(0.1), change(gradients(params)), at, real, state)
                assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(found))


def test_derivatives_of_a_step_are_finite():
    params, tx = parameters(), FACTORIES["fusedbunw"]()
    state = tx.init(params)
    slopes = jax.grad(lambda g: sum(jnp.sum(p) for p in jax.tree.leaves(tx.step(g, state, params)[0])))(zero(params))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(slopes))


@pytest.mark.parametrize("derive", [jax.grad, jax.jacfwd, lambda f: jax.grad(jax.grad(f))])
def test_only_at_0_has_the_root_another_derivative(derive):
    for x in (1e-30, 0.25, 4.0, 1e30):
        np.testing.assert_allclose(derive(namespace.sqrt)(x), derive(jnp.sqrt)(x), rtol=1e-6)
    assert derive(namespace.sqrt)(0.0) == 0.0
    assert jnp.isnan(derive(namespace.sqrt)(-1.0))
    assert namespace.sqrt(jnp.float32(2.0)) == jnp.sqrt(jnp.float32(2.0))
