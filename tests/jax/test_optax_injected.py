"""Every factory under optax.inject_hyperparams without `static_args`, as optax's own."""

import inspect
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from factories import FACTORIES, constants, described, every_factory, gradients, parameters, run, sweep_of_factories
from sweeps import only, sweep

import fusedbun_jax as fj
from fusedbun import transforms
from fusedbun.recipes import RECIPES
from fusedbun.transforms import Momentum
from fusedbun_jax.injected import Known

inject = optax.inject_hyperparams
RATE = optax.linear_schedule(0.25, 0.125, 2)


def arrays(tx, params=None):
    """The optimizer's own state as it starts, without what is injected."""
    return tx.init(parameters() if params is None else params).inner_state


@every_factory
def test_the_state_is_what_it_is_without(factory):
    params = factory.parameters()
    assert described(arrays(factory.injected(), params)) == described(factory().init(params))


@sweep("name", RECIPES, short=only("fusedbunw", "sm3", "ternary_vote"))
def test_the_defaults_serve(name):
    """With the learning rate alone, as optax.adamw."""
    recipe, make = RECIPES[name], getattr(fj, name)
    untyped = {"allow_non_unit_scaling_params": True} if "mup" in recipe.defaults else {}
    params = jax.tree.map(jnp.sign, parameters())
    rate = {} if recipe.fixed_lr else {"learning_rate": 0.25}
    got, state = run(inject(make)(**rate, **untyped), params, 1)
    expected, inner = run(make(**rate, **untyped), params, 1)
    chex.assert_trees_all_close(got, expected, rtol=1e-4)
    assert described(state.inner_state) == described(inner)
    if not recipe.fixed_lr:
        assert inject(make)(RATE, **untyped).init(params).hyperparams["learning_rate"] == 0.25


@sweep_of_factories
def test_what_is_injected_is_every_number_and_nothing_else(factory):
    state = factory.injected().init(factory.parameters())
    settings = {**RECIPES[factory.make.__name__].defaults, **factory.settings}
    zeros = {name for name in ("momentum", "dampening", "momentum_beta") if settings.get(name) == 0}
    own = [name for name in inspect.signature(factory.make).parameters if name not in constants(factory.make)]
    assert set(state.hyperparams) == {name for name in own if settings.get(name, 0.0) is not None} - zeros


MOMENTUM = {"fusedbun": "momentum_beta", "fusedbunw": "b1", "sm3": "momentum", "mup_sgd": "momentum"}


@pytest.mark.parametrize("zero", [0, 0.0, np.float32(0), np.float64(0)], ids=["0", "0.0", "float32", "float64"])
@pytest.mark.parametrize(("name", "momentum"), MOMENTUM.items())
def test_a_momentum_of_0_has_no_state(name, momentum, zero):
    untyped = {"allow_non_unit_scaling_params": True} if name == "mup_sgd" else {}
    make = inject(getattr(fj, name))
    assert not optax.tree.get_all_with_path(arrays(make(0.1, **{momentum: zero}, **untyped)), "moment")
    for above in (0.5, jnp.float32(0), lambda count: 0.0):
        kept = arrays(make(0.1, **{momentum: above, "momentum_dtype": None}, **untyped))
        assert optax.tree.get_all_with_path(kept, "moment")


def test_what_is_given_by_hand_stays_as_it_is():
    params = {"kernel": parameters()["layer"]["kernel"]}
    settings = {"centralize": True, "channel_axis": -1, "momentum_dtype": "int8", "seed": 3}
    got, state = run(inject(fj.fusedbun)(0.25, **settings), params, 2)
    expected, inner = run(fj.fusedbun(0.25, **settings), params, 2)
    chex.assert_trees_all_close(got, expected, rtol=1e-6)
    assert described(state.inner_state) == described(inner)
    other, _ = run(inject(fj.fusedbun)(0.25, **{**settings, "seed": 4}), params, 2)
    assert (other["kernel"] != got["kernel"]).any()


