"""Shardings: those of the parameters are kept, and several devices compute what one does."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
from factories import FACTORIES, gradients, jitted, sweep_of_factories
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sweeps import only, sweep

FOUR_DEVICES = """
import chex, jax, numpy as np
from factories import FACTORIES, gradients, jitted, run, stepper
from fusedbun_jax import with_metrics
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import sys

compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
)
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
specs = {"kernel": P("a", "b"), "rows": P("a"), "columns": P(None, "b"), "bias": P("b")}
shapes = {"kernel": (4, 6), "rows": (8, 3), "columns": (3, 8), "bias": (6,)}
plain = gradients({name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}, 9)

def place(tree):
    return {name: jax.device_put(tree[name], NamedSharding(mesh, specs[name])) for name in tree}

for name in sys.argv[1:]:
    tx = with_metrics(FACTORIES[name]())
    step = jitted(tx)
    placed = place(plain)
    params, state = placed, tx.init(placed)
    assert state.inner_state.count.sharding.is_equivalent_to(NamedSharding(mesh, P()), 0)
    for path, x in jax.tree.leaves_with_path(state.inner_state._replace(count=None)):
        leaf = [k.key for k in path if getattr(k, "key", None) in specs][0]
        spec = [*specs[leaf], None][: x.ndim]
        expected = P(*(axis if x.shape[i] == shapes[leaf][i] else None for i, axis in enumerate(spec)))
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, expected), x.ndim), (name, path, x.sharding)
    for i in range(3):
        params, state = step(params, state, place(gradients(params, i)))
        for leaf, p in params.items():
            assert p.sharding.is_equivalent_to(placed[leaf].sharding, p.ndim), (name, leaf, p.sharding)
    assert len(state.metrics) == len(shapes) * (4 if name == "ternary_vote" else 6)
    expected = run(tx, plain, 3)
    chex.assert_trees_all_close(*jax.device_get(((params, state), expected)), rtol=1e-4, atol=1e-5)

    step = jax.jit(stepper(FACTORIES[name]()))
    params, state = placed, FACTORIES[name]().init(placed)
    for i in range(3):
        grads, before = place(gradients(params, i)), len(compiled)
        params, state = step(params, state, grads)
        assert len(compiled) - before == (i == 0), (name, i, compiled[before:])
"""

EXPLICIT_AXES = """
import sys

import jax, jax.numpy as jnp
from factories import FACTORIES, described

mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
with jax.set_mesh(mesh):
    params = jnp.zeros((2, 8, 4), "float16", out_sharding=jax.sharding.NamedSharding(mesh, jax.P(None, "x")))
    for name in sys.argv[1:]:
        tx = FACTORIES[name]()
        state = tx.init(params)
        updates, after = tx.update(params, state, params)
        assert described(after) == described(state), name
        assert described(updates) == described(params), name
        assert described(jax.jit(tx.init)(params)) == described(state), name
        assert described(jax.jit(tx.update)(params, state, params)) == described((updates, after)), name
"""


@sweep_of_factories
def test_the_parameters_sharding_is_kept(factory):
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec())
    tx, params = factory(), jax.device_put(factory.parameters(), sharding)
    state = tx.init(params)
    for x in jax.tree.leaves(state):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
    after, _ = jitted(tx)(params, state, jax.device_put(gradients(params), sharding))
    for p in jax.tree.leaves(after):
        assert p.sharding.is_equivalent_to(sharding, p.ndim)


def on_devices(number, program, *names):
    """Runs a program with so many devices and these arguments."""
    here = str(Path(__file__).parent)
    flags = f"--xla_force_host_platform_device_count={number} --xla_cpu_multi_thread_eigen=false"
    environment = {
        **os.environ,
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([here, *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program), *names],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@sweep("name", ["recommended", "sm3-momentum", "mup_sgd", "ternary_vote"], short=only("sm3-momentum"))
def test_four_devices_compute_what_one_does_and_compile_once(name):
    """Parameters, state and metrics; no array of the state changes its place after the first step."""
    on_devices(4, FOUR_DEVICES, name)


@sweep("names", [("decoupled_lionw", "sm3-momentum"), tuple(FACTORIES)], short=lambda names: len(names) == 2, ids=len)
def test_types_on_explicit_axes_are_the_same_before_and_after_a_step_and_under_jit(names):
    on_devices(8, EXPLICIT_AXES, *names)
