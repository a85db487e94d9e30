"""JAX: optax's wrappers and combinators, and its schedules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from benchmarks.behaviour.in_jax import (
    RATE,
    assert_moved,
    assert_same,
    gradients,
    one,
    parameters,
    run,
    static_args,
    stepper,
)
from benchmarks.behaviour.uses import Contender, Part

PART = Part("Wrappers of optax")
SCHEDULED = Part("Learning rates and schedules")
FIXED = {"ternary_vote": "Its step is from one ternary weight to the next; it has no size that could be changed."}
MASK = {"bias": False, "kernel": True}


@PART.use("`MultiSteps`")
def multi_steps(contender: Contender) -> None:
    """Two small steps are one with the mean gradient."""
    params = parameters(contender)
    tx = optax.MultiSteps(contender(), 2)
    step, state = stepper(tx), tx.init(params)
    grads = [gradients(params, i) for i in range(2)]
    halfway, state = step(params, state, grads[0])
    assert_same(halfway, params)
    got, _ = step(halfway, state, grads[1])
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
    wanted, _ = one(contender(), params, mean)
    assert_same(got, wanted, off=1e-5)
    assert_moved(got, params)


def _leaves_out(wrap: Callable[[Any], Any], contender: Contender) -> None:
    params = parameters(contender)
    tx = wrap(contender())
    step = stepper(tx)
    after, state = step(params, tx.init(params), gradients(params, 0))
    bad = jax.tree.map(lambda g: g * jnp.nan, gradients(params, 1))
    same, state = step(after, state, bad)
    assert_same(same, after)
    got, _ = step(same, state, gradients(params, 1))
    assert_same(got, run(contender(), params, 2)[0], off=1e-5)


@PART.use("`apply_if_finite`")
def apply_if_finite(contender: Contender) -> None:
    """A step with a NaN is left out, and the run goes on as if it had not been."""
    _leaves_out(lambda tx: optax.apply_if_finite(tx, 3), contender)


@PART.use("`MultiSteps(should_skip_update_fn=skip_not_finite)`")
def skipping(contender: Contender) -> None:
    """A step with a NaN is left out, and the run goes on as if it had not been."""
    _leaves_out(lambda tx: optax.MultiSteps(tx, 1, should_skip_update_fn=optax.skip_not_finite), contender)


def _is_finite(updates: Any, *_: Any, **__: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(u).all() for u in jax.tree.leaves(updates)]).all()


@PART.use("`conditionally_mask`")
def conditionally_masked(contender: Contender) -> None:
    """A step whose condition is not met is left out, and the run goes on as if it had not been."""
    _leaves_out(lambda tx: optax.conditionally_mask(tx, lambda step: step != 1), contender)


@PART.use("`conditionally_transform`")
def conditionally(contender: Contender) -> None:
    """Gradients pass unchanged until the condition holds; then they are stepped."""
    params = parameters(contender)
    tx = optax.conditionally_transform(contender(), lambda step: step >= 1)
    update = jax.jit(tx.update)
    grads = gradients(params)
    updates, state = update(grads, tx.init(params), params)
    assert_same(updates, grads)
    updates, _ = update(grads, state, params)
    wanted, _ = contender().update(grads, contender().init(params), params)
    assert_same(updates, wanted, off=1e-5)


def _ours(tree: Any) -> Any:
    return {"kernel": tree["kernel"]}


@PART.use("`masked`")
def masked(contender: Contender) -> None:
    """What is masked passes unchanged; the rest is stepped as by itself."""
    params = parameters(contender)
    tx, alone, grads = optax.masked(contender(), MASK), contender(), gradients(params)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert_same(updates["bias"], grads["bias"])
    wanted, _ = alone.update(_ours(grads), alone.init(_ours(params)), _ours(params))
    assert_same(_ours(updates), wanted, off=1e-5)


@PART.use("`partition` (`multi_transform`)")
def partitioned(contender: Contender) -> None:
    """Each leaf has its own optimizer, and is stepped as by that alone."""
    params = parameters(contender)
    labels = jax.tree.map(lambda x: "ours" if x else "sgd", MASK)
    got, _ = run(optax.partition({"ours": contender(), "sgd": optax.sgd(1.0)}, labels), params, 1)
    alone, _ = one(contender(), _ours(params), _ours(gradients(params)))
    assert_same(_ours(got), alone, off=1e-5)
    assert_same(got["bias"], params["bias"] - gradients(params)["bias"], off=1e-5)


@PART.use("`selective_transform`, `freeze`")
def frozen(contender: Contender) -> None:
    """What is frozen rests."""
    params = parameters(contender)
    mask = jax.tree.map(lambda x: not x, MASK)
    got, _ = run(optax.selective_transform(contender(), freeze_mask=mask), params, 2)
    assert_same(got["bias"], params["bias"])
    assert_moved(_ours(got), _ours(params))


@PART.use("`chain` behind `clip_by_global_norm`, before `scale`")
def chained(contender: Contender) -> None:
    """The step is half of the one with the clipped gradients."""
    params = parameters(contender)
    grads, tx = gradients(params), optax.chain(optax.clip_by_global_norm(0.5), contender(), optax.scale(0.5))
    clipped = jax.tree.map(lambda g: 0.5 * g / optax.global_norm(grads), grads)
    updates, _ = tx.update(grads, tx.init(params), params)
    wanted, _ = contender().update(clipped, contender().init(params), params)
    assert_same(updates, jax.tree.map(lambda u: 0.5 * u, wanted), off=1e-5)


@PART.use("`named_chain`")
def named(contender: Contender) -> None:
    """The state goes by the name, and the run is the plain one."""
    params = parameters(contender)
    got, state = run(optax.named_chain(("clip", optax.identity()), ("ours", contender())), params)
    assert set(state) == {"clip", "ours"}
    assert_same(got, run(contender(), params)[0], off=1e-5)


@PART.use("`flatten`")
def flattened(contender: Contender) -> None:
    """All leaves, as one vector, move."""
    params = parameters(contender)
    assert_moved(run(optax.flatten(contender()), params, 1)[0], params)


@PART.use("`contrib.schedule_free`")
def schedule_free(contender: Contender) -> None:
    """Parameters move and are finite, and so are those to evaluate with."""
    params = parameters(contender)
    tx = optax.contrib.schedule_free(contender(), RATE, b1=0.9)
    after, state = run(tx, params)
    assert_moved(after, params)
    assert_moved(optax.contrib.schedule_free_eval_params(state, after), params)


@PART.use("`lookahead`")
def lookahead(contender: Contender) -> None:
    """Fast and slow parameters both move."""
    params = parameters(contender)
    both = optax.LookaheadParams.init_synced(params)
    tx = optax.lookahead(contender(), sync_period=2, slow_step_size=0.5)
    state = tx.init(both)
    for i in range(4):
        updates, state = tx.update(gradients(params, i), state, both)
        both = optax.apply_updates(both, updates)
    assert_moved(both.fast, params)
    assert_moved(both.slow, params)


@PART.use("`contrib.sam`")
def sam(contender: Contender) -> None:
    """A step against the gradient that an adversarial one finds."""
    params = parameters(contender)
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    tx = optax.contrib.sam(contender(), adversary, sync_period=2, opaque_mode=True)

    def grad_fn(params: Any, _: Any) -> Any:
        return gradients(params, 0)

    step = jax.jit(partial(tx.update, grad_fn=grad_fn))
    updates, _ = step(gradients(params), tx.init(params), params)
    assert_moved(optax.apply_updates(params, updates), params)


@PART.use("`contrib.reduce_on_plateau`")
def plateau(contender: Contender) -> None:
    """Steps become smaller as the loss that `update` is given does not fall."""
    params = parameters(contender)
    tx = optax.chain(contender(), optax.contrib.reduce_on_plateau(factor=0.5, patience=1))
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(4):
        _, state = update(gradients(params, i), state, params, value=1.0)
    assert float(state[1].scale) < 1.0


@PART.use("`contrib.mechanize`")
def mechanized(contender: Contender) -> None:
    """The rate is learned, and the matrix moves."""
    params = parameters(contender)
    assert_moved(_ours(run(optax.contrib.mechanize(contender()), params)[0]), _ours(params))


@PART.use("`apply_every`, `ema`, `add_noise`, `keep_params_nonnegative` around it")
def around(contender: Contender) -> None:
    """Parameters keep shapes and dtypes, and are finite."""
    params = parameters(contender)
    for tx in (
        optax.chain(contender(), optax.ema(0.5)),
        optax.chain(optax.add_noise(0.1, 0.5, 0), contender()),
        optax.chain(contender(), optax.keep_params_nonnegative()),
        optax.chain(contender(), optax.apply_every(2)),
    ):
        after, _ = run(tx, params, 1) if contender.ternary else run(tx, params)
        assert jax.tree.map(lambda p: (p.shape, p.dtype), after) == jax.tree.map(lambda p: (p.shape, p.dtype), params)
        assert bool(_is_finite(after))


@PART.use("parameters averaged by `incremental_update`, `ema`")
def averaged(contender: Contender) -> None:
    """The average moves, and is finite."""
    params = parameters(contender)
    mean, after, state = params, params, contender().init(params)
    average = optax.ema(0.9)
    kept = average.init(params)
    for i in range(3):
        after, state = one(contender(), after, gradients(params, i), state)
        mean = optax.incremental_update(after, mean, 0.5)
        smooth, kept = average.update(after, kept)
    assert_moved(mean, params)
    assert_moved(smooth, params)


@PART.use("`with_extra_args_support`")
def extra(contender: Contender) -> None:
    """`update` takes what it does not know."""
    params = parameters(contender)
    tx = optax.with_extra_args_support(contender())
    updates, _ = tx.update(gradients(params), tx.init(params), params, value=1.0)
    assert_moved(optax.apply_updates(params, updates), params)


# Learning rates

SCHEDULES: dict[str, Callable[[], Callable[[Any], Any]]] = {
    "constant_schedule": lambda: optax.constant_schedule(RATE),
    "linear_schedule": lambda: optax.linear_schedule(RATE, 0.0, 4),
    "cosine_decay_schedule": lambda: optax.cosine_decay_schedule(RATE, 4),
    "warmup_cosine_decay_schedule": lambda: optax.warmup_cosine_decay_schedule(0.0, RATE, 2, 4),
    "exponential_decay": lambda: optax.exponential_decay(RATE, 2, 0.5),
    "piecewise_constant_schedule": lambda: optax.piecewise_constant_schedule(RATE, {2: 0.1}),
    "polynomial_schedule": lambda: optax.polynomial_schedule(RATE, 0.0, 2, 4),
    "join_schedules": lambda: optax.join_schedules(
        [optax.linear_schedule(0.0, RATE, 2), optax.constant_schedule(RATE)], [2]
    ),
    "sgdr_schedule": lambda: optax.sgdr_schedule(
        [{"init_value": 0.0, "peak_value": RATE, "decay_steps": 3, "warmup_steps": 1}] * 2
    ),
    "cosine_onecycle_schedule": lambda: optax.cosine_onecycle_schedule(4, RATE),
}


def scheduled(make: Callable[[], Callable[[Any], Any]], contender: Contender) -> None:
    """The run is the one whose rate is set by hand before each step."""
    params = wanted = parameters(contender)
    schedule = make()
    state = contender(learning_rate=RATE).init(params)
    for i in range(3):
        rate = float(schedule(i))
        wanted, state = one(contender(learning_rate=rate), wanted, gradients(params, i), state)
    got, _ = run(contender(learning_rate=schedule), params)
    assert_same(got, wanted, off=1e-5)


for name, make in SCHEDULES.items():
    SCHEDULED.use(f"`{name}`", reasons=FIXED, works_if=scheduled.__doc__)(partial(scheduled, make))


@SCHEDULED.use("an array as learning rate, traced", reasons=FIXED)
def traced(contender: Contender) -> None:
    """A compiled step takes it as an argument, and is the one with the number."""
    params = parameters(contender)

    @jax.jit
    def step(rate: Any, params: Any, grads: Any) -> Any:
        tx = contender(learning_rate=rate)
        return one(tx, params, grads)[0]

    assert_same(step(jnp.float32(RATE), params, gradients(params)), run(contender(), params, 1)[0], off=1e-5)


@SCHEDULED.use("`inject_hyperparams`, set between steps", reasons=FIXED)
def injected(contender: Contender) -> None:
    """The rate that is put into the state is the one of the next step, without compiling anew."""
    params = parameters(contender)
    make = optax.inject_hyperparams(contender.make, static_args=static_args(contender))
    tx = make(**contender.settings)
    state, step = tx.init(params), stepper(tx)
    after, state = step(params, state, gradients(params))
    state.hyperparams["learning_rate"] = jnp.float32(0.0)
    same, _ = step(after, state, gradients(params, 1))
    assert_same(same, after)
    assert step._cache_size() == 1
    assert_same(after, run(contender(), params, 1)[0], off=1e-5)


@SCHEDULED.use("`inject_hyperparams`, with a schedule", reasons=FIXED)
def injected_schedule(contender: Contender) -> None:
    """The run is the one with the schedule itself."""
    params, schedule = parameters(contender), optax.linear_schedule(RATE, 0.0, 4)
    make = optax.inject_hyperparams(contender.make, static_args=static_args(contender))
    tx = make(**{**contender.settings, "learning_rate": schedule})
    assert_same(run(tx, params)[0], run(contender(learning_rate=schedule), params)[0], off=1e-5)
