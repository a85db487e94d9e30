"""Moments stored in fewer bits: the same numbers and the same noise as the definition in NumPy."""

import inspect
from functools import cache, partial

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cases import for_optax
from factories import described, run
from numpy_steps import SHAPES, arrays, assert_near, assert_same_bits, by_definition, rounding, stepper, tree
from sweeps import CODED, NOISY, only, sweep

import fusedbun_jax as fj
from fusedbun import namespace as in_numpy
from fusedbun import recipes
from fusedbun.compiler.cpp.native import KernelError
from fusedbun.storage import codes, noise
from fusedbun.storage.rounding import to_bfloat16
from fusedbun.transforms import Momentum
from fusedbun_jax import namespace

DTYPES = (*codes.MOMENTS, None)
each_dtype = sweep("dtype", DTYPES, short=only("int8"))
# Powers of two, and gradients of few bits: however XLA contracts a product and a sum, no bit changes.
EXACT = {"betas": (0.5, 0.25), "mup": lambda path, param: "bias"}
SGD = {"momentum": 0.5, "dampening": 0.5, "mup": EXACT["mup"]}


def by_rank(path, param):
    return ("weight", 4) if param.ndim > 1 else "bias"


# name: the recipe's arguments, those of powers of two, and whether it adds nothing up and is the same bit for bit
OPTIMIZERS = {
    "fusedbun": ({"use_rms": True, "nesterov": True}, {}, False),
    "sm3": ({"momentum": 0.9, "beta": 0.9}, {"momentum": 0.5, "beta": 0.5}, True),
    "mup_adam": ({"mup": by_rank, "amsgrad": True}, EXACT, False),
    "mup_adamw": ({"mup": by_rank, "weight_decay": 0.1}, EXACT, False),
    "mup_sgd": ({"mup": by_rank, "momentum": 0.9, "dampening": 0.25}, SGD, True),
    "decoupled_lionw": ({"weight_decay": 1e-4}, {"betas": (0.5, 0.25), "weight_decay": 0.0}, True),
    "fusedbunw": ({"weight_decay": 0.1}, {"betas": (0.5, 0.25)}, False),
}
SETTINGS = [(name, dtype) for name in OPTIMIZERS for dtype in DTYPES if (name, dtype) != ("decoupled_lionw", "int4")]
# Every optimizer and every dtype once
DIAGONAL = tuple(zip(OPTIMIZERS, ("int4", "int8", "float32", "bfloat16", "param", None, "int4"), strict=True))
every_dtype_of_moments = sweep(("name", "dtype"), SETTINGS, short=only(*DIAGONAL))


def made(name, dtype, exact=False, stochastic=False, seed=3):
    """A chain, its learning rate and the optimizer of optax's."""
    given, powers, _ = OPTIMIZERS[name]
    settings = {**given, **(powers if exact else {}), "momentum_dtype": dtype}
    if name.startswith("mup_adam") and dtype not in CODED:
        settings["second_moment_dtype"] = dtype
    lr = 0.125 if exact else 0.1
    recipe = recipes.RECIPES[name]
    initial = {"initial_lr": lr} if recipe.wants_initial_lr else {}
    chain = rounding(recipe.make(**settings, **initial), stochastic, seed)
    return chain, lr, getattr(fj, name)(lr, **for_optax(name, settings), stochastic_rounding=stochastic, seed=seed)


def check_steps(name, dtype, how, params, stochastic, exact):
    """Every step, from the state that JAX has before it."""
    chain, lr, tx = made(name, dtype, exact, stochastic)
    state, step = tx.init(params), stepper(tx, how)
    noisy = {key for key, slot in chain.slots((2, 2)).items() if codes.declared(slot).is_noisy}
    noisy |= {"param"} if stochastic else set()
    for i in range(4):
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), tree("bfloat16", 10 + i), params)
        before = {leaf: arrays(chain, leaf, params, state) for leaf in params}
        params, state = step(params, state, grads)
        for leaf in params:
            got = arrays(chain, leaf, params, state)
            want = by_definition(chain, lr, grads[leaf], before[leaf], (leaf,))
            if OPTIMIZERS[name][2]:
                assert_same_bits(got, want)
            else:
                in_codes = {key for key in noisy if key == "param" or f"{key}.step" in want}
                assert_near(got, want, in_codes)


