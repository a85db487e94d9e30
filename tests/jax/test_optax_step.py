"""`step`: what `update` and `apply_updates` do, with the same state, by a kernel on CPUs."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, FEW, expected, problem
from factories import FACTORIES, described, gradients, over, parameters, run, stepper
from flax import linen, nnx
from sweeps import sweep

import fusedbun_jax as fj
from fusedbun import Signal, Slot, Transform, chain, recipes
from fusedbun.compiler.cpp import native
from fusedbun.compiler.cpp.native import KernelError
from fusedbun.reference import exact_step
from fusedbun.reference import start as first_state
from fusedbun_jax import kernels

TOLERANCE = {"float64": 1e-12, "float32": 2e-6}  # as in test_equivalence, of a leaf's largest update
LEAVES = ("scalar", "vector", "matrix", "tall")
MIXED = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


def by(tx, implementation):
    """A jitted `step(params, state, grads)` that donates its parameters and its state."""

    def step(params, state, grads):
        return tx.step(grads, state, params, implementation=implementation)

    return jax.jit(step, donate_argnums=(0, 1))


def steps_with(tx, params, implementations):
    """The parameters and the state after steps with these implementations, or with `update`."""
    params = jax.tree.map(jnp.copy, params)
    state = tx.init(params)
    compiled = {i: by(tx, i) if i != "update" else jax.jit(stepper(tx)) for i in set(implementations)}
    for n, i in enumerate(implementations):
        params, state = compiled[i](params, state, gradients(params, n))
    return params, state


def close(got, want, **tolerance):
    assert described(got) == described(want)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    chex.assert_trees_all_close(got, want, **(tolerance or {"rtol": 2e-5, "atol": 2e-6}))


def check_case(case, dtype, leaves):
    params, steps = problem(dtype, case.ternary)
    tx = case.optax()
    p = {name: jnp.asarray(params[name], dtype) for name in leaves}
    state = tx.init(p)
    kernel, update = by(tx, "kernel"), jax.jit(stepper(tx))
    for step, grads in zip([kernel, update, kernel, kernel], steps, strict=True):
        p, state = step(p, state, {name: jnp.asarray(grads[name], dtype) for name in leaves})
    assert described(state) == described(tx.init(p))
    want, largest = expected(case.name, dtype)
    error = {k: float(np.abs(np.asarray(x, np.float64) - want[k]).max() / (largest[k] or 1.0)) for k, x in p.items()}
    assert {k: e for k, e in error.items() if not e <= TOLERANCE[dtype]} == {}


@sweep("case", [case for case in CASES if not case.cancels], short=lambda case: case.name in FEW, ids=str)
def test_every_case_by_kernel_and_by_update_in_turn(case):
    check_case(case, "float32", LEAVES)


@pytest.mark.parametrize("case", [case for case in CASES if case.cancels or "recommended" in case.name], ids=str)
def test_in_double_precision(case, x64):
    check_case(case, "float64", ("scalar", "matrix"))


def adds_nothing_up(case):
    """Nor takes a logarithm, which is NumPy's own."""
    return not any(name in str(case.chain) for name in ("Centralize", "mean", "ClipRMS", "ScaleByAdam"))


@pytest.mark.parametrize("case", [case for case in CASES if adds_nothing_up(case)], ids=str)
def test_where_a_chain_adds_nothing_up_every_bit_is_the_definitions(case):
    """NumPy's definition: XLA contracts a product and a sum."""
    transforms = case.chain.at((), np.empty((8, 16)))
    params, steps = problem("float32", case.ternary)
    tx, p = case.optax(), jnp.asarray(params["matrix"], jnp.float32)
    state, step = tx.init(p), by(tx, "kernel")
    want = params["matrix"].astype(np.float32)
    slots = {key: x.astype(np.float32) for key, x in first_state(transforms, want.shape).items()}
    for grads in steps:
        grad = grads["matrix"].astype(np.float32)
        p, state = step(p, state, jnp.asarray(grad))
        want, slots = exact_step(np, transforms, case.lr, want, grad, slots)
        np.testing.assert_array_equal(p, want.astype(np.float32))
        slots = {key: np.asarray(x, np.float32) for key, x in slots.items()}


