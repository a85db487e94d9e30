"""u-muP in optax: where the types come from, what a parameter's fan-in is, and what the weight decay follows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from factories import gradients, jitted, run, shared
from flax import nnx
from flax.core import FrozenDict

import fusedbun
from fusedbun_jax import flax_channel_axis, mup_adam, mup_adamw, mup_sgd

SHAPES = {"hidden": {"kernel": (3, 8), "bias": (8,)}, "norm": {"scale": (8,)}, "out": {"kernel": (8, 2)}}
TYPES = {"hidden": {"kernel": "weight", "bias": ("bias", 4)}, "norm": {"scale": "norm"}, "out": {"kernel": "output"}}
NAMED = {"hidden.kernel": "weight", "hidden.bias": ("bias", 4), "norm.scale": "norm", "out.kernel": "output"}
SCALES = {"hidden": {"kernel": 3**-0.5, "bias": 0.5}, "norm": {"scale": 1.0}, "out": {"kernel": 1.0}}


def parameters(dtype=jnp.float32):
    rng = np.random.default_rng(4)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.standard_normal(s), dtype), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


def rule(path, param):
    assert param.shape == SHAPES[path[0]][path[1]]
    return TYPES[path[0]][path[1]]


GIVEN = {"by name": NAMED, "tree": TYPES, "FrozenDict": FrozenDict(TYPES), "rule": rule}


@pytest.mark.parametrize("mup", GIVEN.values(), ids=GIVEN.keys())
def test_types_scale_the_learning_rate(mup):
    """A first step of SGD is the learning rate times the scale times the gradient."""
    params = parameters()
    tx = mup_sgd(0.5, mup=mup, channel_axis=flax_channel_axis)
    updates, _ = jax.jit(tx.update)(gradients(params), tx.init(params), params)
    expected = jax.tree.map(lambda g, scale: -0.5 * scale * g, gradients(params), SCALES)
    jax.tree.map(lambda u, e: np.testing.assert_allclose(u, e, rtol=1e-6), updates, expected)


def test_a_tree_of_types_may_have_any_nodes():
    params = [(jnp.ones((4, 9)), jnp.ones(9)), {"x": jnp.ones((2, 9))}]
    for mup in ([("weight", "bias"), {"x": ("weight", 4)}], {"0": ["weight", "bias"], "1.x": ("weight", 4)}):
        tx = mup_sgd(1.0, mup=mup, channel_axis=0)
        updates, _ = tx.update(params, tx.init(params), params)
        found = [float(-u.ravel()[0]) for u in jax.tree.leaves(updates)]
        assert found == pytest.approx([1 / 3, 1.0, 1 / 6])


@pytest.mark.parametrize(
    ("shape", "fan_in"), [((), 1), ((5,), 5), ((2, 5), 2), ((3, 4, 5), 12), ((2, 2, 3, 5), 12)], ids=str
)
def test_the_fan_in_of_flax_kernels_is_every_axis_but_the_last(shape, fan_in):
    params = {"kernel": jnp.ones(shape)}
    tx = mup_sgd(1.0, mup={"kernel": "weight"}, channel_axis=flax_channel_axis)
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -(fan_in**-0.5), rtol=1e-6)


@pytest.mark.parametrize("make", [mup_adam, mup_adamw, mup_sgd])
def test_a_missing_type_names_leaf_and_shape(make):
    params = parameters()
    tx = make(0.1, mup={"hidden": TYPES["hidden"], "norm.scale": "norm"})
    with pytest.raises(ValueError, match=r"parameter 'out\.kernel' of shape \(8, 2\) has no u-muP type") as raised:
        tx.init(params)
    assert "leaf \"['out']['kernel']\"" in "".join(raised.value.__notes__)
    allowed = make(0.1, mup={"hidden": TYPES["hidden"], "norm.scale": "norm"}, allow_non_unit_scaling_params=True)
    allowed.update(params, allowed.init(params), params)


@pytest.mark.parametrize(("mup", "message"), [("heavy", "must be 'weight'"), (("weight", 0), "depth"), (3, "mapping")])
def test_a_wrong_type_is_an_error(mup, message):
    with pytest.raises((TypeError, ValueError), match=message):
        mup_adam(0.1, mup=mup if mup == 3 else {"a": mup}).init({"a": jnp.ones((2, 3))})


class Network(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(3, 8, rngs=rngs)
        self.out = nnx.Linear(8, 2, use_bias=False, rngs=rngs)


def nnx_rule(path, param):
    return {"hidden": "weight" if "kernel" in path else "bias", "out": "output"}[path[0]]


def test_nnx_takes_a_rule_names_and_a_tree():
    model = Network(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    named = {"hidden.kernel": "weight", "hidden.bias": "bias", "out.kernel": "output"}
    tree = jax.tree_util.tree_map_with_path(
        lambda path, p: nnx_rule(tuple(str(getattr(k, "key", k)) for k in path), p), params
    )
    found = []
    for mup in (nnx_rule, named, tree):
        tx = mup_sgd(1.0, mup=mup, channel_axis=flax_channel_axis)
        updates, _ = tx.update(params, tx.init(params), params)
        found.append(
            [
                float((u / p).ravel()[0])
                for u, p in zip(*map(jax.tree.leaves, (updates, params)), strict=True)
                if p.any()
            ]
        )
    assert found[0] == found[1] == found[2]
    assert found[0] == pytest.approx([-(3**-0.5), -1.0])
    optimizer = nnx.Optimizer(model, mup_adamw(0.1, mup=named), wrt=nnx.Param)
    before = model.hidden.kernel[...]
    optimizer.update(model, params)
    np.testing.assert_allclose(jnp.abs(model.hidden.kernel[...] - before), 0.1 / 8**0.5, rtol=1e-4)


WRAPPED = {
    "masked": lambda tx: optax.masked(tx, jax.tree.map(lambda _: True, SCALES)),
    "partition": lambda tx: optax.partition({"all": tx}, jax.tree.map(lambda _: "all", SCALES)),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
}
ADAMW = {"weight_decay": 1e-2, "mup": rule, "channel_axis": flax_channel_axis}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
def test_wrappers_hand_on_names_and_shapes(wrap):
    params = parameters()
    expected, _ = run(shared(mup_adamw, learning_rate=0.1, **ADAMW), params, 2)
    got, _ = run(wrap(mup_adamw(0.1, **ADAMW)), params, 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)


@pytest.mark.parametrize("mup", GIVEN.values(), ids=GIVEN.keys())
def test_injected_numbers_beside_static_types(mup):
    params, settings = parameters(), {**ADAMW, "mup": mup}
    make = optax.inject_hyperparams(mup_adamw)
    expected, _ = run(shared(mup_adamw, learning_rate=0.1, **ADAMW), params, 2)
    for rate in (0.1, lambda count: 0.1):
        initial = {"initial_learning_rate": 0.1} if callable(rate) else {}
        got, _ = run(make(rate, **initial, **settings), params, 2)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)


HALVES = optax.piecewise_constant_schedule(0.25, {1: 0.5})  # 0.25, 0.125, …


@pytest.mark.parametrize("rate", [0.25, HALVES], ids=["constant", "scheduled"])
def test_the_decay_follows_the_schedule_but_not_the_scale(rate, x64):
    """Without a gradient AdamW multiplies a weight by `1 - weight_decay*rate/initial rate`, whatever its scale."""
    params = parameters(jnp.float64)
    initial = {} if rate == 0.25 else {"initial_learning_rate": 0.25}
    tx = mup_adamw(rate, **ADAMW, **initial)
    still, state, got = jax.tree.map(jnp.zeros_like, params), tx.init(params), params
    for _ in range(2):
        got, state = jitted(tx)(got, state, still)
    factor = (1 - 1e-2) * (1 - 1e-2 * (1.0 if rate == 0.25 else 0.5))
    jax.tree.map(lambda a, p: np.testing.assert_allclose(a, factor * p, rtol=1e-12), got, params)


def test_a_decay_that_is_not_independent_is_multiplied_by_rate_and_scale(x64):
    params = parameters(jnp.float64)
    tx = mup_adamw(HALVES, **ADAMW, independent_weight_decay=False)
    still = jax.tree.map(jnp.zeros_like, params)
    got, _ = jitted(tx)(params, tx.init(params), still)
    jax.tree.map(
        lambda a, p, scale: np.testing.assert_allclose(a, p * (1 - 0.25 * scale * 1e-2), rtol=1e-12),
        got,
        params,
        SCALES,
    )


@pytest.mark.parametrize("make", [mup_adam, mup_adamw, mup_sgd])
def test_the_initial_learning_rate(make):
    with pytest.raises(ValueError, match="give initial_learning_rate, the learning rate that the weight decay"):
        make(HALVES, weight_decay=0.1, mup=rule)
    make(HALVES, mup=rule)  # nothing decays
    make(HALVES, weight_decay=0.1, independent_weight_decay=False, mup=rule)
    for zero in ({"learning_rate": 0.0}, {"learning_rate": HALVES, "initial_learning_rate": 0.0}):
        with pytest.raises(ValueError, match=r"must lie in \(0, inf\), but it is 0.0"):
            make(**zero, weight_decay=0.1, mup=rule)
    with pytest.raises(ValueError, match="initial_lr"):
        make(HALVES, initial_learning_rate=-1.0, mup=rule)


PAIRS = {
    "adam": (mup_adam, fusedbun.MupAdam, {"weight_decay": 1e-3, "amsgrad": True}),
    "adamw": (mup_adamw, fusedbun.MupAdamW, {"weight_decay": 1e-3}),
    "sgd": (mup_sgd, fusedbun.MupSGD, {"momentum": 0.9, "dampening": 0.5, "weight_decay": 1e-3}),
    "sgd readout": (mup_sgd, fusedbun.MupSGD, {"readout_constraint": "to_output_scale"}),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_flax_network_trains_as_the_transposed_torch_one(name, x64):
    ours, theirs, settings = PAIRS[name]
    rate = 1e-4 if "readout" in name else 0.05
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((16, 3)), rng.standard_normal((16, 2))
    params = parameters(jnp.float64)

    def loss(p):
        hidden = jnp.tanh((x @ p["hidden"]["kernel"] + p["hidden"]["bias"]) * p["norm"]["scale"])
        return jnp.mean((hidden @ p["out"]["kernel"] - y) ** 2)

    tx = ours(rate, mup=TYPES, channel_axis=flax_channel_axis, **settings)

    @jax.jit
    def step(p, state):
        updates, state = tx.update(jax.grad(loss)(p), state, p)
        return optax.apply_updates(p, updates), state

    got, state = params, tx.init(params)
    for _ in range(10):
        got, state = step(got, state)

    weights = {
        name: torch.nn.Parameter(torch.tensor(np.array(params[name.split(".")[0]][name.split(".")[1]]).T))
        for name in NAMED
    }
    optimizer = theirs(list(weights.items()), lr=rate, mup=NAMED, **settings)
    for _ in range(10):
        optimizer.zero_grad()
        linear = torch.tensor(x) @ weights["hidden.kernel"].T + weights["hidden.bias"]
        hidden = torch.tanh(linear * weights["norm.scale"])
        ((hidden @ weights["out.kernel"].T - torch.tensor(y)) ** 2).mean().backward()
        optimizer.step()
    for name, weight in weights.items():
        layer, leaf = name.split(".")
        np.testing.assert_allclose(got[layer][leaf], weight.detach().numpy().T, rtol=1e-10, err_msg=name)
        assert not np.allclose(got[layer][leaf], params[layer][leaf], rtol=1e-3)