@every_dtype_of_moments
def test_a_kernel_does_what_the_definition_does_in_numpy(name, dtype):
    check_steps(name, dtype, "kernel", tree("float32", 1), False, False)


@every_dtype_of_moments
def test_update_does_what_the_definition_does_in_numpy(name, dtype):
    check_steps(name, dtype, "update", tree("float32", 1), False, True)


@sweep(("name", "dtype"), SETTINGS, short=only(DIAGONAL[1]))
def test_so_it_is_with_bfloat16_parameters_rounded_stochastically(name, dtype):
    for how, exact in (("kernel", False), ("update", True), ("definition", True)):
        check_steps(name, dtype, how, tree("bfloat16", 1), True, exact)


@each_dtype
def test_float16_parameters(dtype):
    """In whose dtype a moment is rounded to the nearest."""
    check_steps("sm3", dtype, "kernel", tree("float16", 1), False, False)


@each_dtype
def test_double_precision(dtype, x64):
    """There are no kernels for noise in it, so there the definition steps it."""
    check_steps("sm3", dtype, "update", tree("float64", 1), False, True)
    if dtype in NOISY:
        _, _, tx = made("sm3", dtype)
        params = tree("float64", 1)
        got, want = (stepper(tx, how)(params, tx.init(params), params) for how in (None, "definition"))
        chex.assert_trees_all_equal(got, want)
        with pytest.raises(KernelError, match="noise and codes are computed in float32"):
            tx.step(params, tx.init(params), params, implementation="kernel")


@each_dtype
def test_64_bit_types_change_no_bit(dtype):
    _, _, tx = made("sm3", dtype, stochastic=True)
    params = tree("bfloat16", 1)
    for how in ("update", "kernel"):
        want = stepper(tx, how)(params, tx.init(params), params)
        with jax.enable_x64(True):
            got = stepper(tx, how)(params, tx.init(params), params)
        assert described(got) == described(want)
        chex.assert_trees_all_equal(got, want)


# ---- the functions that rounding and codes use


def numbers(count, seed=0):
    """Any bits: numbers of all sizes, NaN and infinities among them."""
    rng = np.random.default_rng(seed)
    odd = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1e-45, -1e-40], np.float32)
    bits = rng.integers(-(2**31), 2**31, count, np.int64).astype(np.int32)
    return np.concatenate([odd, bits.view(np.float32), rng.standard_normal(count).astype(np.float32)])


def in_both(function, *operands):
    """What a function over a namespace gives in NumPy, in JAX, and in JAX compiled, with and without 64-bit types."""
    with np.errstate(all="ignore"):
        yield from [jax.tree.map(np.asarray, function(in_numpy, *operands))]
    for is_on in (False, True):
        with jax.enable_x64(is_on):
            yield jax.tree.map(np.asarray, function(namespace, *map(jnp.asarray, operands)))
            yield jax.tree.map(np.asarray, compiled(function)(*operands))


@cache
def compiled(function):
    """The function over JAX's namespace, jitted: the same one for the same function, which is traced once."""
    return jax.jit(partial(function, namespace))


def assert_equal_in_both(function, *operands):
    want, *others = in_both(function, *operands)
    for got in others:
        assert jax.tree.map(lambda x: (x.dtype, x.shape), got) == jax.tree.map(lambda x: (x.dtype, x.shape), want)
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.tobytes(), y.tobytes()), got, want)


@sweep("shape", [(), (1,), (70,), (5, 33), (3, 4, 5), (2, 3, 2, 3)], short=only((5, 33)))
def test_noise(shape):
    def drawn(xp, like, step):
        return noise.draw(noise.start(7, "layer.weight", 5), step, xp.index(like, range(like.ndim)))

    for step in (0, 1, 2**31 - 1):
        assert_equal_in_both(drawn, np.zeros(shape, np.float32), np.full((1,) * len(shape), step, np.int32))


