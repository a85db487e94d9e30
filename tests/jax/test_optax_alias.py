"""What optax's own optimizers are tested for: they converge, compile once, and keep shapes, dtypes and shardings."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from factories import (
    described,
    every_factory,
    gradients,
    jitted,
    over,
    parameters,
    run,
    stepper,
    sweep_of_descending,
    sweep_of_factories,
)


def minimise(tx, loss, params, steps):
    step = stepper(tx)

    def one(_, carry):
        params, state = carry
        return step(params, state, jax.grad(loss)(params))

    return jax.jit(lambda p: jax.lax.fori_loop(0, steps, one, (p, tx.init(p)))[0])(params)


@sweep_of_descending
def test_reaches_the_bottom_of_a_parabola(factory):
    # `centralize` sees no distance but that between the elements of a row, or of a column: here there is no other.
    target = {
        "bias": jnp.array([1.0, -1.0, 3.0]),
        "kernel": jnp.array([[1.0, -1.0, 1.0, -1.0], [-1.0, 1.0, -1.0, 1.0]]),
    }

    def loss(params):
        return sum(jnp.sum((params[name] - target[name]) ** 2) for name in target)

    steps = 600
    tx = factory(optax.cosine_decay_schedule(factory.learning_rate, steps), **factory.undecayed)
    found = minimise(tx, loss, jax.tree.map(jnp.zeros_like, target), steps)
    chex.assert_trees_all_close(found, target, atol=1e-3)


@sweep_of_descending
def test_finds_the_valley_of_rosenbrock(factory):
    def loss(xy):
        return (1 - xy[0]) ** 2 + 100 * (xy[1] - xy[0] ** 2) ** 2

    steps = 20_000
    tx = factory(optax.cosine_decay_schedule(factory.learning_rate / 50, steps), **factory.undecayed)
    found = minimise(tx, loss, jnp.zeros(2), steps)
    chex.assert_trees_all_close(found, jnp.ones(2), rtol=0.03)


@sweep_of_factories
def test_is_compiled_once(factory):
    tx = factory()
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(stepper(tx), n=1))
    params = factory.parameters()
    state = tx.init(params)
    for i in range(3):
        params, state = step(params, state, gradients(params, i))


@every_factory
@pytest.mark.parametrize("learning_rate", [0.1, optax.linear_schedule(0.1, 0.0, 10)], ids=["constant", "scheduled"])
def test_state_and_updates_keep_their_types(factory, learning_rate):
    tx, params = factory(learning_rate), factory.parameters()
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, gradients(params), state, params)
    assert described(after) == described(state)
    assert described(updates) == described(params)


@sweep_of_factories
def test_eval_shape_foretells_init_and_update(factory):
    tx, params = factory(), factory.parameters()
    state = tx.init(params)
    assert described(jax.eval_shape(tx.init, params)) == described(state)
    assert described(tx.init(jax.eval_shape(lambda: params))) == described(state)
    foretold = jax.eval_shape(stepper(tx), params, state, gradients(params))
    assert described(foretold) == described(jitted(tx)(params, state, gradients(params)))


@over(
    ["recommended", "sm3-momentum", "mup_adam", "ternary_vote"], ["sm3-momentum", "mup_adam"]
)  # eagerly every operation is a program of its own
def test_jit_changes_nothing_but_rounding(factory, x64):
    tx, params = factory(), factory.parameters(jnp.float64)
    by_hand, state = params, tx.init(params)
    for i in range(2):
        before = jax.tree.map(jnp.copy, (gradients(by_hand, i), state, by_hand))
        arguments = gradients(by_hand, i), state, by_hand
        updates, state = tx.update(*arguments)
        chex.assert_trees_all_equal(arguments, before)  # nothing was written to
        by_hand = optax.apply_updates(by_hand, updates)
    chex.assert_trees_all_close((by_hand, state), run(tx, params, 2), rtol=1e-12)


@sweep_of_factories
def test_scan_and_cond_equal_a_loop(factory, x64):
    tx, params = factory(), factory.parameters(jnp.float64)
    step, grads = stepper(tx), gradients(params)
    start = (params, tx.init(params))
    expected = start
    for _ in range(3):
        expected = jitted(tx)(*expected, grads)

    def sometimes(carry, do):
        return jax.lax.cond(do, lambda c: step(*c, grads), lambda c: c, carry), None

    got, _ = jax.lax.scan(sometimes, start, jnp.array([True, False, True, False, True]))
    chex.assert_trees_all_close(got, expected, rtol=1e-12)


@sweep_of_factories
def test_vmap_equals_a_loop_over_parameter_sets(factory, x64):
    tx = factory()
    first = factory.parameters(jnp.float64)
    sets = [first, jax.tree.map(lambda x: -x[::-1], first)]
    expected = [run(tx, params, 1) for params in sets]

    def stacked(trees):
        return jax.tree.map(lambda *x: jnp.stack(x), *trees)

    batch, grads = stacked(sets), stacked([gradients(params, 0) for params in sets])
    got = jax.jit(jax.vmap(stepper(tx)))(batch, jax.vmap(tx.init)(batch), grads)
    chex.assert_trees_all_close(got, stacked(expected), rtol=1e-12)


@sweep_of_descending
def test_vmap_over_learning_rates_equals_a_run_for_each(factory, x64):
    params = parameters(jnp.float64)
    rates = jnp.array([0.0, 0.1, 0.5])

    def one(rate):
        tx = factory(rate)
        return stepper(tx)(params, tx.init(params), gradients(params))[0]

    got, alone = jax.jit(jax.vmap(one))(rates), run(factory(0.1), params, 1)[0]
    expected = [jax.tree.map(lambda p, q, r=rate: p + r / 0.1 * (q - p), params, alone) for rate in rates]
    chex.assert_trees_all_close(got, jax.tree.map(lambda *x: jnp.stack(x), *expected), rtol=1e-12, atol=1e-14)


@sweep_of_factories
def test_buffers_may_be_donated(factory):
    tx, params = factory(), factory.parameters()
    expected = run(tx, params, 3)
    step = jax.jit(stepper(tx), donate_argnums=(0, 1))
    params = factory.parameters()
    state = tx.init(params)
    for i in range(3):
        grads = gradients(params, i)
        given = jax.tree.leaves((params, state))
        params, state = step(params, state, grads)  # a buffer that cannot be used is a warning, and so an error
        assert all(x.is_deleted() for x in given)
    chex.assert_trees_all_equal((params, state), expected)


@sweep_of_descending
def test_the_way_through_several_steps_is_differentiable(factory, x64):
    params = parameters(jnp.float64)

    def loss(rate, params):
        tx = factory(rate)
        state = tx.init(params)
        for i in range(2):
            params, state = stepper(tx)(params, state, gradients(params, i))
        return sum(jnp.sum(jnp.sin(p)) for p in jax.tree.leaves(params))

    rate, small = 0.1, 1e-6
    value_and_slopes = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    _, slopes = value_and_slopes(rate, params)
    chex.assert_tree_all_finite(slopes)
    forward = (value_and_slopes(rate + small, params)[0] - value_and_slopes(rate - small, params)[0]) / (2 * small)
    assert slopes[0] == pytest.approx(float(forward), rel=1e-5)


@sweep_of_factories
def test_gradients_flow_into_the_gradients(factory, x64):
    tx = factory()
    params, state = run(tx, factory.parameters(jnp.float64), 1)  # the first step of some is a sign

    def length(grads):
        return sum(jnp.sum(u**2) for u in jax.tree.leaves(tx.update(grads, state, params)[0]))

    slopes = jax.jit(jax.grad(length))(gradients(params, 1))
    chex.assert_tree_all_finite(slopes)
    for slope in jax.tree.leaves(slopes):
        assert (jnp.abs(slope).max() < 1e-9) == factory.by_sign


@every_factory
def test_extra_arguments_are_accepted(factory):
    tx, params = factory(), factory.parameters()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    grads, state = gradients(params), tx.init(params)
    extra = jax.eval_shape(lambda: tx.update(grads, state, params, value=1.0, grad=grads, value_fn=jnp.sum))
    assert described(extra) == described((params, state))
