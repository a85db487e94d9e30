"""Seeds that are arrays: every member of an ensemble has its own noise."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from factories import gradients
from flax import nnx
from sweeps import only, sweep

import fusedbun_jax as fj
from fusedbun.storage.noise import start
from fusedbun.transforms import Momentum

NOISY = {"momentum_dtype": "int8", "stochastic_rounding": True}
SEEDS = [5, -1]
PARAMS = {"a": jnp.linspace(-1, 1, 24 * 40, dtype=jnp.bfloat16).reshape(24, 40), "b": jnp.ones(40, jnp.bfloat16)}
MAKE = {
    "factory": lambda seed: fj.fusedbun(0.01, seed=seed, **NOISY),
    "masked": lambda seed: fj.fusedbunw(0.01, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p), seed=seed, **NOISY),
    "by name": lambda seed: fj.by_name(fj.fusedbun, {"a": {"eps": 1e-6}}, learning_rate=0.01, seed=seed, **NOISY),
    "chain": lambda seed: fj.from_chain(
        fj.chain(Momentum(0.5, dtype="int8")), 0.01, stochastic_rounding=True, seed=seed
    ),
}
PARTS = {
    "lift": lambda seed: optax.chain(fj.lift(Momentum(0.5, dtype="int8"), seed), optax.scale(-0.01)),
    "round_stochastically": lambda seed: optax.chain(optax.scale(-1e-3), fj.round_stochastically(seed)),
}


def by_update(tx, steps=2):
    params, state = PARAMS, tx.init(PARAMS)
    for i in range(steps):
        updates, state = tx.update(gradients(params, i), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def by_step(tx, implementation=None, steps=2):
    params, state = PARAMS, tx.init(PARAMS)
    for i in range(steps):
        params, state = tx.step(gradients(params, i), state, params, implementation=implementation)
    return params, state


def member(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def differ(a, b):
    return any(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x != y).any()), a, b)))


@pytest.mark.parametrize("make", [MAKE["chain"], *PARTS.values()], ids=["chain", *PARTS])
def test_members_of_an_ensemble_round_by_their_own_seeds(make):
    """Each as it does alone with its seed, which is known or is not."""
    got = jax.jit(jax.vmap(lambda seed: by_update(make(seed))))(jnp.array(SEEDS))
    for i, seed in enumerate(SEEDS):
        alone = jax.jit(lambda seed=seed: by_update(make(seed)))()
        chex.assert_trees_all_equal(member(got, i), alone)
    assert differ(member(got, 0), member(got, 1))


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_kernel_takes_a_seed_that_is_not_known_yet(make):
    got = jax.jit(lambda seed: by_step(make(seed), "kernel"))
    known = by_step(make(5), "kernel")
    chex.assert_trees_all_equal(got(5), known)
    chex.assert_trees_all_equal(got(5), by_step(make(jnp.int32(5)), "kernel"))
    assert differ(got(6), known)
    assert got._cache_size() == 1


def test_steps_of_an_ensemble_are_the_definitions():
    make = MAKE["chain"]
    got = jax.jit(jax.vmap(lambda seed: by_step(make(seed))))(jnp.array([5, 6]))
    for i, seed in enumerate((5, 6)):
        chex.assert_trees_all_equal(member(got, i), jax.jit(lambda seed=seed: by_step(make(seed), "definition"))())


def test_an_ensemble_of_flaxs():
    @nnx.jit
    @nnx.vmap
    def train(seed):
        model = nnx.Linear(40, 8, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
        optimizer = nnx.Optimizer(model, fj.fusedbun(0.01, seed=seed, **NOISY), wrt=nnx.Param)
        grads = nnx.grad(lambda model: (model(jnp.ones((2, 40))) ** 2).mean())(model)
        optimizer.update(model, grads)
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    got = train(jnp.array([5, 5, 6]))
    chex.assert_trees_all_equal(member(got, 0), member(got, 1))
    assert differ(member(got, 0), member(got, 2))


@sweep("dtype", [jnp.int8, jnp.uint32, jnp.int64, jnp.uint64], short=only(jnp.uint32))
def test_a_seed_may_be_an_array_of_any_integers(dtype, x64):
    make = PARTS["round_stochastically"]
    got = jax.jit(lambda seed: by_update(make(seed), 1))(jnp.asarray(5, dtype))
    chex.assert_trees_all_equal(got, jax.jit(lambda: by_update(make(5), 1))())


@pytest.mark.parametrize("seed", [0, 7, -7, 2**40 + 1])
def test_where_noise_begins_is_the_same_word(seed):
    word = np.array(seed, np.int64).astype(np.int32)
    for name, stream in (("w.0", 0), ("ä", 2**32 - 1)):
        want = start(seed, name, stream)
        assert int(start(jnp.asarray(word), name, stream)) == want
        assert int(start(word.reshape(1), name, stream)[0]) == want


@pytest.mark.parametrize("seed", [jnp.zeros(2, int), jnp.float32(1), jnp.bool_(True)], ids=repr)
@pytest.mark.parametrize("make", [*MAKE.values(), *PARTS.values()], ids=[*MAKE, *PARTS])
def test_an_array_that_is_no_integer_is_no_seed(make, seed):
    with pytest.raises(TypeError, match="seed must be an integer"):
        by_update(make(seed), 1)
    with pytest.raises(TypeError, match="seed must be an integer"):
        jax.jit(lambda seed: by_update(make(seed), 1))(seed)


def test_an_array_under_inject_hyperparams():
    got = optax.inject_hyperparams(fj.fusedbun)(0.01, seed=jnp.int32(5), **NOISY)
    assert "seed" not in got.init(PARAMS).hyperparams
    assert jax.eval_shape(lambda: by_update(got, 1)[0])["a"].shape == PARAMS["a"].shape