def test_rounding_to_bfloat16():
    x = numbers(2**14)
    n = np.random.default_rng(1).integers(0, 2**16, x.size).astype(np.int32)

    def rounded(xp, x, n):
        return xp.bits(to_bfloat16(xp, x, n))

    assert_equal_in_both(rounded, x, n)


@pytest.mark.parametrize("code", [codes.MOMENTS[name].name for name in CODED])
@sweep("shape", [(3, 1), (4, 32), (5, 75), (2, 3, 45)], short=only((5, 75)))
def test_codes_and_what_they_stand_for(code, shape):
    def coded(xp, x, n):
        arrays = codes.CODES[code].arrays(tuple(range(len(shape))))
        parts = {part: y.astype(arrays[part].dtype) for part, y in codes.CODES[code].encode(xp, x, n).items()}
        decoded = codes.CODES[code].decode(xp, parts, x.shape, "float32")
        return parts, xp.bits(xp.where(decoded == decoded, decoded, 0.0)), xp.real(xp.whole(decoded == decoded))

    for seed in range(4):
        x = numbers(2**9, seed)[: int(np.prod(shape))].reshape(shape)
        with np.errstate(all="ignore"):
            x = x * np.float32(10.0 ** (10 * seed - 20)) if seed % 2 else np.random.default_rng(seed).permuted(x)
        n = np.random.default_rng(seed).integers(0, 2**16, shape).astype(np.int32)
        assert_equal_in_both(coded, x, n)


# ---- state


def test_the_bytes_of_the_state():
    params = {"kernel": jnp.zeros((30, 40), jnp.bfloat16), "bias": jnp.zeros(40, jnp.bfloat16)}
    sizes = {"float32": 4800 + 160, "bfloat16": 2400 + 80 + 4, "param": 2400 + 80 + 4, None: 4800 + 160}
    sizes |= {"int8": 1200 + 30 * 2 + 160 + 4 + 4, "int4": 30 * 2 * 16 + 30 * 2 + 160 + 4 + 4}  # a count, no exponents
    for dtype, size in sizes.items():
        tx = fj.lift(Momentum(0.9, dtype=dtype))
        assert sum(x.nbytes for x in jax.tree.leaves(tx.init(params))) == size, dtype
        shapes = jax.eval_shape(tx.init, params)
        assert described(shapes) == described(tx.init(params))
    state = fj.lift(Momentum(0.9, dtype="int4")).init(params)
    assert type(state).__name__ == "MomentumState"
    assert {name: described(x) for name, x in state._asdict().items()} == {
        "moment": {"kernel": "uint8[30,2,16]", "bias": "float32[40]"},
        "moment_exponents": {"kernel": "uint8[30,2,1]", "bias": "float32[1]"},  # in rows of one axis there are none
        "count": "int32[]",
    }


@every_dtype_of_moments
def test_a_step_keeps_every_dtype_and_shape(name, dtype):
    _, _, tx = made(name, dtype, stochastic=True)
    params = {**tree("bfloat16", 1), "empty": jnp.zeros((0, 4), jnp.bfloat16)}
    state = tx.init(params)
    for how in ("update", None):
        assert described(jax.eval_shape(stepper(tx, how), params, state, params)) == described((params, state))


@each_dtype
def test_saved_and_restored_it_goes_on_bit_for_bit(dtype, tmp_path):
    _, _, tx = made("fusedbun", dtype, stochastic=True)
    params, state = run(tx, tree("bfloat16", 1), 2)
    want = run(tx, params, range(2, 4), state)
    data = flax.serialization.to_bytes((params, state))
    fresh = tree("bfloat16", 2)
    np.savez(tmp_path / "state", *jax.tree.leaves(state))
    in_file = np.load(tmp_path / "state.npz")
    leaves, kind = jax.tree.flatten(state)
    loaded = kind.unflatten([jnp.asarray(in_file[f"arr_{i}"].view(x.dtype)) for i, x in enumerate(leaves)])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", (params, state))
        checkpointer.wait_until_finished()
        from_orbax = checkpointer.restore(tmp_path / "orbax", jax.eval_shape(lambda: (params, state)))
    from_flax = flax.serialization.from_bytes((fresh, tx.init(fresh)), data)
    for restored in ((params, loaded), from_orbax, jax.tree.map(jnp.asarray, from_flax)):
        assert described(restored) == described((params, state))
        chex.assert_trees_all_equal(run(tx, restored[0], range(2, 4), restored[1]), want)