@over(["recommended", "sm3", "ternary_vote"], ["recommended"])
@pytest.mark.parametrize("dtype", MIXED)
def test_parameters_of_16_bits(factory, dtype):
    tx, params = factory(), factory.parameters(dtype)
    got, want = (steps_with(tx, params, [i] * 3) for i in ("kernel", "definition"))
    close(got[1], want[1], rtol=1e-2, atol=1e-2)
    for p, q in zip(jax.tree.leaves(got[0]), jax.tree.leaves(want[0]), strict=True):
        np.testing.assert_allclose(p.astype(jnp.float32), q.astype(jnp.float32), rtol=2 * MIXED[dtype], atol=1e-3)


def test_a_gradient_of_fewer_bits_is_widened_and_one_of_more_bits_goes_to_the_definition():
    tx, params = fj.sm3(0.1), parameters()
    narrow = gradients(jax.tree.map(lambda p: p.astype(jnp.bfloat16), params))
    got = jax.jit(lambda p: tx.step(narrow, tx.init(p), p, implementation="kernel"))(params)
    close(got, jax.jit(stepper(tx))(params, tx.init(params), narrow))
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    wide = gradients(parameters())
    close(tx.step(wide, tx.init(params), params), stepper(tx)(params, tx.init(params), wide))
    with pytest.raises(KernelError, match="fewer bits than its gradient"):
        tx.step(wide, tx.init(params), params, implementation="kernel")


# ---- learning rates and hyper-parameters


@over(["recommended", "mup_adamw"], ["recommended"])
def test_a_schedule_advances(factory):
    tx = factory(fj.sm3_schedule(0.1, 3, 8))
    params = factory.parameters()
    got = steps_with(tx, params, ["kernel", "update", "kernel", "definition"])
    close(got, steps_with(tx, params, ["update"] * 4))
    assert optax.tree.get(got[1], "count") == 4 if factory.make is fj.fusedbun else True


def test_traced_hyperparameters():
    params = parameters()
    numbers = {"learning_rate": 0.1, "momentum_beta": 0.8, "beta_decay": 0.7, "Lambda": 0.03, "eps": 1e-4}

    def step(numbers, implementation):
        tx = fj.fusedbun(**numbers, use_rms=True, clip_rms=0.5)
        return tx.step(gradients(params), tx.init(params), params, implementation=implementation)

    step = jax.jit(step, static_argnums=1)
    for scale in (1.0, 0.5):
        given = {name: jnp.float32(scale * value) for name, value in numbers.items()}
        close(step(given, "kernel"), step(given, "definition"))
    assert step._cache_size() == 2


def test_hyperparameters_injected_by_optax():
    """The state is that of `optax.inject_hyperparams`; the optimizer is made from what it holds."""
    params = parameters()
    make = optax.inject_hyperparams(fj.sm3)
    tx = make(optax.linear_schedule(0.1, 0.2, 5), momentum=0.9)
    state, p = tx.init(params), params
    want = run(tx, params, 3)
    for i in range(3):
        _, after = jax.jit(tx.update)(gradients(params, i), state, p)  # for the schedules' next values
        p, inner = jax.jit(lambda g, s, p: fj.sm3(**s.hyperparams).step(g, s.inner_state, p, implementation="kernel"))(
            gradients(params, i), after._replace(inner_state=state.inner_state), p
        )
        state = after._replace(inner_state=inner)
    close((p, state), want)


