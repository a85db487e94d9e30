"""`with_metrics`: exact numbers, everywhere an optimizer can stand."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from factories import FACTORIES, described, gradients, jitted, over, parameters, run, stepper, sweep_of_factories
from flax import nnx

import fusedbun
from fusedbun_jax import MetricsState, with_metrics

NORMS = ("param", "update", "grad")
WITHOUT_MOMENT = {"sm3", "scaled_optum", "ternary_vote"}


def keys(names, moment):
    metrics = [f"l2_norm/{v}" for v in NORMS] + ["cosine/update_grad"]
    return {
        f"{m}/{n}" for m in (*metrics, *(("l2_norm/moment", "cosine/moment_grad") if moment else ())) for n in names
    }


def by_numpy(name, before, after, grad, moment=None):
    """The metrics of one parameter in float64."""
    before, after, grad = (np.asarray(x, np.float64).ravel() for x in (before, after, grad))
    update = before - after

    def norm(x):
        return np.sqrt((x * x).sum())

    def cosine(a, b):
        return (a * b).sum() / (norm(a) * norm(b)) if norm(a) and norm(b) else 0.0

    found = {"l2_norm/param": norm(after), "l2_norm/update": norm(update), "l2_norm/grad": norm(grad)}
    found["cosine/update_grad"] = cosine(update, grad)
    if moment is not None:
        moment = np.asarray(moment, np.float64).ravel()
        found |= {"l2_norm/moment": norm(moment), "cosine/moment_grad": cosine(moment, grad)}
    return {f"{metric}/{name}": value for metric, value in found.items()}


@sweep_of_factories
def test_metrics_equal_plain_numpy(factory, x64):
    """To 1e-12, after each of three steps; the updates are those without metrics."""
    tx, params = with_metrics(factory()), factory.parameters(jnp.float64)
    state = tx.init(params)
    assert all(value == 0 for value in state.metrics.values())
    plain = params, factory().init(params)
    for i in range(3):
        grads = gradients(params, i)
        after, new = jitted(tx)(params, state, grads)
        plain = jitted(factory())(*plain, grads)
        chex.assert_trees_all_close((after, new.inner_state), plain, rtol=1e-12)
        moments = optax.tree.get(new.inner_state, "moment", {"layer": dict.fromkeys(params["layer"])})
        expected = {}
        for leaf in params["layer"]:
            arrays = (tree["layer"][leaf] for tree in (params, after, grads, moments))
            expected |= by_numpy(f"layer.{leaf}", *arrays)
        assert new.metrics.keys() == state.metrics.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_allclose(new.metrics[key], value, rtol=1e-12, atol=1e-14, err_msg=key)
        params, state = after, new


@pytest.mark.parametrize("name", FACTORIES)
def test_there_is_a_moment_only_where_the_optimizer_has_one(name):
    params = {"a": jnp.ones((3, 4)), "b": [jnp.ones(3)]}
    state = with_metrics(FACTORIES[name]()).init(params)
    assert isinstance(state, MetricsState)
    assert set(state.metrics) == keys(["a", "b.0"], name not in WITHOUT_MOMENT)


def test_the_cosine_with_a_zero_vector_is_0():
    params = {"zeros": jnp.zeros(3), "still": jnp.ones(3)}
    tx = with_metrics(FACTORIES["decoupled_lionw"](0.0))
    _, state = jitted(tx)(params, tx.init(params), {"zeros": jnp.ones(3), "still": jnp.zeros(3)})
    found = {key: float(value) for key, value in state.metrics.items()}
    assert found["l2_norm/param/zeros"] == 0
    assert found["cosine/update_grad/zeros"] == found["cosine/update_grad/still"] == 0
    assert found["cosine/moment_grad/zeros"] == pytest.approx(1)
    assert found["cosine/moment_grad/still"] == 0


def test_a_nan_shows():
    params = {"a": jnp.ones(3)}
    tx = with_metrics(FACTORIES["fusedbun"]())
    _, state = jitted(tx)(params, tx.init(params), {"a": jnp.array([1.0, jnp.nan, 0.0])})
    assert all(jnp.isnan(value) for value in state.metrics.values())


@over(["recommended", "scaled_optum", "mup_adam"])
def test_the_state_is_stable_under_scan_and_its_types_under_every_dtype(factory):
    tx, params = with_metrics(factory()), parameters()
    start = params, tx.init(params)
    expected = start
    for _ in range(3):
        expected = jitted(tx)(*expected, gradients(params))
    got, _ = jax.lax.scan(lambda c, _: (stepper(tx)(*c, gradients(params)), None), start, length=3)
    chex.assert_trees_all_close(got, expected, rtol=1e-5)
    for dtype in ("bfloat16", "float16"):
        narrow = parameters(dtype)
        state = jax.eval_shape(tx.init, narrow)
        assert described(jax.eval_shape(stepper(tx), narrow, state, narrow)) == described((narrow, state))
        assert {x.dtype.name for x in state.metrics.values()} == {"float32"}


def test_of_parameters_of_16_bits_the_rounded_step_is_measured():
    params = {"a": jnp.full(1000, 1.0, jnp.bfloat16)}
    tx = with_metrics(FACTORIES["scaled_optum"](2**-7 + 2**-9, weight_decay=0.0))
    after, state = jitted(tx)(params, tx.init(params), {"a": jnp.full(1000, 0.01, jnp.bfloat16)})
    step = 1.0 - float(after["a"][0])
    assert step == 2**-7  # the exact one ends halfway between two numbers of bfloat16, and goes to the even one
    assert state.metrics["l2_norm/update/a"] == pytest.approx(step * 1000**0.5, rel=1e-6)
    assert state.metrics["l2_norm/grad/a"] == pytest.approx(float(jnp.bfloat16(0.01)) * 1000**0.5, rel=1e-6)


def inner_metrics(tx, params, steps=2):
    _, state = run(with_metrics(tx), params, steps)
    return state.metrics


def test_multi_steps_inside():
    params, tx = parameters(), with_metrics(optax.MultiSteps(FACTORIES["recommended"](), 2).gradient_transformation())
    after, state = run(tx, params, 1)
    chex.assert_trees_all_equal(after, params)
    assert state.metrics["l2_norm/update/layer.kernel"] == state.metrics["cosine/update_grad/layer.kernel"] == 0
    assert state.metrics["l2_norm/grad/layer.kernel"] > 0
    after, state = run(tx, after, range(1, 2), state)
    expected = by_numpy(
        "layer.kernel", params["layer"]["kernel"], after["layer"]["kernel"], gradients(params, 1)["layer"]["kernel"]
    )
    for key, value in expected.items():
        assert state.metrics[key] == pytest.approx(value, rel=1e-5)
    assert state.metrics["l2_norm/moment/layer.kernel"] > 0


def test_injected_numbers_inside():
    factory = FACTORIES["mup_adamw"]
    got = inner_metrics(factory.injected(), parameters())
    chex.assert_trees_all_close(got, inner_metrics(factory(), parameters()), rtol=1e-5)


def test_masked_and_partitioned_inside():
    """What is masked, or stepped by another's optimizer, has no moment; what is no real number has no metrics."""
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones(4), "count": jnp.int32(3)}
    masked = optax.masked(FACTORIES["fusedbun"](), {"a": True, "b": False, "count": False})
    labels = {"a": "ours", "b": "theirs", "count": "still"}
    theirs = {"theirs": optax.adam(0.1), "still": optax.set_to_zero()}
    partitioned = optax.partition({"ours": FACTORIES["fusedbun"](), **theirs}, labels)
    found = []
    for inner in (masked, partitioned):
        tx = with_metrics(inner)
        step, state = jitted(tx), tx.init(params)
        grads = {**gradients({"a": params["a"], "b": params["b"]}), "count": jnp.int32(0)}
        _, state = step(params, state, grads)
        assert set(state.metrics) == keys(["a"], True) | keys(["b"], False)
        found.append({key: value for key, value in state.metrics.items() if key.endswith("/a")})
    chex.assert_trees_all_close(found[0], found[1], rtol=1e-6)


