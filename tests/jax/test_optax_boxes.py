"""Names of mesh axes, in trees of specs or in Flax's boxes: an array of the state has those of the axes it has."""

import os
import subprocess
import sys
from pathlib import Path

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from factories import every_factory, gradients, jitted, over, run
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

import fusedbun_jax as fj
from fusedbun_jax import state_shardings

SHAPES = {"kernel": (8, 64), "bias": (64,), "conv": (2, 2, 8, 16), "plain": (8, 4)}
NAMES = {"kernel": ("a", "b"), "bias": ("b",), "conv": (None, None, "a", "b")}
boxed = over(["recommended", "fusedbunw", "sm3-momentum", "mup_adamw", "decoupled_lionw"])


def along(name, x):
    """The names of the axes along which an array has its parameter's size."""
    names = NAMES.get(name, ())
    return tuple(
        axis if n == SHAPES[name][i] else None for i, (axis, n) in enumerate(zip(names, x.shape, strict=False))
    )


def arrays():
    return gradients({name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in SHAPES.items()}, 7)


def in_linen(tree):
    return {name: nn.Partitioned(x, NAMES[name]) if name in NAMES else x for name, x in tree.items()}


class Model(nnx.Module):
    def __init__(self, params, key="out_sharding"):
        for name, x in params.items():
            setattr(self, name, nnx.Param(x, **({key: NAMES[name]} if name in NAMES else {})))


def trees(state):
    return [tree for part in state if hasattr(part, "_asdict") for tree in part]


@boxed
def test_linens_boxes_have_the_names_of_the_arrays_axes(factory):
    tx, params = factory(), in_linen(arrays())
    state = tx.init(params)
    for tree in trees(state):
        for name, box in tree.items():
            assert (box.names if name in NAMES else ()) == along(name, box.value if name in NAMES else box)
    specs = nn.get_partition_spec(state)
    assert specs.count == P()
    assert jax.tree.structure(jax.tree.map(lambda x: 0, specs, is_leaf=lambda x: isinstance(x, P))).num_leaves > 1


@boxed
def test_in_boxes_the_steps_are_the_same(factory):
    tx = factory()
    want, state = run(tx, arrays(), 2)
    got, got_state = in_linen(arrays()), tx.init(in_linen(arrays()))
    for i in range(2):
        grads = in_linen(gradients(arrays(), i))
        got, got_state = tx.step(grads, got_state, got) if i else jitted(tx)(got, got_state, grads)
    chex.assert_trees_all_close(nn.unbox((got, got_state)), (want, state), rtol=1e-5, atol=1e-6)
    assert got["kernel"].names == NAMES["kernel"]


def test_a_box_of_ones_own_names_and_a_train_state():
    kernel = nn.LogicallyPartitioned(jnp.ones((8, 64)), ("embed", "mlp"))
    state = TrainState.create(apply_fn=None, params={"kernel": kernel}, tx=fj.fusedbunw(0.1, momentum_dtype="int4"))
    specs = nn.get_partition_spec(state).opt_state
    assert specs.sm3_accumulate.axis0["kernel"] == P("embed", None)
    assert specs.sm3_accumulate.axis1["kernel"] == P(None, "mlp")
    assert specs.momentum.moment["kernel"] == specs.momentum.moment_exponents["kernel"] == P("embed", None)
    assert isinstance(state.opt_state.momentum.moment["kernel"], nn.LogicallyPartitioned)


