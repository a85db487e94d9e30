"""What single optimizers promise: decoupled_lionw, ternary_vote, scaled_optum, sm3."""

import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from factories import gradients, jitted, parameters, run

from fusedbun_jax import decoupled_lionw, scaled_optum, sm3, ternary_vote

HALVES = optax.piecewise_constant_schedule(0.25, {1: 0.5})  # 0.25, 0.125, …


@pytest.mark.parametrize("weight_decay", [1e-3, 0.5, np.float32(0.25)])
def test_a_strong_decay_is_warned_of(weight_decay):
    with pytest.warns(UserWarning, match=rf"every weight by {1 - float(weight_decay):g} in each step") as caught:
        decoupled_lionw(1e-4, weight_decay=weight_decay)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("weight_decay", [0.0, 9.9e-4, 1e-5])
def test_a_usual_decay_is_not(weight_decay):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoupled_lionw(1e-4, weight_decay=weight_decay)


def test_means_that_forget_everything_are_warned_of():
    with pytest.warns(UserWarning, match=r"sm3: with statistic='mean' and beta=0 .* beta=0\.95 is usual"):
        sm3(0.1, statistic="mean")


def test_lions_decay_follows_the_schedule_but_not_the_rates_size(x64):
    """Without a gradient a weight is multiplied by `1 - rate/initial rate*weight_decay`."""
    params = parameters(jnp.float64)
    for rate, settings, second in (
        (1e-4, {}, 1.0),
        (10.0, {}, 1.0),
        (10.0, {"initial_learning_rate": 20.0}, 0.5),
        (HALVES, {"initial_learning_rate": 0.25}, 0.5),
        (0.0, {}, 0.0),  # where the initial rate is 0 nothing decays
    ):
        tx = decoupled_lionw(rate, weight_decay=5e-4, **settings)
        got, state = params, tx.init(params)
        for _ in range(2):
            got, state = jitted(tx)(got, state, jax.tree.map(jnp.zeros_like, params))
        first = second if rate == 10.0 or rate == 0.0 else 1.0
        factor = (1 - first * 5e-4) * (1 - second * 5e-4)
        jax.tree.map(lambda a, p, f=factor: np.testing.assert_allclose(a, f * p, rtol=1e-12), got, params)


def test_lions_initial_learning_rate():
    with pytest.raises(ValueError, match="give initial_learning_rate"):
        decoupled_lionw(HALVES, weight_decay=1e-4)
    decoupled_lionw(HALVES)
    decoupled_lionw(HALVES, weight_decay=1e-4, initial_learning_rate=0.0)
    with pytest.raises(ValueError, match=r"initial_lr must lie in \[0, inf\)"):
        decoupled_lionw(HALVES, weight_decay=1e-4, initial_learning_rate=-1.0)


def votes_of(state):
    return state.vote.votes


def test_votes_reach_the_end_of_an_int8_and_never_wrap():
    """A weight that is at the end already has votes for it too, and they return to 0 where others' do."""
    params = jnp.array([1.0, -1.0, 0.0])
    tx = ternary_vote(threshold=127)
    update = jax.jit(tx.update)
    grads = jnp.array([-1.0, 1.0, 1e-30])  # towards what the first two are already
    state = tx.init(params)
    for count in range(1, 127):
        updates, state = update(grads, state, params)
        np.testing.assert_array_equal(updates, 0)
        np.testing.assert_array_equal(votes_of(state), np.array([-count, count, count]))
    assert votes_of(state).dtype == jnp.int8
    updates, state = update(grads, state, params)
    np.testing.assert_array_equal(params + updates, [1, -1, -1])
    np.testing.assert_array_equal(votes_of(state), 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_ternary_weights_stay_ternary(dtype, x64):
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.integers(-1, 2, (8, 5)), dtype)
    tx = ternary_vote(threshold=3)
    got, state, by_numpy, votes = params, tx.init(params), np.asarray(params, int), np.zeros((8, 5), int)
    moved = 0
    for i in range(40):
        grads = gradients(params, i)
        got, state = jitted(tx)(got, state, grads)
        votes += np.sign(np.asarray(grads, float)).astype(int)
        decided = abs(votes) >= 3
        by_numpy = np.where(decided, np.clip(by_numpy - np.sign(votes), -1, 1), by_numpy)
        votes = np.where(decided, 0, votes)
        moved += decided.sum()
        np.testing.assert_array_equal(np.asarray(got, float), by_numpy)
        np.testing.assert_array_equal(votes_of(state), votes)
    assert moved > 40
    assert set(np.unique(by_numpy)) == {-1, 0, 1}


def test_a_nan_does_not_vote_and_shows():
    params, tx = jnp.array([1.0, 0.0, -1.0]), ternary_vote(threshold=2)
    update = jax.jit(tx.update)
    updates, state = update(jnp.array([jnp.nan, 1.0, 1.0]), tx.init(params), params)
    np.testing.assert_array_equal(updates, [jnp.nan, 0, 0])
    np.testing.assert_array_equal(votes_of(state), [0, 1, 1])
    updates, state = update(jnp.array([1.0, jnp.nan, jnp.inf]), state, params)
    np.testing.assert_array_equal(updates, [0, jnp.nan, 0])
    np.testing.assert_array_equal(votes_of(state), [1, 1, 0])


def test_ternary_vote_has_no_learning_rate():
    with pytest.raises(TypeError, match="learning_rate"):
        ternary_vote(learning_rate=0.1)
    for wrong in (0, 128, 1.5, True, 0.1):
        with pytest.raises((TypeError, ValueError), match=r"threshold must be an integer"):
            ternary_vote(wrong)


@pytest.mark.parametrize("weight_decay", [0.0, 0.25])
def test_scaled_optum_keeps_a_count_and_equals_its_formula(weight_decay):
    params = parameters()
    tx = scaled_optum(0.5, weight_decay)
    assert jax.tree.leaves(tx.init(params)) == [0]
    got, state = run(tx, params, 2)
    assert jax.tree.leaves(state) == [2]
    expected = params
    for i in range(2):
        expected = jax.tree.map(
            lambda p, g: p - 0.5 * (jnp.sign(g) + weight_decay * jnp.sign(p)), expected, gradients(params, i)
        )
    chex.assert_trees_all_close(got, expected, rtol=1e-6)


def test_sm3_without_momentum_holds_no_full_size_buffer():
    params = {"matrix": jnp.ones((30, 40)), "cube": jnp.ones((5, 6, 7)), "vector": jnp.ones(9)}
    state, absent = sm3().init(params), 2 + 1 + 3  # a number each, in the trees of axes that there are not
    assert sum(x.size for x in jax.tree.leaves(state.sm3_accumulate)) == 30 + 40 + 5 + 6 + 7 + 9 + absent
    assert jax.tree.leaves(state._replace(sm3_accumulate=None)) == [0]
    assert sum(x.size for x in jax.tree.leaves(sm3(momentum=0.5).init(params).momentum)) == 1200 + 210 + 9


def test_default_learning_rates():
    params = jnp.ones(3)
    for make, rate in ((sm3, 0.1), (scaled_optum, 1e-2), (decoupled_lionw, 1e-4)):
        updates, _ = make().update(params, make().init(params), params)
        np.testing.assert_allclose(updates, -rate, rtol=1e-6)