def test_inside_a_chain_and_around_one():
    params = parameters()
    outside = with_metrics(optax.chain(optax.clip(0.5), FACTORIES["recommended"]()))
    inside = optax.chain(optax.clip(0.5), with_metrics(FACTORIES["recommended"]()))
    (_, a), (_, b) = run(outside, params, 2), run(inside, params, 2)
    grads = gradients(params, 1)["layer"]["bias"]
    assert a.metrics["l2_norm/grad/layer.bias"] == pytest.approx(float(jnp.linalg.norm(grads)))
    clipped = optax.tree.get(b, "metrics")["l2_norm/grad/layer.bias"]
    assert clipped == pytest.approx(float(jnp.linalg.norm(jnp.clip(grads, -0.5, 0.5))))
    assert a.metrics["l2_norm/update/layer.bias"] == pytest.approx(
        float(optax.tree.get(b, "metrics")["l2_norm/update/layer.bias"]), rel=1e-6
    )


def test_the_parameters_are_needed_and_may_be_numpys():
    params = {"a": np.ones(3, np.float32), "b": 2.0}
    tx = with_metrics(FACTORIES["fusedbun"]())
    _, state = tx.update(params, tx.init(params), params)
    assert state.metrics["l2_norm/grad/b"] == 2.0
    with pytest.raises(ValueError, match="with_metrics needs the parameters"):
        tx.update(params, tx.init(params))


def test_flax_names():
    linen = nn.Dense(4).init(jax.random.key(0), jnp.ones((1, 3)))
    tx = with_metrics(FACTORIES["fusedbun"]())
    _, state = run(tx, linen, 1)
    assert set(state.metrics) == keys(["params.kernel", "params.bias"], True)
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    assert set(nnx.to_pure_dict(nnx.state(optimizer))["opt_state"]["metrics"]) == keys(["kernel", "bias"], True)
    optimizer.update(model, nnx.state(model, nnx.Param))
    found = nnx.to_pure_dict(nnx.state(optimizer))["opt_state"]["metrics"]
    assert set(found) == keys(["kernel", "bias"], True)
    assert found["l2_norm/update/kernel"] > 0


TORCH = {
    "recommended": (fusedbun.Fusedbun, {"centralize": True, "use_rms": True, "nesterov": True}),
    "decoupled_lionw": (fusedbun.DecoupledLionW, {"weight_decay": 1e-4}),
    "sm3": (fusedbun.SM3, {}),
}


@pytest.mark.parametrize("name", TORCH)
def test_metrics_equal_torchs(name, x64):
    make, settings = TORCH[name]
    params = parameters(jnp.float64)["layer"]
    _, state = run(with_metrics(FACTORIES[name](0.1)), params, 3)
    weights = {leaf: torch.nn.Parameter(torch.tensor(np.array(p))) for leaf, p in params.items()}
    optimizer = make(weights.values(), lr=0.1, **settings)
    optimizer.record_metrics = True
    for i in range(3):
        for leaf, g in gradients(params, i).items():
            weights[leaf].grad = torch.tensor(np.array(g))
        optimizer.step()
    reported = {}
    for leaf, weight in weights.items():
        optimizer.report_per_parameter_metrics(weight, leaf, reported)
    assert reported.keys() == state.metrics.keys()
    for key, value in reported.items():
        np.testing.assert_allclose(state.metrics[key], float(value), rtol=1e-10, atol=1e-14, err_msg=key)
