"""optax's wrappers that take several steps, other steps or other numbers around ours: what its tests ask of them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from factories import (
    FACTORIES,
    described,
    every_factory,
    gradients,
    jitted,
    jitted_update,
    over,
    run,
    stepper,
    sweep_of_descending,
    sweep_of_factories,
)
from optax import contrib
from sweeps import sweep

few = over(["recommended", "sm3-momentum", "mup_adamw", "ternary_vote"], ["sm3-momentum"])
DTYPES = ("float32", "bfloat16", "float16")

# Accumulation


@sweep_of_factories
@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulated_steps_have_the_types_of_others(factory, dtype):
    """Whatever dtype the gradients have. Without a dtype for what is accumulated optax takes float32 alone."""
    params = factory.parameters(dtype)
    for gradient in DTYPES:
        tx = optax.MultiSteps(factory(), 2, accumulator_dtype=jnp.float32).gradient_transformation()
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, factory.parameters(gradient), state, params)
        assert described((updates, after)) == described((params, state))


@few
def test_parameters_move_at_every_third_step(factory):
    tx, params = optax.MultiSteps(factory(), 3), factory.parameters()
    step, state = jitted(tx.gradient_transformation()), tx.init(params)
    assert not tx.has_updated(state)
    for i in range(6):
        before = params
        params, state = step(params, state, gradients(before, i))
        moves = (i + 1) % 3 == 0
        assert tx.has_updated(state) == moves
        if not moves:
            chex.assert_trees_all_equal(params, before)
    if not factory.ternary:
        assert all((p != q).any() for p, q in zip(jax.tree.leaves(params), jax.tree.leaves(before), strict=True))


@few
def test_how_many_steps_are_accumulated_may_follow_a_schedule(factory):
    tx, params = optax.MultiSteps(factory(), lambda step: jnp.where(step < 1, 1, 2)), factory.parameters()
    step, state, updated = jitted(tx.gradient_transformation()), tx.init(params), []
    for i in range(5):
        params, state = step(params, state, gradients(params, i))
        updated.append(bool(tx.has_updated(state)))
    assert updated == [True, False, True, False, True]


@few
def test_a_gradient_that_is_not_finite_is_not_accumulated(factory):
    tx = optax.MultiSteps(factory(), 2, should_skip_update_fn=optax.skip_not_finite)
    params = factory.parameters()
    step, state = jitted(tx.gradient_transformation()), tx.init(params)
    got, state = step(params, state, gradients(params, 0))
    for bad in (jnp.inf, jnp.nan):
        got, state = step(got, state, jax.tree.map(lambda g, b=bad: jnp.full_like(g, b), gradients(params)))
        assert state.mini_step == 1
    chex.assert_trees_all_equal(got, params)
    got, state = step(got, state, gradients(params, 1))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, gradients(params, 0), gradients(params, 1))
    expected, _ = jitted(factory())(params, factory().init(params), mean)
    chex.assert_trees_all_close(got, expected, rtol=1e-5)


# Types that stay


@every_factory
@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
def test_branches_of_one_step_have_the_same_types(factory, dtype, x64):
    """The state before a step and the one after it, and parameters of which one has another dtype."""
    tx, params = factory(), factory.parameters(dtype)
    params["layer"]["bias"] = params["layer"]["bias"].astype("float64" if dtype == "float32" else "float32")

    def sometimes(do, params, state):
        return jax.lax.cond(do, lambda p, s: stepper(tx)(p, s, p), lambda p, s: (p, s), params, state)

    state = jax.eval_shape(tx.init, params)
    after = jax.eval_shape(sometimes, jax.ShapeDtypeStruct((), bool), params, state)
    assert described(after) == described((params, state))


# Other steps


@few
def test_lookahead_pulls_to_the_slow_weights(factory):
    """After two steps: half way from where they were to where the fast ones are."""
    start = factory.parameters()
    tx = optax.lookahead(factory(), sync_period=2, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(start)
    state = tx.init(params)
    step = jax.jit(lambda p, s, g: (lambda u, s: (optax.apply_updates(p, u), s))(*tx.update(g, s, p)))
    for i in range(2):
        params, state = step(params, state, gradients(start, i))
    fast, _ = run(factory(), start, 2)
    half = jax.tree.map(lambda p, q: (p + q) / 2, start, fast)
    chex.assert_trees_all_close((params.fast, params.slow), (half, half), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("resets", [False, True], ids=["kept", "reset"])
@few
def test_lookahead_keeps_or_resets_the_state(factory, resets):
    start = factory.parameters()
    tx = optax.lookahead(factory(), sync_period=1, slow_step_size=0.5, reset_state=resets)
    params = optax.LookaheadParams.init_synced(start)
    _, state = jitted_update(tx)(gradients(start), tx.init(params), params)
    fresh, stepped = factory().init(start), run(factory(), start, 1)[1]
    chex.assert_trees_all_close(state.fast_state, fresh if resets else stepped, rtol=1e-6)


def bowl(params):
    return jnp.sum((params - jnp.array([1.0, -1.0, 2.0])) ** 2)


def descend(tx, steps, **told):
    """The loss of a bowl after some steps from zero, and the state; `told` are arguments of `update`."""

    def one(_, carry):
        params, state = carry
        value, grad = jax.value_and_grad(bowl)(params)
        known = {"value": value, "grad": grad, "value_fn": bowl, "grad_fn": lambda p, _: jax.grad(bowl)(p)}
        updates, state = tx.update(grad, state, params, **{name: known[name] for name in told})
        return optax.apply_updates(params, updates), state

    params = jnp.zeros(3)
    params, state = jax.jit(lambda p: jax.lax.fori_loop(0, steps, one, (p, tx.init(p))))(params)
    return params, state


def normalized(learning_rate):
    return optax.chain(contrib.normalize(), optax.sgd(learning_rate))


# Each has an optimizer in it, a number of steps, and what `update` is told beside the gradients.
AROUND = {
    "mechanize": (contrib.mechanize, 100, {}),
    "sam": (lambda tx: contrib.sam(tx, normalized(0.01), sync_period=2), 200, {}),
    "sam that asks for gradients": (
        lambda tx: contrib.sam(tx, normalized(0.01), sync_period=2, opaque_mode=True),
        100,
        {"grad_fn": True},
    ),
    "sam that climbs by it": (
        lambda tx: contrib.sam(optax.sgd(0.1), optax.chain(contrib.normalize(), tx, optax.scale(0.01)), sync_period=2),
        100,
        {},
    ),
    "reduce_on_plateau": (
        lambda tx: optax.chain(tx, contrib.reduce_on_plateau(0.5, patience=20)),
        200,
        {"value": True},
    ),
    "backtracking": (
        lambda tx: optax.chain(tx, optax.scale_by_backtracking_linesearch(15)),
        60,
        {"value": True, "grad": True, "value_fn": True},
    ),
    "zoom": (
        lambda tx: optax.chain(tx, optax.scale_by_zoom_linesearch(15)),
        60,
        {"value": True, "grad": True, "value_fn": True},
    ),
}
AROUND_EACH = {f"{name}-{way}": (name, way) for name, f in FACTORIES.items() if not f.ternary for way in AROUND}


@sweep(("name", "way"), AROUND_EACH.values(), short=lambda name, way: name == "sm3-momentum", ids=AROUND_EACH)
def test_a_bowl_is_descended_with_a_wrapper_around(name, way):
    """From a loss of 6."""
    wrap, steps, told = AROUND[way]
    params, state = descend(wrap(FACTORIES[name](**FACTORIES[name].undecayed)), steps, **told)
    chex.assert_tree_all_finite((params, state))
    assert bowl(params) < 1.0


@sweep_of_descending
def test_schedule_free_weights_descend(factory):
    rate = factory.learning_rate / 4
    params, state = descend(contrib.schedule_free(factory(rate, **factory.undecayed), rate), 400)
    assert bowl(contrib.schedule_free_eval_params(state, params)) < 1.0


@few
def test_schedule_free_buffers_may_be_donated(factory):
    tx, params = contrib.schedule_free(factory(), 0.1), factory.parameters()
    expected = run(tx, params, 2)[0]
    step, params = jax.jit(stepper(tx), donate_argnums=(0, 1)), factory.parameters()
    state = tx.init(params)
    for i in range(2):
        params, state = step(params, state, gradients(params, i))
    chex.assert_trees_all_close(params, expected, rtol=1e-6)


@sweep_of_descending
def test_complex_parameters_are_two_real_ones(factory):
    """They are refused by name, as errors say; so their parts are given, and optax's wrapper does."""
    rng = np.random.default_rng(0)
    real, imaginary, up, across = (jnp.asarray(rng.standard_normal((3, 4)), jnp.float32) for _ in range(4))
    tx = contrib.split_real_and_imaginary(factory())
    params, grads = {"w": real + 1j * imaginary}, {"w": up + 1j * across}
    with pytest.raises(TypeError, match="is complex64, but only real"):
        factory().init(params)
    got, _ = jitted_update(tx)(grads, tx.init(params), params)
    assert got["w"].dtype == jnp.complex64
    for part, p, g in ((jnp.real, real, up), (jnp.imag, imaginary, across)):
        expected, _ = jitted_update(factory())({"w": g}, factory().init({"w": p}), {"w": p})
        chex.assert_trees_all_close(part(got["w"]), expected["w"], rtol=1e-5)


