"""Sharded training: where the state lies, the same values on 1 and 8 devices, checkpoints, and shard_map."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from factories import FACTORIES, every_factory
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sweeps import only, sweep

import fusedbun_jax as fj
from fusedbun_jax import state_shardings

MESH = AbstractMesh((2, 4), ("a", "b"))
OTHER_MESH = AbstractMesh((8,), ("data",))
SHAPES = {"kernel": (8, 256), "wide": (6, 320), "cube": (8, 3, 4), "bias": (8,)}
SPECS = {"kernel": P("a", "b"), "wide": P(None, ("a", "b")), "cube": P("b", None, "a"), "bias": P("b")}


def abstract(dtype="float32"):
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(MESH, SPECS[name]))
        for name, shape in SHAPES.items()
    }


def specs_of(shardings):
    """Every array's spec by its path, as the array that has none along an axis."""
    return {jax.tree_util.keystr(path): tuple(x.spec) for path, x in jax.tree.leaves_with_path(shardings)}


def like_parameters(path, shape):
    """The rule, from an array's shape: where it has the parameter's size it is cut as the parameter is."""
    names = [k.key for k in path if getattr(k, "key", None) in SHAPES]
    if not names:
        return (None,) * len(shape)
    spec = [*SPECS[names[-1]], None, None]
    return tuple(spec[i] if n == SHAPES[names[-1]][i] else None for i, n in enumerate(shape))


def check_rule(tx, dtype="float32"):
    params = abstract(dtype)
    state = jax.eval_shape(tx.init, params)
    found = state_shardings(tx, params)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for (path, x), sharding in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(found), strict=True):
        assert sharding.mesh == MESH
        assert (*sharding.spec, *[None] * (x.ndim - len(sharding.spec))) == like_parameters(path, x.shape), path


# ---- where the state lies


@every_factory
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_is_cut_as_its_parameter_is(factory, dtype):
    check_rule(factory(), dtype)


def test_codes_are_cut_with_whole_blocks():
    found = state_shardings(fj.sm3(0.1, momentum=0.9, momentum_dtype="int8"), abstract())
    codes, exponents = (found.momentum.moment, found.momentum.moment_exponents)
    assert codes["kernel"].spec == P("a", "b")
    assert exponents["kernel"].spec == P("a", "b", None)  # 4 parts of 2 blocks
    assert codes["wide"].spec == P(None, ("a", "b"))
    assert exponents["wide"].spec == P(None, None, None)  # a part of 40 is no number of blocks
    assert exponents["cube"].spec == P("b", None, None)
    assert exponents["bias"].spec == P(None)  # there are none
    assert found.count.spec == P()
    codes = state_shardings(fj.sm3(0.1, momentum=0.9, momentum_dtype="int4"), abstract()).momentum.moment
    assert codes["kernel"].spec == P("a", "b", None)
    assert codes["wide"].spec == P(None, None, None)


WRAPPED = {
    "adam": optax.adam(0.1),
    "lion": optax.lion(0.1),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), fj.sm3_accumulate(0.9), fj.rms_scale(), optax.trace(0.9)),
    "masked": optax.masked(fj.sm3(0.1, momentum=0.9), {"kernel": True, "wide": False, "cube": True, "bias": False}),
    "inject_hyperparams": optax.inject_hyperparams(fj.sm3)(0.1, momentum=0.9),
    "MultiSteps": optax.MultiSteps(fj.fusedbun(0.1), 2),
    "schedule": fj.decoupled_lionw(optax.linear_schedule(0.1, 0.0, 10)),
    "by_name": fj.by_name(fj.fusedbun, {"wide": {"learning_rate": 0.2}}, no_decay="Lambda", learning_rate=0.1),
    "with_metrics": fj.with_metrics(fj.mup_adamw(0.1, mup=lambda path, param: "bias")),
    "apply_if_finite": optax.apply_if_finite(fj.sm3(0.1), 3),
}


@pytest.mark.parametrize("tx", WRAPPED.values(), ids=WRAPPED)
def test_state_of_other_transformations(tx):
    check_rule(tx)


def test_nothing_is_allocated():
    huge = jax.ShapeDtypeStruct((2**20, 2**20), "float32", sharding=NamedSharding(MESH, P("a", "b")))
    found = state_shardings(fj.with_metrics(fj.fusedbun(0.1, momentum_dtype="int4")), {"w": huge})
    assert ("a", "b", None) in specs_of(found).values()