def test_hyperparameters_by_name():
    rules = {"layer.bias": {"learning_rate": 0.3}}
    tx = fj.by_name(fj.fusedbun, rules, no_decay="Lambda", learning_rate=0.1, use_rms=True)
    params = {**parameters(), "embedding": jnp.ones((5, 2)), "none": None}
    close(steps_with(tx, params, ["kernel", "update", None]), steps_with(tx, params, ["update"] * 3))
    with pytest.raises(KernelError, match="another optimizer's"):
        tx.step(params, (), params, implementation="kernel")
    theirs = fj.by_name(optax.adamw, no_decay="weight_decay", learning_rate=0.1)
    close(steps_with(theirs, params, [None]), steps_with(theirs, params, ["update"]))
    with pytest.raises(KernelError, match="not one of fusedbun's"):
        theirs.step(params, theirs.init(params), params, implementation="kernel")


# ---- in place


def test_donated_buffers_are_changed_in_place_and_others_are_not():
    tx, params = FACTORIES["recommended"](), {"w": jnp.ones((64, 48)), "v": jnp.ones(64)}
    state, grads = tx.init(params), gradients({"w": jnp.ones((64, 48)), "v": jnp.ones(64)})
    kept = jax.tree.map(np.array, (params, state))
    plain = jax.jit(lambda p, s, g: tx.step(g, s, p, implementation="kernel"))
    want = plain(params, state, grads)
    chex.assert_trees_all_equal((params, state), kept)
    before = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state))]
    got = by(tx, "kernel")(params, state, grads)
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(got)] == before
    chex.assert_trees_all_equal(got, want)
    assert all(x.is_deleted() for x in jax.tree.leaves((params, state)))


def test_xla_needs_no_memory_of_its_own():
    tx, params = FACTORIES["recommended"](), {"w": jnp.ones((512, 256)), "b": jnp.ones(512)}

    def train(params, state, x):
        grads = jax.grad(lambda p: jnp.sum((x @ p["w"].T + p["b"]) ** 2))(params)
        return tx.step(grads, state, params, implementation="kernel")

    def only_gradients(params, state, x):
        return jax.grad(lambda p: jnp.sum((x @ p["w"].T + p["b"]) ** 2))(params), state

    arguments = params, tx.init(params), jnp.ones((4, 256))
    stats = jax.jit(train, donate_argnums=(0, 1)).lower(*arguments).compile().memory_analysis()
    base = jax.jit(only_gradients, donate_argnums=1).lower(*arguments).compile().memory_analysis()
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    assert stats.temp_size_in_bytes < base.temp_size_in_bytes + 1.02 * size  # the gradients, and nothing else
    alone = by(tx, "kernel").lower(*arguments[:2], params).compile().memory_analysis()
    assert alone.temp_size_in_bytes < 0.01 * size + 4096


def test_one_array_in_several_roles():
    tx, x = FACTORIES["recommended"](), gradients(jnp.ones((35, 20)))
    tied = {"a": x, "b": x}
    got, want = (
        jax.jit(lambda x, i=i: tx.step(tied, tx.init(tied), {"a": x, "b": x}, implementation=i))(x)
        for i in ("kernel", "definition")
    )
    close(got, want)
    itself = [jax.jit(lambda x, i=i: tx.step(x, tx.init(x), x, implementation=i))(x) for i in ("kernel", "definition")]
    close(*itself)


# ---- trees


def test_trees_of_all_kinds():
    tx = FACTORIES["recommended"]()
    params = {"deep": [(jnp.ones((2, 3)), {"x": jnp.ones(())})], "none": None, "empty": jnp.ones((0, 4)), "e": {}}
    for implementation in ("kernel", None):
        got = steps_with(tx, params, [implementation] * 2)
        close(got, steps_with(tx, params, ["update"] * 2))
    close(steps_with(tx, {}, ["kernel"]), steps_with(tx, {}, ["update"]))
    close(steps_with(tx, jnp.ones(3), ["kernel"]), steps_with(tx, jnp.ones(3), ["update"]))


