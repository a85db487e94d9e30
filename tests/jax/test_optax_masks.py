"""Ours on a part of the parameters, or in some of the steps: what optax's tests of such wrappers ask.

Everything is told from one step of the whole tree, in which each leaf is stepped as if it were alone.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from factories import described, every_factory, gradients, jitted_update, over

some_factories = over(["recommended", "sm3-momentum", "mup_adamw", "ternary_vote"], ["sm3-momentum"])

# A mask says which leaves are ours; where it is a prefix, for all leaves below.
MASKS = {
    "of leaves": {"a": True, "b": [False, True], "c": {"d": True, "e": (False, True)}},
    "a prefix": {"a": True, "b": False, "c": {"d": False, "e": True}},
    "of no leaf": {"a": False, "b": False, "c": False},
    "of every leaf": {"a": True, "b": True, "c": True},
}
FUNCTIONS = {
    "a function of the parameters": lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    "a function to a prefix": lambda params: MASKS["a prefix"],
}


def parameters(factory):
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 4), "b": [(4,), (2, 3)], "c": {"d": (), "e": ((5,), (1, 2))}}
    values = jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple) and all(isinstance(n, int) for n in x),
    )
    return jax.tree.map(jnp.sign, values) if factory.ternary else values


def one_step(factory):
    """Parameters, gradients, and the updates of a step of all of them."""
    params = parameters(factory)
    grads = gradients(params)
    return params, grads, jitted_update(factory())(grads, factory().init(params), params)[0]


def chosen(mask, ours, others):
    """Of two trees, the first one's leaves where the mask is True."""
    return jax.tree.map(lambda is_ours, u, o: u if is_ours else o, mask, ours, others)


def all_in_one(wrappers, grads, params):
    """The first updates of each of several optimizers, compiled together."""

    def every(grads, params):
        return {name: tx.update(grads, tx.init(params), params)[0] for name, tx in wrappers.items()}

    return jax.jit(every)(grads, params)


@some_factories
def test_masked_leaves_are_passed_by_whatever_the_mask_is(factory):
    params, grads, updates = one_step(factory)
    got = all_in_one({name: optax.masked(factory(), mask) for name, mask in (MASKS | FUNCTIONS).items()}, grads, params)
    for name, found in got.items():
        mask = FUNCTIONS[name](params) if name in FUNCTIONS else MASKS[name]
        chex.assert_trees_all_close(found, chosen(mask, updates, grads), rtol=1e-6)


@some_factories
def test_masks_inside_masks(factory):
    params, grads, updates = one_step(factory)
    inner = optax.masked(factory(), {"a": True, "b": [False, False], "c": True})
    got = all_in_one({"": optax.masked(inner, FUNCTIONS["a function of the parameters"])}, grads, params)[""]
    mask = {"a": True, "b": [False, False], "c": {"d": False, "e": (False, True)}}
    chex.assert_trees_all_close(got, chosen(mask, updates, grads), rtol=1e-6)


@some_factories
def test_frozen_leaves_get_no_update(factory):
    params, grads, updates = one_step(factory)
    frozen = {**MASKS, "one word for all": True, "one word for none": False}
    got = all_in_one(
        {name: optax.transforms.selective_transform(factory(), freeze_mask=mask) for name, mask in frozen.items()}
        | {"after": optax.chain(factory(), optax.transforms.freeze(MASKS["of leaves"]))},
        grads,
        params,
    )
    nothing = jax.tree.map(jnp.zeros_like, grads)
    for name, found in got.items():
        mask = {"after": MASKS["of leaves"], **frozen}[name]
        wanted = chosen(mask, nothing, updates) if isinstance(mask, dict) else (nothing if mask else updates)
        chex.assert_trees_all_close(found, wanted, rtol=1e-6)