def test_shardings_are_given_in_any_form():
    tx, params = fj.with_metrics(fj.fusedbun(0.1)), abstract()
    expected = state_shardings(tx, params)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in params.items()}
    assert state_shardings(tx, shapes, {name: x.sharding for name, x in params.items()}) == expected
    assert state_shardings(tx, shapes, SPECS, mesh=MESH) == expected
    one = NamedSharding(MESH, P("a"))
    everywhere = state_shardings(tx, {"layers": shapes}, {"layers": one})
    assert everywhere == state_shardings(tx, {"layers": shapes}, one)
    assert specs_of(everywhere)[".inner_state.sm3_accumulate.axis0['layers']['kernel']"] == ("a", None)
    placed = jax.device_put(jnp.ones((4, 3)), NamedSharding(jax.make_mesh((1,), ("a",)), P("a")))
    assert specs_of(state_shardings(tx, placed))[".inner_state.sm3_accumulate.axis0"] == ("a", None)


def test_state_made_under_jit_on_explicit_axes_lies_with_its_parameters():
    mesh = jax.make_mesh((1, 1), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    tx = fj.sm3(0.1, momentum=0.9, momentum_dtype="int8")
    with jax.set_mesh(mesh):
        w = jax.device_put(jnp.ones((8, 64)), P("a", "b"))
        made = jax.jit(tx.init)(w)
    assert specs_of(jax.tree.map(lambda x: x.sharding, made)) == specs_of(state_shardings(tx, w))
    assert made.sm3_accumulate.axis1.sharding.spec == P(None, "b")


# ---- errors


@pytest.mark.parametrize(
    ("kind", "params", "arguments", "says"),
    [
        (TypeError, {"w": np.ones(3)}, {}, r"of leaf \"\['w'\]\" must have a NamedSharding, but its sharding is None"),
        (TypeError, {"w": jnp.ones(3)}, {}, r"must have a NamedSharding, but its sharding is SingleDeviceSharding"),
        (TypeError, {"w": jax.ShapeDtypeStruct((3,), "float32")}, {}, r"jax.device_put, or pass shardings="),
        (TypeError, {"w": jnp.ones(3)}, {"shardings": {"w": P()}}, r"needs a mesh: pass mesh="),
        (TypeError, {"w": "x"}, {"shardings": NamedSharding(MESH, P())}, r"must be an array"),
        (ValueError, {"w": jnp.ones(8)}, {"shardings": P("a", "b"), "mesh": MESH}, r"shape \(8,\): it has 2 axes, and"),
        (ValueError, {"w": jnp.ones(7)}, {"shardings": P("a"), "mesh": MESH}, r"does not fit its shape \(7,\)"),
        (ValueError, {"w": jnp.ones(7)}, {"shardings": P("c"), "mesh": MESH}, r"Resource axis: c"),
        (ValueError, {"w": jnp.ones(8)}, {"shardings": {"v": P()}, "mesh": MESH}, r"must be a tree of the parameters'"),
        (ValueError, {}, {}, r"needs a parameter"),
    ],
)
def test_errors_say_what_to_do(kind, params, arguments, says):
    with pytest.raises(kind, match=says):
        state_shardings(fj.sm3(0.1), params, **arguments)


def test_two_meshes_are_refused():
    other = {**abstract(), "cube": jax.ShapeDtypeStruct((8,), "float32", sharding=NamedSharding(OTHER_MESH, P("data")))}
    with pytest.raises(ValueError, match=r"must lie on one mesh, but that of leaf \"\['cube'\]\" is .*data"):
        state_shardings(fj.sm3(0.1), other)


# ---- shard_map


def in_shard_map(function, in_specs, out_specs, *arguments, **keywords):
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **keywords))(*arguments)


def test_shards_of_parameters_are_refused_in_shard_map():
    tx, w = fj.sm3(0.1), jnp.ones((8, 4))
    state = tx.init(w)
    for call in (
        lambda w, state: tx.init(w),
        lambda w, state: tx.update(w, state, w)[0],
        lambda w, state: tx.step(w, state, w)[0],
        lambda w, state: fj.round_stochastically().init(w.astype("bfloat16")),
    ):
        with pytest.raises(ValueError, match=r"varies over 'data' of the mesh: .* jax.jit with sharded arrays"):
            in_shard_map(call, (P("data"), P()), P("data"), w, state)


def test_gradients_that_nobody_averaged_are_refused_in_shard_map():
    tx, w = fj.sm3(0.1), jnp.ones((8, 4))
    with pytest.raises(ValueError, match=r"the update of .* varies over 'data' .*average the gradients"):
        in_shard_map(lambda g, s, w: tx.step(g[0], s, w), (P("data"), P(), P()), P(), w[None], tx.init(w), w)


def test_unchecked_shard_map_is_as_many_optimizers_as_devices():
    """With check_vma=False JAX does not know what differs, and every device steps what it has."""
    tx, w = fj.sm3(0.1), jnp.ones((8, 4))

    def step(w):
        return tx.step(w, tx.init(w), w)[0]

    got = in_shard_map(step, P("data"), P("data"), w, check_vma=False)
    np.testing.assert_allclose(got, jax.jit(step)(w), rtol=1e-6)