def test_numbers_and_numpy_arrays_as_parameters():
    tx, params = fj.sm3(0.1), {"a": 1.0, "b": np.ones((2, 3), np.float32)}
    grads = {"a": 0.5, "b": np.full((2, 3), 0.5, np.float32)}
    close(tx.step(grads, tx.init(params), params), stepper(tx)(params, tx.init(params), grads))


def test_networks_of_linen_and_nnx():
    x = jnp.linspace(-1, 1, 12).reshape(3, 4)
    tx = FACTORIES["flax"]()
    params = linen.Dense(5).init(jax.random.key(0), x)
    close(steps_with(tx, params, ["kernel"] * 2), steps_with(tx, params, ["update"] * 2))

    model = nnx.Linear(4, 5, rngs=nnx.Rngs(0))
    same = nnx.clone(model)
    optimizer = nnx.Optimizer(same, tx, wrt=nnx.Param)
    state = tx.init(nnx.state(model, nnx.Param))

    def loss(model):
        return jnp.mean(model(x) ** 2)

    @nnx.jit
    def train(model, state):
        params, state = tx.step(nnx.grad(loss)(model), state, nnx.state(model, nnx.Param))
        nnx.update(model, params)
        return state

    for _ in range(3):
        state = train(model, state)
        optimizer.update(same, nnx.grad(loss)(same))
    close(nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(same)))


# ---- where it is the definition


def test_under_vmap_it_is_the_definition():
    tx = FACTORIES["recommended"]()
    params = jnp.stack([jnp.full((3, 4), i + 1.0) for i in range(5)])
    grads = gradients(params)

    def one(p, g, implementation=None):
        return tx.step(g, tx.init(p), p, implementation=implementation)

    got = jax.jit(jax.vmap(one))(params, grads)
    close(got, jax.tree.map(lambda *x: jnp.stack(x), *(one(p, g) for p, g in zip(params, grads, strict=True))))
    with pytest.raises(KernelError, match="under vmap"):
        jax.vmap(lambda p, g: one(p, g, "kernel"))(params, grads)


@over(["recommended", "ternary_vote"], ["ternary_vote"])
def test_derivatives_are_those_of_the_definition(factory):
    params = factory.parameters()
    tx = factory()

    def end(grads, implementation):
        after, _ = tx.step(grads, tx.init(params), params, implementation=implementation)
        return sum(jnp.sum(p**2) for p in jax.tree.leaves(after))

    grads = gradients(params)
    close(jax.jit(jax.grad(lambda g: end(g, None)))(grads), jax.grad(lambda g: end(g, "definition"))(grads))
    with pytest.raises(KernelError, match="for derivatives"):
        jax.grad(lambda g: end(g, "kernel"))(grads)


def test_inside_control_flow_it_is_a_kernel():
    tx, params = FACTORIES["recommended"](), parameters()

    def body(carry, i):
        after = tx.step(jax.tree.map(lambda p: p * i, carry[0]), carry[1], carry[0], implementation="kernel")
        return after, None

    def loop(params):
        return jax.lax.scan(body, (params, tx.init(params)), jnp.arange(1.0, 4.0))[0]

    got = jax.jit(loop)(params)
    state, want = tx.init(params), params
    for i in range(1, 4):
        want, state = stepper(tx)(want, state, jax.tree.map(lambda p: p * i, want))  # noqa: B023
    close(got, (want, state))
    with jax.disable_jit():
        close(tx.step(params, tx.init(params), params), stepper(tx)(params, tx.init(params), params))


def test_a_chain_that_no_plan_expresses_is_the_definition():
    class Sorted(Transform):
        name = "sorted"

        def slots(self, shape):
            return {"past": Slot.full(len(shape))}

        def update(self, xp, signal, state, param):
            return Signal(xp.cumsum(signal.update, axis=0)), {"past": signal.update}

    tx, params = fj.from_chain(chain(Sorted()), 0.1), parameters()
    close(steps_with(tx, params, [None, "update"]), steps_with(tx, params, ["update", "update"]))
    with pytest.raises(KernelError, match=r"for this chain.*cumsum"):
        tx.step(params, tx.init(params), params, implementation="kernel")


