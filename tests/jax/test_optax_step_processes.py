"""`step` where it takes processes of their own: threads, several devices, files of compiled programs, no compiler."""

import os
import subprocess
import sys
import textwrap

from sweeps import long

TRAIN = """
import jax, jax.numpy as jnp, numpy as np, optax, hashlib, sys
import fusedbun_jax as fj
tx = fj.fusedbun(0.1, centralize=True, use_rms=True)
rng = np.random.default_rng(0)
params = {"w": jnp.asarray(rng.standard_normal((700, 300)), "float32"), "b": jnp.ones(500)}
def train(params, state, implementation):
    grads = jax.tree.map(jnp.sin, params)
    return tx.step(grads, state, params, implementation=implementation)
train = jax.jit(train, static_argnums=2, donate_argnums=(0, 1))
def trained(steps=3, implementation=None, params=params):
    params = jax.tree.map(jnp.copy, params)
    state = tx.init(params)
    for _ in range(steps):
        params, state = train(params, state, implementation)
    return jax.device_get(params)
"""


def python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


@long
def test_the_bits_do_not_depend_on_the_threads():
    code = TRAIN + 'print(hashlib.sha256(b"".join(x.tobytes() for x in trained(20, "kernel").values())).hexdigest())'
    one = python(code, XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    assert python(code, XLA_FLAGS="", PJRT_NPROC="4") == one


def test_a_compiled_program_in_a_file_serves_another_process(tmp_path):
    code = TRAIN + (
        """
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
after = trained(3, "kernel")
print(sum("compilation_cache/cache_hits" in hit for hit in hits))
print(hashlib.sha256(b"".join(x.tobytes() for x in after.values())).hexdigest())
"""
    )
    cached = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    first, second = (python(code, **cached) for _ in range(2))
    assert first[0] == "0"
    assert int(second[0]) > 0
    assert first[1] == second[1]


@long
def test_several_devices_run_the_definition():
    python(
        TRAIN
        + """
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from fusedbun.compiler.cpp.native import KernelError
assert len(jax.devices()) == 8
want = trained(3, "kernel")  # on the first of them
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
placed = {
    "w": jax.device_put(params["w"], NamedSharding(mesh, P("a", "b"))),
    "b": jax.device_put(params["b"], NamedSharding(mesh, P("a"))),
}
state = tx.init(placed)
p = placed
for _ in range(3):
    p, state = jax.jit(lambda p, s: tx.step(jax.tree.map(jnp.sin, p), s, p))(p, state)
for name in p:
    np.testing.assert_allclose(p[name], want[name], rtol=1e-4, atol=1e-5)
    assert p[name].sharding.is_equivalent_to(placed[name].sharding, p[name].ndim)
try:
    jax.jit(lambda p, s: tx.step(p, s, p, implementation="kernel"))(placed, tx.init(placed))
except KernelError as error:
    assert "more than one device" in str(error)
else:
    raise SystemExit("there was no error")
sm3 = fj.sm3(0.1)
local = lambda x: sm3.step(x, sm3.init(x), x)[0]
halves = jax.shard_map(local, mesh=mesh, in_specs=P("a"), out_specs=P("a"), check_vma=False)
got = jax.jit(halves)(placed["w"])
want = np.concatenate([local(x) for x in np.split(params["w"], 4)])
np.testing.assert_allclose(got, want, rtol=1e-5)
""",
        XLA_FLAGS="--xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false",
    )


def test_without_a_compiler_it_is_the_definition_and_says_so_once(tmp_path):
    python(
        """
import warnings
"""
        + TRAIN
        + """
from fusedbun.compiler.cpp.native import KernelError
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    got = trained()
    trained(1, None, {"w": params["w"]})
assert len(said) == 1 and "compiler" in str(said[0].message), said
want = trained(3, "definition")
for name in got:
    np.testing.assert_array_equal(got[name], want[name])
try:
    trained(1, "kernel")
except KernelError as error:
    assert "compiler" in str(error)
else:
    raise SystemExit("there was no error")
""",
        CXX="/nowhere/c++",
        FUSEDBUN_CACHE=str(tmp_path),
    )


def test_a_program_for_another_platform_is_the_definition():
    python(
        TRAIN
        + """
from fusedbun.compiler.cpp.native import KernelError
lowered = jax.jit(lambda p: tx.step(p, tx.init(p), p)).trace(params).lower(lowering_platforms=("tpu",))
assert "fusedbun_step_" not in lowered.as_text()
assert "fusedbun_step_" in jax.jit(lambda p: tx.step(p, tx.init(p), p)).lower(params).as_text()
both = jax.jit(lambda p: tx.step(p, tx.init(p), p)).trace(params).lower(lowering_platforms=("cpu", "tpu")).as_text()
assert "fusedbun_step_" in both
forced = jax.jit(lambda p: tx.step(p, tx.init(p), p, implementation="kernel")).trace(params)
try:
    forced.lower(lowering_platforms=("cuda",))
except KernelError as error:
    assert "this platform" in str(error)
else:
    raise SystemExit("there was no error")
"""
    )