@each_dtype
def test_the_state_may_be_numpys_own_arrays(dtype):
    _, _, tx = made("fusedbun", dtype, stochastic=True)
    params = tree("bfloat16", 1, {"matrix": SHAPES["matrix"]})
    state = tx.init(params)
    updates, _ = tx.update(params, jax.tree.map(np.asarray, state), params)
    chex.assert_trees_all_equal(updates, tx.update(params, state, params)[0])


@each_dtype
def test_donated_state_is_changed_in_place(dtype):
    _, _, tx = made("fusedbun", dtype, stochastic=True)
    params = tree("bfloat16", 1, {"w": (64, 96), "v": (64,)})
    state = tx.init(params)
    step = jax.jit(lambda p, s, g: tx.step(g, s, p, implementation="kernel"), donate_argnums=(0, 1))
    # a buffer is given to the first result of its kind, and there are few kinds: all memory is taken up again
    before = {x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state))}
    after = step(params, state, tree("bfloat16", 2, {"w": (64, 96), "v": (64,)}))
    assert {x.unsafe_buffer_pointer() for x in jax.tree.leaves(after)} == before
    assert all(x.is_deleted() for x in jax.tree.leaves((params, state)))


# ---- single transformations


@sweep("dtype", ("float32", *NOISY), short=only("int4"))
def test_a_lifted_transformation_among_optaxs_own(dtype):
    """With the parameters or without; `lift`'s seed decides the noise."""
    params, grads = tree("float32", 1), tree("float32", 2)
    for given in (params, None):
        tx = optax.chain(optax.clip(1.0), fj.momentum(0.5, dtype=dtype), optax.scale(-0.1))
        state = tx.init(params)
        for _ in range(2):
            _, state = jax.jit(tx.update)(grads, state, given)
        chain = rounding(fj.chain(Momentum(0.5, dtype=dtype)), False, 0)
        for leaf in params:
            want = {"param": np.asarray(params[leaf])} | arrays(chain, leaf, params, [tx.init(params)[1]])
            for _ in range(2):
                want = by_definition(chain, 0.1, np.clip(grads[leaf], -1, 1), want, (leaf,))
            del want["param"]
            assert_same_bits(arrays(chain, leaf, params, [state[1]]), want)
    seeded = [fj.lift(Momentum(0.5, dtype=dtype), seed=seed) for seed in (0, 1)]
    moments = [jax.jit(tx.update)(grads, tx.init(params))[1].moment["matrix"] for tx in seeded]
    assert (np.asarray(moments[0] == moments[1]).all()) == (dtype == "float32")


def test_state_in_the_parameters_dtype_needs_the_parameters():
    params = tree("bfloat16", 1)
    tx = fj.momentum(0.5, dtype="param")
    with pytest.raises(ValueError, match=r"momentum keeps state in the parameters' dtype: call update"):
        tx.update(params, tx.init(params))


@pytest.mark.parametrize("how", ["update", "kernel", "definition", None])
def test_state_of_another_dtype_is_refused(how):
    params = {"w": jnp.ones((3, 40))}
    tx = fj.lift(Momentum(0.5, dtype="bfloat16"))
    state = jax.tree.map(lambda x: x.astype(jnp.float32) if x.ndim and x.shape == (3, 40) else x, tx.init(params))
    with pytest.raises(ValueError, match=r"the state 'moment' of leaf .*'w'.* is float32, but bfloat16 is stored"):
        tx.update(params, state, params)
    of_bytes, of_floats = (fj.sm3(0.1, 0.9, momentum_dtype=dtype) for dtype in ("int8", None))
    if how == "kernel":
        with pytest.raises(KernelError, match="is not as it is declared"):
            of_bytes.step(params, of_floats.init(params), params, implementation=how)
        return
    with pytest.raises(
        ValueError, match=r"the state of leaf .*'w'.* holds nothing, but .*'moment_exponents': \(3, 2, 1\)"
    ):
        stepper(of_bytes, how)(params, of_floats.init(params), params)


