"""Shardings: those of the parameters are kept, and several devices compute what one does."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
from factories import every_factory, gradients, parameters, stepper
from jax.sharding import Mesh, NamedSharding, PartitionSpec

FOUR_DEVICES = """
import chex, jax, numpy as np
from factories import FACTORIES, gradients, run, stepper
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
specs = {"kernel": P("a", "b"), "rows": P("a"), "columns": P(None, "b"), "bias": P("b"), "whole": P()}
shapes = {"kernel": (4, 6), "rows": (8, 3), "columns": (3, 8), "bias": (6,), "whole": (3, 2)}
plain = gradients({name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}, 9)
placed = {name: jax.device_put(plain[name], NamedSharding(mesh, specs[name])) for name in plain}
for name, factory in FACTORIES.items():
    tx = factory()
    step = jax.jit(stepper(tx))
    params, state = placed, tx.init(placed)
    for i in range(3):
        grads = {name: jax.device_put(g, placed[name].sharding) for name, g in gradients(params, i).items()}
        params, state = step(params, state, grads)
        for leaf, p in params.items():
            assert p.sharding.is_equivalent_to(placed[leaf].sharding, p.ndim), (name, leaf, p.sharding)
    for path, x in jax.tree.leaves_with_path(state):
        leaf = [k.key for k in path if getattr(k, "key", None) in placed]
        if leaf and x.shape == placed[leaf[0]].shape:
            assert x.sharding.is_equivalent_to(placed[leaf[0]].sharding, x.ndim), (name, path, x.sharding)
    got, expected = jax.device_get(((params, state), run(tx, plain, 3)))
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)
"""


@every_factory
def test_the_parameters_sharding_is_kept(factory):
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec())
    tx, params = factory(), jax.device_put(parameters(), sharding)
    state = tx.init(params)
    full_size = [x for x in jax.tree.leaves(state) if x.shape == (2, 3, 4)]
    assert full_size
    for x in full_size:
        assert x.sharding == sharding
    after, _ = jax.jit(stepper(tx))(params, state, jax.device_put(gradients(params), sharding))
    for p in jax.tree.leaves(after):
        assert p.sharding.is_equivalent_to(sharding, p.ndim)


def test_four_devices_compute_what_one_does():
    here = str(Path(__file__).parent)
    flags = "--xla_force_host_platform_device_count=4 --xla_cpu_multi_thread_eigen=false"
    environment = {
        **os.environ,
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([here, *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(FOUR_DEVICES)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