# ---- 8 devices

EIGHT = """
import jax, jax.numpy as jnp, numpy as np, optax
import fusedbun_jax as fj
from factories import FACTORIES, stepper
from fusedbun_jax import state_shardings
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
)
DEVICES = np.array(jax.devices())
SHAPES = {"kernel": (8, 256), "wide": (6, 320), "cube": (8, 3, 8), "bias": (16,)}
LINE = Mesh(DEVICES, ("a",)), {"kernel": P("a"), "wide": P(None, "a"), "cube": P(None, None, "a"), "bias": P()}
GRID = Mesh(DEVICES.reshape(2, 4), ("a", "b")), {
    "kernel": P("a", "b"), "wide": P(None, ("b", "a")), "cube": P("b", None, "a"), "bias": P("b")}
ALONE = Mesh(DEVICES[:1].reshape(1, 1), ("a", "b")), GRID[1]

def arrays(step, dtype="float32", transform=lambda x: x):
    rng = np.random.default_rng(step)
    return {name: transform(rng.standard_normal(shape)).astype(dtype) for name, shape in SHAPES.items()}

def shardings(place):
    return {name: NamedSharding(place[0], spec) for name, spec in place[1].items()}

def trained(tx, params, steps, place=None, state=None):
    '''Parameters and state after these steps, of one device or of a mesh, where everything must keep its place.'''
    dtype = params["kernel"].dtype
    if place is None:
        step, put = jax.jit(stepper(tx)), lambda tree: jax.tree.map(jnp.asarray, tree)
        params = put(params)
        state = tx.init(params)
    else:
        own = shardings(place)
        put = lambda tree: jax.device_put(tree, own)
        params = put(params)
        held = state_shardings(tx, params)
        if state is None:
            state = tx.init(params) if place is LINE else jax.jit(tx.init, out_shardings=held)(params)
        assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, held))
        step = jax.jit(stepper(tx), out_shardings=(own, held))
    for i in steps:
        grads, before = put(arrays(100 + i, dtype)), len(compiled)
        params, state = step(params, state, grads)
        assert len(compiled) - before == (i == steps[0])
        if place is not None:
            assert jax.tree.all(jax.tree.map(
                lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), (params, state), (own, held)))
    return params, state

def differing(got, want):
    '''Of each array, by its path: the share of elements that differ, and by how much of its largest one.'''
    found = {}
    for (path, x), y in zip(jax.tree.leaves_with_path(jax.device_get(got)), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype
        x, y = x.astype("float64"), np.asarray(y).astype("float64")
        if not np.array_equal(x, y):
            found[jax.tree_util.keystr(path)] = (x != y).mean(), abs(x - y).max() / abs(y).max()
    return found
"""
NO_FMA = "--xla_cpu_max_isa=AVX"  # XLA contracts products and sums where it fuses them, which depends on the sharding


def on_eight_devices(code, flags="", *arguments):
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false {flags}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", EIGHT + textwrap.dedent(code), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr


VALUES = """
import sys
for name in {names}:
    factory = FACTORIES[name]
    for dtype, settings, place in {variants}:
        try:
            tx = factory(**settings)
        except (TypeError, ValueError):  # it has no momentum, or none so coarse
            continue
        params = arrays(0, dtype, np.sign if factory.ternary else lambda x: x)
        want = jax.device_get(trained(tx, params, range(20)))
        found = differing(trained(tx, params, range(20), place), want)
        print(name, dtype, settings, place[0].shape, found, file=sys.stderr)
        {check}
"""
PLAIN = '("float32", {}, GRID),'
CODED = '("float32", {"momentum_dtype": "int8"}, LINE),'
ROUNDED = '("bfloat16", {"stochastic_rounding": True}, LINE),'
BOTH = '("bfloat16", {"stochastic_rounding": True, "momentum_dtype": "int4"}, GRID),'
STACKED = '("bfloat16", {"stochastic_rounding": True, "stacked": lambda path, p: max(0, p.ndim - 2)}, GRID),'
MEANS = ["fusedbun", "recommended", "clipped-lagged", "flax", "fusedbunw"]  # their statistics are means
OTHERS = [name for name in FACTORIES if name not in (*MEANS, "sm3-momentum")]  # maxima, or one element at a time


@sweep(
    ("names", "variants"),
    [
        (["sm3-momentum"], BOTH),
        (["sm3-momentum"], PLAIN + CODED + ROUNDED + STACKED),
        (OTHERS, PLAIN + CODED + ROUNDED + BOTH + STACKED),
    ],
    short=lambda names, variants: variants is BOTH,
    ids=["few", "plain", "others"],
)
def test_without_means_eight_devices_compute_the_bits_of_one(names, variants):
    """Parameters, statistics, codes and noise, after 20 steps on a line and on a grid, where nothing is contracted."""
    on_eight_devices(VALUES.format(names=names, variants=variants, check="assert not found"), NO_FMA)