def test_the_way_through_a_coded_moment_is_differentiable():
    """Within a step; the derivative of a moment stored in bfloat16 is that of a plain cast."""

    def end(scale, dtype):
        params = tree("float32", 1)
        tx = fj.from_chain(fj.chain(Momentum(0.5, dtype=dtype)), 0.1)
        state = tx.init(params)
        for i in range(2):
            updates, state = tx.update(jax.tree.map(lambda g: scale * g, tree("float32", i)), state, params)
            params = optax.apply_updates(params, updates)
        return sum(jnp.sum(p**2) for p in params.values())

    slopes = {dtype: float(jax.jit(jax.grad(end), static_argnums=1)(1.0, dtype)) for dtype in DTYPES}
    assert slopes["bfloat16"] == pytest.approx(slopes["float32"], rel=1e-3)
    assert np.isfinite(slopes["int8"])


# ---- other users


@each_dtype
def test_metrics_are_of_the_numbers_that_codes_stand_for(dtype):
    params, grads = tree("bfloat16", 1), tree("bfloat16", 2)
    tx = fj.with_metrics(fj.sm3(0.1, 0.9, momentum_dtype=dtype, stochastic_rounding=True))
    plain = fj.with_metrics(fj.sm3(0.1, 0.9, stochastic_rounding=True))
    states = [t.init(params) for t in (tx, plain)]
    for _ in range(2):
        states = [jax.jit(t.update)(grads, s, params)[1] for t, s in zip((tx, plain), states, strict=True)]
    got, want = (s.metrics for s in states)
    assert got.keys() == want.keys()
    code = codes.MOMENTS[dtype].of("bfloat16") if dtype else codes.CODES["float32"]
    rtol = 3.2 * 2.0**-code.bits if dtype in CODED and code.bits < 8 else 0.01
    for key, x in want.items():
        np.testing.assert_allclose(got[key], x, rtol=rtol, atol=1e-3, err_msg=key)
    moment = states[0].inner_state.momentum
    parts = code.arrays((0, 1))
    stored = {part: np.asarray(getattr(moment, f"moment{part}".replace(".", "_"))["matrix"]) for part in parts}
    numbers = code.decode(in_numpy, stored, SHAPES["matrix"], np.float32)
    np.testing.assert_allclose(got["l2_norm/moment/matrix"], np.sqrt((numbers**2).sum()), rtol=1e-6)


def test_by_name_gives_parameters_dtypes_of_their_own():
    rules = {"vector": {"momentum_dtype": "bfloat16"}, "matrix": {"momentum_dtype": "int8"}}
    tx = fj.by_name(fj.sm3, rules, learning_rate=0.125, momentum=0.5, seed=3)
    params, grads = tree("float32", 1), jax.tree.map(jnp.float32, tree("bfloat16", 2))
    got = params, tx.init(params)
    for how in ("kernel", "update", "definition"):
        got = stepper(tx, how)(*got, grads)
    for leaf, dtype in (("vector", "bfloat16"), ("matrix", "int8"), ("cube", None)):
        alone = fj.sm3(0.125, 0.5, momentum_dtype=dtype, seed=3)
        one = {leaf: params[leaf]}
        want = one, alone.init(one)
        for _ in range(3):
            want = stepper(alone, "kernel")(*want, {leaf: grads[leaf]})
        np.testing.assert_array_equal(got[0][leaf], want[0][leaf])


def test_every_optimizer_with_a_moment_is_here():
    signatures = {name: inspect.signature(getattr(fj, name)) for name in recipes.RECIPES}
    assert OPTIMIZERS.keys() == {name for name, found in signatures.items() if "momentum_dtype" in found.parameters}