@boxed
@pytest.mark.parametrize("key", ["out_sharding", "optimizer_sharding"])
def test_nnxs_variables_have_the_names_of_the_arrays_axes(factory, key):
    with nnx.use_eager_sharding(False):  # which needs a mesh
        model = Model(arrays(), key)
        optimizer = nnx.Optimizer(model, factory(), wrt=nnx.Param)
    found = 0
    for path, x in jax.tree.leaves_with_path(optimizer.opt_state, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        name = next((key.key for key in path if getattr(key, "key", None) in SHAPES), None)
        if name in NAMES:
            assert x.get_metadata()["out_sharding"] == along(name, x.get_value())
            found += 1
    assert found >= len(NAMES)
    assert model.kernel.get_metadata()[key] == NAMES["kernel"]  # the parameter's own are left alone
    optimizer.update(model, nnx.grad(lambda m: jnp.sum(m.kernel**2) + jnp.sum(m.conv))(model))
    after = nnx.state(optimizer)["opt_state"]
    assert all(
        isinstance(x, nnx.Variable) for x in jax.tree.leaves(after, is_leaf=lambda x: isinstance(x, nnx.Variable))
    )


# ---- rules that go by the parameters' tree


@every_factory
def test_a_rule_over_specs_makes_the_shardings_of_the_state(factory):
    mesh = AbstractMesh((2, 4), ("a", "b"))
    tx, params = factory(), {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in SHAPES.items()}
    specs = {name: P(*NAMES.get(name, ())) for name in SHAPES}
    state = jax.eval_shape(tx.init, params)

    def rule(x, spec):
        return NamedSharding(mesh, P(*(axis if n > 1 else None for axis, n in zip(spec, x.shape, strict=False))))

    found = optax.tree.map_params(
        tx, rule, state, specs, transform_non_params=lambda _: NamedSharding(mesh, P()), is_leaf=None
    )
    wanted = state_shardings(tx, params, specs, mesh=mesh)
    for x, a, b in zip(*map(jax.tree.leaves, (state, found, wanted)), strict=True):
        assert a.is_equivalent_to(b, x.ndim)


def test_subtrees_that_are_like_the_parameters_are_recognised():
    params = arrays()
    state, structure = fj.fusedbunw(0.1).init(params), jax.tree.structure(params)

    def is_like(tree):
        return jax.tree.structure(tree) == structure

    specs = {name: P(*NAMES.get(name, ())) for name in SHAPES}
    found = jax.tree.map(lambda x: specs if is_like(x) else P(), state, is_leaf=is_like)
    assert found.momentum.moment == found.sm3_accumulate.axis3 == specs
    assert found.count == P()


# ---- trained on eight devices

TRAINED = """
import flax.linen as nn, jax, jax.numpy as jnp, numpy as np
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import fusedbun_jax as fj

X = np.random.default_rng(5).standard_normal((16, 64)).astype(np.float32)
mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        return nn.Dense(1)(nn.relu(nn.Dense(64, kernel_init=kernel)(x)))

class Net(nnx.Module):
    def __init__(self, rngs):
        kernel = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("a", "b"))
        self.hidden = nnx.Linear(64, 64, rngs=rngs, kernel_init=kernel)
        self.out = nnx.Linear(64, 1, rngs=rngs)
    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))

for make in (fj.fusedbunw, fj.fusedbun):
    model, tx = Linen(), make(0.01)
    def init():
        params = model.init(jax.random.key(0), X)["params"]
        return TrainState.create(apply_fn=lambda p, x: model.apply({"params": p}, x), params=params, tx=tx)
    specs = nn.logical_to_mesh(nn.get_partition_spec(jax.eval_shape(init)), (("in", "a"), ("out", "b")))
    held = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))
    state = jax.jit(init, out_shardings=held)()
    assert state.opt_state.sm3_accumulate.axis0["Dense_1"]["kernel"].value.sharding.spec == P("a", None)
    @jax.jit
    def step(state):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((state.apply_fn(p, X) - X[:, :1]) ** 2))(state.params)
        return state.apply_gradients(grads=grads), loss
    losses = []
    for _ in range(20):
        state, loss = step(state)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0], losses

    with jax.set_mesh(mesh):
        network = Net(nnx.Rngs(0))
        optimizer = nnx.Optimizer(network, make(0.01), wrt=nnx.Param)
        kernel = optimizer.opt_state.sm3_accumulate.axis1["hidden"]["kernel"]
        assert kernel.get_value().sharding.spec == P(None, "b"), kernel
        @nnx.jit
        def update(network, optimizer):
            loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(X) - X[:, :1]) ** 2))(network)
            optimizer.update(network, grads)
            return loss
        losses = [float(update(network, optimizer)) for _ in range(20)]
        assert losses[-1] < 0.5 * losses[0], losses
"""


@pytest.mark.long
def test_eight_devices_train_from_the_boxes():
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-c", TRAINED], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