@some_factories
def test_labels_may_be_a_prefix_or_a_function(factory):
    params, grads, updates = one_step(factory)
    labels = {"a": "ours", "b": ["plain", "ours"], "c": "plain"}
    parts = {"ours": factory(), "plain": optax.scale(-0.5), "unused": optax.sgd(1.0)}
    wrapped = {"tree": optax.partition(parts, labels), "function": optax.partition(parts, lambda _: labels)}
    is_ours = {"a": True, "b": [False, True], "c": False}
    for found in all_in_one(wrapped, grads, params).values():
        expected = chosen(is_ours, updates, jax.tree.map(lambda g: -0.5 * g, grads))
        chex.assert_trees_all_close(found, expected, rtol=1e-6)


@every_factory
def test_containers_without_leaves(factory):
    for container in ({}, [], ()):
        for tx in (
            optax.masked(factory(), container),
            optax.partition({0: factory()}, lambda _: 0),
            optax.transforms.selective_transform(factory(), freeze_mask=True),
        ):
            updates, _ = tx.update(container, tx.init(container), container)
            assert updates == container


@pytest.mark.parametrize("as_function", [False, True], ids=["tree", "function"])
@every_factory
def test_a_mask_of_another_tree_is_an_error(factory, as_function):
    params, mask = parameters(factory), MASKS["of leaves"]
    fewer = {"a": True, "b": True}
    more = {**mask, "extra": True}
    labels = {"a": "ours", "b": ["other", "ours"], "c": "ours"}
    for wrapped in (
        *(optax.masked(factory(), (lambda _, m=m: m) if as_function else m) for m in (fewer, more)),
        optax.partition({"ours": factory()}, (lambda _: labels) if as_function else labels),
    ):
        with pytest.raises(ValueError, match=r"[Kk]ey|label|structure"):
            wrapped.init(params)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    """A tree that can be called, as modules of Equinox are."""

    kernel: jax.Array

    def __call__(self, x):
        return self.kernel @ x


@every_factory
def test_parameters_that_can_be_called(factory):
    layer = Layer(jnp.ones((3, 4), jnp.float32))
    for mask in (Layer(True), Layer(False)):
        tx = optax.masked(factory(), mask)
        updates = jax.eval_shape(lambda p, tx=tx: tx.update(p, tx.init(p), p)[0], layer)
        assert isinstance(updates, Layer)
        assert updates.kernel.shape == (3, 4)


# In some of the steps


@some_factories
def test_steps_that_are_left_out(factory):
    """`conditionally_transform` hands the gradient on, `conditionally_mask` nothing; the state rests in both."""
    params = factory.parameters()
    for wrapper in (optax.transforms.conditionally_transform, optax.transforms.conditionally_mask):
        tx = wrapper(factory(), lambda step: step != 1)
        state, inner = tx.init(params), factory().init(params)
        for step in range(3):
            grads = gradients(params, step)
            updates, state = jitted_update(tx)(grads, state, params)
            if step == 1:
                is_mask = wrapper is optax.transforms.conditionally_mask
                chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, grads) if is_mask else grads)
            else:
                expected, inner = jitted_update(factory())(grads, inner, params)
                chex.assert_trees_all_close(updates, expected, rtol=1e-5)
        chex.assert_trees_all_close(state.inner_state, inner, rtol=1e-5)


@every_factory
def test_steps_are_left_out_by_what_update_is_told(factory):
    tx = optax.transforms.conditionally_mask(factory(), lambda step, loss, **_: loss > 0.1, forward_extra_args=True)
    params = factory.parameters()
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(lambda g, s, p: tx.update(g, s, p, loss=0.2), params, state, params)
    assert described((updates, after)) == described((params, state))


@some_factories
def test_too_many_steps_with_nan_are_let_through(factory):
    """One is left out, and the second in a row is taken."""
    tx, params = optax.apply_if_finite(factory(), 1), factory.parameters()
    step, state = jitted_update(tx), tx.init(params)
    broken = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), gradients(params))
    finite = []
    for grads in (gradients(params), broken, broken):
        updates, state = step(grads, state, params)
        finite.append(bool(jax.tree.all(jax.tree.map(lambda u: jnp.isfinite(u).all(), updates))))
    assert finite == [True, True, False]
    assert state.total_notfinite == 2