# Beside it in a chain


@few
def test_what_stands_before_and_behind_it_is_told_what_it_is_told(factory):
    """Measures, noise, NaN as zeros, and parameters that are kept above zero."""
    params = factory.parameters()
    tx = optax.chain(
        optax.transforms.zero_nans(),
        optax.snapshot("length", optax.tree.norm),
        optax.transforms.add_noise(0.0, 0.5, key=0),
        factory(),
        optax.keep_params_nonnegative(),
    )
    grads = gradients(params)
    broken = jax.tree.map(lambda g: g.at[0].set(jnp.nan), grads)
    zeroed = jax.tree.map(lambda g: g.at[0].set(0.0), grads)
    updates, state = jitted_update(tx)(broken, tx.init(params), params)
    alone, _ = jitted_update(factory())(zeroed, factory().init(params), params)
    expected = jax.tree.map(lambda p, u: jnp.maximum(u, -p), params, alone)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)
    assert optax.tree.get(state, "length") == pytest.approx(float(optax.tree.norm(zeroed)))


@few
def test_gradients_of_examples_may_be_aggregated_before_it(factory):
    """With differential privacy: clipped one by one, then meaned, here without noise."""
    params = factory.parameters()
    each = [gradients(params, i) for i in range(3)]
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *each)
    tx = optax.chain(contrib.differentially_private_aggregate(1.0, 0.0, key=0), factory())
    updates, _ = jitted_update(tx)(stacked, tx.init(params), params)
    clipped = [jax.tree.map(lambda x, g=g: x / jnp.maximum(optax.tree.norm(g), 1.0), g) for g in each]
    mean = jax.tree.map(lambda *g: sum(g) / 3, *clipped)
    expected, _ = jitted_update(factory())(mean, factory().init(params), params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-6)


@few
def test_one_vector_of_all_parameters(factory):
    """optax.flatten makes one of them, which is then stepped as a vector."""
    params = factory.parameters()
    grads, tx = gradients(params), optax.flatten(factory())
    got, _ = jitted_update(tx)(grads, tx.init(params), params)
    flat = [jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(tree)]) for tree in (grads, params)]
    expected, _ = jitted_update(factory())(flat[0], factory().init(flat[1]), flat[1])
    chex.assert_trees_all_close(jnp.concatenate([u.reshape(-1) for u in jax.tree.leaves(got)]), expected, rtol=1e-6)