def test_what_update_refuses_step_refuses_with_the_same_words():
    tx, params = fj.sm3(0.1), {"w": jnp.ones((2, 3))}
    with pytest.raises(TypeError, match=r"\['w'\].*int32"):
        tx.step({"w": jnp.ones((2, 3), int)}, tx.init(params), {"w": jnp.ones((2, 3), int)})
    with pytest.raises(ValueError, match="has shape"):
        tx.step({"w": jnp.ones((3, 2))}, tx.init(params), params)
    with pytest.raises(ValueError, match="belongs to other parameters"):
        tx.step(params, tx.init({"w": jnp.ones((3, 2))}), params)
    with pytest.raises(ValueError, match='"kernel", "definition" or None'):
        tx.step(params, tx.init(params), params, implementation="fast")
    with pytest.raises(KernelError, match="another optimizer's"):
        tx.step(params, optax.adam(0.1).init(params), params, implementation="kernel")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kernels": "nobody "}, r"has not loaded \(nobody\)"),
        ({"words": np.zeros(3)}, "an attribute is missing"),
        ({"records": np.zeros(7, np.int64)}, "does not fit its arrays: records"),
        ({"lists": np.int64(7)}, "does not fit its arrays: lists"),
        ({"buffers": np.array([3, 2])}, "does not fit its arrays: arrays"),
        ({"buffers": np.array([-2, 2])}, "does not fit its arrays: arrays"),
        ({"buffers": np.array([1])}, "does not fit its arrays: arrays"),
        ({"written": np.array([3])}, "does not fit its arrays: results"),
        ({"written": np.array([-2])}, "does not fit its arrays: results"),
        ({"written": np.array([2])}, "a result has memory of its own"),
        ({"records": np.array([0, 2, 4, 6, 8, 0, 5, 1, 1, 3])}, "does not fit its arrays: arrays"),
    ],
)
def test_a_call_that_does_not_fit_is_an_error(changed, message):
    """As a compiled program from elsewhere may make it."""
    x, fj_step = jnp.ones(3), fj.scaled_optum(0.1)
    fj_step.step(x, fj_step.init(x), x, implementation="kernel")
    target, _ = kernels._target()
    (name,) = {kernel.name for kernel in [native.kernel(recipes.scaled_optum(), 1, (0,), "float32")]}
    record = [0, 2, 4, 6, 8, 0, 2, 1, 1, 3]
    attributes = {
        "kernels": f"{name} ",
        "kinds": np.zeros(1, np.int64),
        "buffers": np.array([1, 2]),
        "written": np.ones(1, np.int64),
        "lists": np.int64(1),
        "records": np.array(record, np.int64),
        "words": np.array([0, 0, 4, 4, 12, 12, 0, 0, 3], np.int64),
    }
    call = jax.ffi.ffi_call(target, [jax.ShapeDtypeStruct(x.shape, x.dtype)], input_output_aliases={1: 0})
    (stepped,) = jax.jit(lambda *a: call(*a, **attributes))(jnp.float32([0.1]), x, x)
    np.testing.assert_allclose(stepped, 0.9)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(jax.jit(lambda *a: call(*a, **{**attributes, **changed}))(jnp.float32([0.1]), x, x))


def test_it_is_one_of_optaxs_transformations():
    tx, params = fj.sm3(0.1), parameters()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    assert isinstance(tx, fj.SteppingTransformation)
    init, update = tx
    assert (init, update) == (tx.init, tx.update)
    again = jax.tree.map(lambda x: x, tx)  # as nnx does
    close(again.step(params, again.init(params), params), tx.step(params, tx.init(params), params))
    chained = optax.chain(optax.clip(1.0), tx)
    chained.update(params, chained.init(params), params)
    assert isinstance(fj.from_chain(recipes.sm3(), 0.1), fj.SteppingTransformation)
