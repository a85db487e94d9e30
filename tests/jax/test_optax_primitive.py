"""The primitive gives what is to be added to parameters too: by a kernel, what `update` gives."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import FACTORIES, described, gradients, over, parameters

from fusedbun_jax import primitive
from fusedbun_jax.definition import split_state
from fusedbun_jax.layout import at_leaves
from fusedbun_jax.leaf import flatten
from fusedbun_jax.operands import make_leaf


def updated(tx, grads, state, params):
    """The updates and the state's arrays of every leaf."""
    chain, lr = tx.driver.chain, tx.driver.learning_rate
    with_paths, tree = flatten(grads)
    states, count = split_state(chain, state)
    paths = [path for path, _ in with_paths]
    by_state = [at_leaves(t.name, of, tree, paths) for t, of in zip(chain, states, strict=True)]
    leaves = [
        make_leaf(chain, lr, count, path, param, grad, [arrays[i] for arrays in by_state])
        for i, ((path, grad), param) in enumerate(zip(with_paths, jax.tree.leaves(params), strict=True))
    ]
    stepped = primitive.step(leaves, as_update=True)
    return tree.unflatten([update for update, *_ in stepped]), [stored for _, *stored in stepped]


@over(["recommended", "fusedbunw", "sm3-momentum", "mup_adamw"], ["recommended", "fusedbunw"])
@pytest.mark.parametrize(("dtype", "stochastic"), [("float32", False), ("bfloat16", False), ("bfloat16", True)])
def test_updates_are_those_of_update(factory, dtype, stochastic):
    tx = factory(stochastic_rounding=stochastic, seed=3)
    params = parameters(dtype)
    state, grads = tx.init(params), gradients(params)
    compiled = jax.jit(lambda g, s, p: updated(tx, g, s, p))
    assert "fusedbun_step" in compiled.lower(grads, state, params).as_text()
    (got, stored), (want, after) = compiled(grads, state, params), jax.jit(tx.update)(grads, state, params)
    assert described(got) == described(want)
    for p, u, v in zip(*map(jax.tree.leaves, (params, got, want)), strict=True):
        sums = [np.float32((p.astype(u.dtype) + x).astype(p.dtype)) for x in (u, v)]
        np.testing.assert_allclose(*sums, rtol=2e-6 if dtype == "float32" else 2.0**-7, atol=1e-7)
    found, wanted = (
        sorted(float(jnp.sum(jnp.abs(x))) for x in jax.tree.leaves(t) if x.size > 1) for t in (stored, after)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_it_writes_into_the_gradients():
    tx, params = FACTORIES["sm3-momentum"](), {"w": jnp.ones((64, 48)), "v": jnp.ones(64)}
    state, grads = tx.init(params), gradients(params)
    kept = jax.tree.map(np.array, grads)

    def step(grads, state, params):
        return *updated(tx, grads, state, params), state.count + 1

    want, *_ = jax.jit(step)(grads, state, params)
    chex.assert_trees_all_equal(grads, kept)
    donating = jax.jit(step, donate_argnums=(0, 1)).lower(grads, state, params).compile()
    assert donating.memory_analysis().temp_size_in_bytes < 4096
    before = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(grads)]
    got, *_ = donating(grads, state, params)
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(got)] == before
    chex.assert_trees_all_equal(got, want)