def test_rules_are_no_schedules():
    params = parameters()
    asked = []

    def last(path, param):
        asked.append(path)
        return -1

    def mask(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    got, _ = run(inject(fj.fusedbunw)(0.25, channel_axis=last, mask=mask, weight_decay=0.5), params, 1)
    expected, _ = run(fj.fusedbunw(0.25, channel_axis=last, mask=mask, weight_decay=0.5), params, 1)
    chex.assert_trees_all_close(got, expected, rtol=1e-5)
    assert set(asked) == {("layer", "bias"), ("layer", "kernel")}


def test_arguments_may_be_bound_before():
    make = inject(partial(fj.fusedbun, channel_axis=-1, centralize=True, momentum_beta=0.0))
    params = {"kernel": parameters()["layer"]["kernel"]}
    got, state = run(make(0.25), params, 1)
    chex.assert_trees_all_equal(got, run(fj.fusedbun(0.25, 1e-8, 0.8, 0.01, 0.0, True, channel_axis=-1), params, 1)[0])
    assert set(state.hyperparams) == {"learning_rate", "eps", "beta_decay", "Lambda"}
    assert inject(partial(fj.sm3, 0.25))(momentum=0.5).init(params).hyperparams["momentum"] == 0.5


RELATIVE = {name: getattr(fj, name) for name, recipe in RECIPES.items() if recipe.wants_initial_lr}


@sweep("make", RELATIVE.values(), short=only(fj.decoupled_lionw), ids=RELATIVE)
def test_a_relative_decay_asks_for_the_initial_rate_only_where_there_is_a_decay(make):
    untyped = {} if make is fj.decoupled_lionw else {"allow_non_unit_scaling_params": True}
    params, decay = parameters(), 2.0**-12
    run(inject(make)(RATE, **untyped), params, 1)
    run(inject(make)(RATE, weight_decay=0, **untyped), params, 1)
    with pytest.raises(ValueError, match="give initial_learning_rate"):
        inject(make)(RATE, weight_decay=decay, **untyped).init(params)
    expected, _ = run(make(0.25, weight_decay=decay, **untyped), params, 1)
    for given in ({"learning_rate": 0.25}, {"learning_rate": RATE, "initial_learning_rate": 0.25}):
        got, _ = run(inject(make)(**given, weight_decay=decay, **untyped), params, 1)
        chex.assert_trees_all_close(got, expected, rtol=1e-6)


def test_a_decay_of_0_can_be_set_where_the_initial_rate_is_known():
    params, tx = parameters(), inject(fj.decoupled_lionw)(0.25)
    state = optax.tree.set(tx.init(params), weight_decay=jnp.float32(2.0**-12))
    got, _ = run(tx, params, 1, state)
    chex.assert_trees_all_close(got, run(fj.decoupled_lionw(0.25, weight_decay=2.0**-12), params, 1)[0], rtol=1e-6)


def test_numbers_that_derive_no_others_give_the_same_bits():
    """An array has the parameters' precision; so have numbers, but for what is computed of them before, as 1 - beta."""
    for name in ("scaled_optum", "decoupled_lionw", "ternary_vote", "fusedbun"):
        factory = FACTORIES[name]
        params = factory.parameters()
        chex.assert_trees_all_equal(run(factory.injected(), params, 3)[0], run(factory(), params, 3)[0])


@pytest.mark.parametrize("transform", [getattr(transforms, name) for name in transforms.__all__], ids=lambda t: t.name)
def test_every_transformation_is_injectable(transform):
    make = getattr(fj, transform.name)
    required = {"scale": 0.5} if transform.name == "scale_by_mup" else {}
    state = arrays(inject(make)(**required))
    assert described(state) == described(make(**required).init(parameters()))


def test_the_seeds_of_others_stay_as_they_are():
    params = parameters(jnp.bfloat16)
    chain = fj.chain(Momentum(0.5, dtype="int8"))
    for make, known in ((fj.from_chain, (chain, 0.25)), (fj.round_stochastically, ())):
        got, want = inject(make)(*known, seed=3), make(*known, seed=3)
        grads = gradients(params)
        step = jax.jit(got.update)
        chex.assert_trees_all_close(
            step(grads, got.init(params), params)[0],
            jax.jit(want.update)(grads, want.init(params), params)[0],
            rtol=1e-2,
        )


def test_static_args_are_still_taken():
    make = inject(fj.fusedbunw, static_args=("channel_axis", "b1"))
    state = make(0.25, channel_axis=-1).init({"kernel": parameters()["layer"]["kernel"]})
    assert "b1" not in state.hyperparams


def test_other_names_are_those_of_the_factory():
    inject = optax.inject_hyperparams
    params = {"w": jnp.ones(3)}
    for make in (inject(fj.fusedbun), inject(partial(fj.fusedbun, use_rms=True))):
        numbers = make(0.1, weight_decay=0.5, momentum=lambda count: 0.25).init(params).hyperparams
        assert (numbers["Lambda"], numbers["momentum_beta"]) == (0.5, 0.25)
        assert numbers.keys() == make(0.1).init(params).hyperparams.keys()
    with pytest.raises(TypeError, match="weight_decay is another name for Lambda, and both are given"):
        inject(fj.fusedbun)(0.1, weight_decay=0.5, Lambda=0.5)


def test_a_signature_binds_what_is_known_once():
    signature = inspect.signature(fj.fusedbun)
    once = signature.bind(0.1, channel_axis=-1)
    again = signature.bind(**once.arguments)
    assert once.arguments["channel_axis"] == again.arguments["channel_axis"] == Known(-1)
    assert once.arguments["beta_decay"] == again.arguments["beta_decay"] == 0.8