@pytest.mark.long
def test_with_contractions_eight_devices_compute_the_values_of_one():
    """What a machine does by itself: the last bits differ where products and sums are contracted differently."""
    check = "assert all(size < 1e-6 for share, size in found.values())"
    names = ["sm3-momentum", "mup_adamw"]
    on_eight_devices(VALUES.format(names=names, variants=PLAIN + CODED, check=check))


@pytest.mark.long
def test_with_means_eight_devices_compute_the_values_of_one():
    """A mean is summed in another order. Codes and rounded parameters differ where noise decides on the last bit."""
    check = "assert all(size < 1e-5 or share < 0.002 for share, size in found.values())"
    on_eight_devices(VALUES.format(names=MEANS, variants=PLAIN + BOTH, check=check))


# ---- checkpoints

RESTORED = """
import pathlib, sys
import orbax.checkpoint as ocp
folder, names = pathlib.Path(sys.argv[1]), sys.argv[2:]
for name, settings, dtype in (
    ("recommended", {}, "float32"),
    ("sm3-momentum", {"momentum_dtype": "int4", "stochastic_rounding": True}, "bfloat16"),
    ("mup_adamw", {}, "float32"),
):
    if name not in names:
        continue
    tx, start = FACTORIES[name](**settings), arrays(0, dtype)
    shapes = {leaf: jax.ShapeDtypeStruct(x.shape, x.dtype) for leaf, x in start.items()}
    params, state = trained(tx, start, range(5), LINE)
    saved = params, state
    want = jax.device_get(trained(tx, params, range(5, 8), LINE, state))
    for i, place in enumerate((LINE, GRID, ALONE)):  # each is saved where the one before it was restored
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / name / str(i), saved)
        own = shardings(place)
        held = state_shardings(tx, shapes, own)
        target = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            (shapes, jax.eval_shape(tx.init, shapes)), (own, held))
        with ocp.StandardCheckpointer() as checkpointer:
            saved = checkpointer.restore(folder / name / str(i), target)
        assert not differing(saved, jax.device_get((params, state)))
        assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), saved, (own, held)))
        found = differing(trained(tx, saved[0], range(5, 8), place, saved[1]), want)
        if name == "recommended" and place is not LINE:  # its means are summed in another order
            assert all(size < 1e-5 for _, size in found.values()), found
        else:
            assert not found, found
"""


@sweep("names", [["mup_adamw"], ["recommended", "sm3-momentum"]], short=only(["mup_adamw"]), ids=len)
def test_a_checkpoint_is_restored_onto_other_meshes_and_goes_on(names, tmp_path):
    """From a line of 8 devices to it again, to a grid, to one device: bits, places, and the steps that follow."""
    on_eight_devices(RESTORED, NO_FMA, str(tmp_path), *names)


REPLICATED = """
mesh = LINE[0]
for name, factory in FACTORIES.items():
    rounded = ("bfloat16", {"stochastic_rounding": True})
    for dtype, settings in ("float32", {}), *([rounded] if name in ("recommended", "sm3-momentum") else []):
        tx = factory(**settings)
        params = jax.tree.map(jnp.asarray, arrays(0, dtype, np.sign if factory.ternary else lambda x: x))
        state = tx.init(params)
        grads = arrays(1, "float32", lambda x: np.round(8 * x))
        # every device has gradients of its own, whole numbers, so that their mean is exact
        parts = {leaf: np.stack([g + k for k in range(-4, 5) if k]) for leaf, g in grads.items()}

        def step(params, state, parts):
            grads = jax.lax.pmean({leaf: g[0] for leaf, g in parts.items()}, "a")
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        step = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P("a")), out_specs=P())
        got = jax.jit(step)(params, state, parts)
        assert not differing(got, jax.device_get(jax.jit(stepper(tx))(params, state, grads))), name
tx = fj.fusedbun(0.1)
grads = jax.tree.map(jnp.asarray, arrays(1))
inside = jax.shard_map(lambda g, s, p: tx.step(g, s, p), mesh=mesh, in_specs=P(), out_specs=P())
state = tx.init(grads)
assert not differing(jax.jit(inside)(grads, state, grads), jax.device_get(jax.jit(stepper(tx))(grads, state, grads)))
"""


@pytest.mark.long
def test_whole_parameters_are_stepped_in_shard_map():
    """By every optimizer, to the bit as without it."""
    on_eight_devices(REPLICATED, NO_FMA)
