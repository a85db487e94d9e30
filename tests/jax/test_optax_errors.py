"""Errors name the argument or the leaf, the value, and what would be right."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from factories import RECOMMENDED, every_factory, gradients, parameters, representative

import fusedbun_jax
from fusedbun import recipes
from fusedbun.transforms import Momentum
from fusedbun_jax import fusedbun

NUMBERS = {  # with the ranges that the documentation gives them
    "learning_rate": "[0, inf)",
    "eps": "[0, inf)",
    "beta_decay": "[0, 1)",
    "Lambda": "[0, inf)",
    "momentum_beta": "[0, 1)",
    "clip_rms": "(0, inf) or None",
}
FLAGS = ["centralize", "use_rms", "nesterov", "lagged", "stochastic_rounding"]
NO_NUMBERS = [True, "0.1", 1j, [0.1], np.ones(2), jnp.ones(2), object]
OUTSIDE = [-0.1, float("nan"), float("inf"), -float("inf"), np.float32(-1), np.array(-1.0), jnp.float32(jnp.nan)]


def make(**arguments):
    return fusedbun(**{"learning_rate": 0.1, **arguments})


def test_every_argument_has_a_row_here():
    rest = {"channel_axis", "momentum_dtype", "seed", "stacked"}
    assert {*NUMBERS, *FLAGS, *rest} == set(inspect.signature(fusedbun).parameters)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize("name", [name for name in NUMBERS if name != "learning_rate"])
def test_what_is_not_a_number_is_a_type_error(name, value):
    check(TypeError, name, value, f"must be a number in {NUMBERS[name]}")


@pytest.mark.parametrize("value", [v for v in NO_NUMBERS if v is not object] + [None], ids=repr)
def test_a_learning_rate_that_is_not_a_number_is_a_type_error(value):
    check(TypeError, "learning_rate", value, "must be a number in [0, inf)")


@pytest.mark.parametrize("name", [name for name in NUMBERS if name not in ("learning_rate", "clip_rms")])
def test_none_is_a_type_error_where_it_means_nothing(name):
    check(TypeError, name, None, f"must be a number in {NUMBERS[name]}")


@pytest.mark.parametrize("value", OUTSIDE, ids=repr)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_outside_its_range_is_a_value_error(name, value):
    check(ValueError, name, value, f"must lie in {NUMBERS[name]}")


@pytest.mark.parametrize(
    ("name", "value"), [("beta_decay", 1), ("beta_decay", 1.5), ("momentum_beta", 1.0), ("clip_rms", 0.0)]
)
def test_the_open_end_of_a_range_is_outside(name, value):
    check(ValueError, name, value, f"must lie in {NUMBERS[name]}")


@pytest.mark.parametrize("value", [None, 0, 1.0, "True", np.ones(2)], ids=repr)
@pytest.mark.parametrize("name", FLAGS)
def test_what_is_not_a_flag_is_a_type_error(name, value):
    check(TypeError, name, value, "must be True or False")


@pytest.mark.parametrize("value", [None, True, 0.0, "0"], ids=repr)
def test_what_is_not_an_axis_is_a_type_error(value):
    check(TypeError, "channel_axis", value, "must be an integer")


@pytest.mark.parametrize("value", [None, True, 1.0, "1", jnp.ones((), int)], ids=repr)
def test_what_is_not_a_number_of_axes_is_a_type_error(value):
    check(TypeError, "stacked", value, "must be an integer from 0 up or a rule")


@pytest.mark.parametrize("value", [True, 0.0, "0", np.zeros(1, int)], ids=repr)
def test_what_is_not_a_seed_is_a_type_error(value):
    check(TypeError, "seed", value, "must be an integer")
    for make_one in (
        lambda: fusedbun_jax.lift(Momentum(), seed=value),
        lambda: fusedbun_jax.from_chain(recipes.sm3(), 0.1, seed=value),
        lambda: fusedbun_jax.round_stochastically(value),
    ):
        with pytest.raises(TypeError, match="seed must be an integer, but it is"):
            make_one()


def test_what_is_not_a_dtype_of_moments():
    allowed = "must be one of 'param', 'float32', 'bfloat16', 'int8', 'int4' or None"
    for value in ("float16", "int2", "", jnp.float16):
        check(ValueError, "momentum_dtype", value, allowed)
    for value in (8, True, jnp.ones(())):
        check(TypeError, "momentum_dtype", value, allowed)


def check(kind, name, value, allowed):
    with pytest.raises(kind) as raised:
        make(**{name: value})
    message = str(raised.value)
    assert f"{name} {allowed}" in message or f"{name.replace('clip_rms', 'threshold')} {allowed}" in message
    assert repr(value) in message


@pytest.mark.parametrize("name", ["lr", "Eps", "decay"])
def test_an_unknown_name_is_a_type_error(name):
    with pytest.raises(TypeError, match=name):
        make(**{name: 0.1})


def test_the_learning_rate_is_required():
    with pytest.raises(TypeError, match="learning_rate"):
        fusedbun()


@pytest.mark.parametrize(("name", "number"), [("sm3_accumulate", "beta"), ("momentum", "beta"), ("rms_scale", "eps")])
def test_a_lifted_transformation_checks_as_well(name, number):
    with pytest.raises(ValueError, match=rf"{name}: {number} must lie in \[0, .*, but it is -1"):
        getattr(fusedbun_jax, name)(**{number: -1})


@pytest.mark.parametrize("not_a_chain", [[1], ["momentum"], [optax.scale(1.0)]], ids=["number", "name", "optax"])
def test_a_chain_of_something_else_is_a_type_error(not_a_chain):
    with pytest.raises(TypeError, match="a chain is made of fusedbun's transformations"):
        fusedbun_jax.chain(*not_a_chain)


@pytest.mark.parametrize(
    "not_a_chain", [None, [Momentum()], Momentum(), optax.scale(1.0)], ids=lambda x: type(x).__name__
)
def test_from_chain_takes_a_chain(not_a_chain):
    with pytest.raises(TypeError, match=r"from_chain takes a chain, `fusedbun.chain\(...\)`, but it is "):
        fusedbun_jax.from_chain(not_a_chain, 0.1)


def test_by_name_takes_a_factory():
    with pytest.raises(TypeError, match=r"make must be a factory, such as fusedbun_jax\.sm3, but it is 'sm3'"):
        fusedbun_jax.by_name("sm3")


@every_factory
def test_parameters_that_are_not_real_numbers(factory):
    for dtype in ("int32", "uint8", "bool", "complex64"):
        params = factory.parameters()
        params["layer"]["kernel"] = jnp.ones((3, 4), dtype)
        with pytest.raises(TypeError, match=rf"the parameter of leaf .*'layer'.*'kernel'.* is {dtype}, but only real"):
            factory().init(params)


@every_factory
def test_gradients_that_are_not_real_numbers(factory):
    tx, params = factory(), factory.parameters()
    for dtype in ("int32", "complex64"):
        grads = gradients(params)
        grads["layer"]["kernel"] = jnp.ones((3, 4), dtype)
        with pytest.raises(TypeError, match=rf"the update of leaf .*'layer'.*'kernel'.* is {dtype}, but only real"):
            jax.eval_shape(tx.update, grads, tx.init(params), params)


def test_such_parameters_can_be_masked():
    params = {"w": jnp.ones((3, 4)), "step": jnp.int32(3)}
    tx = optax.masked(fusedbun(0.1), {"w": True, "step": False})
    updates, _ = tx.update({"w": jnp.ones((3, 4)), "step": jnp.int32(0)}, tx.init(params), params)
    assert updates["step"] == 0


@pytest.mark.parametrize("leaf", ["float32", object()], ids=["string", "object"])
def test_leaves_that_are_not_arrays(leaf):
    with pytest.raises(
        TypeError, match=r"the parameter of leaf .*'a'.* must be an array, but it is .*\((str|object)\)"
    ):
        fusedbun(0.1).init({"a": leaf})


@every_factory
def test_a_gradient_of_another_shape(factory):
    tx, params = factory(), factory.parameters()
    for shape in (4, 3), (3, 1), (4,), ():
        grads = gradients(params)
        grads["layer"]["kernel"] = jnp.ones(shape)
        with pytest.raises(
            ValueError, match=r"the update of leaf .*'kernel'.* has shape .*, but the parameter has \(3, 4\)"
        ):
            jax.eval_shape(tx.update, grads, tx.init(params), params)


def test_the_only_leaf_has_no_path():
    tx = fusedbun(0.1)
    with pytest.raises(ValueError, match=r"the update of the only leaf has shape \(3,\)"):
        tx.update(jnp.ones(3), tx.init(jnp.ones(4)), jnp.ones(4))


def test_missing_parameters():
    tx, params = fusedbun(0.1), parameters()
    with pytest.raises(ValueError, match=r"decay needs the parameters: call update\(updates, state, params\)"):
        tx.update(gradients(params), tx.init(params))


def test_parameters_may_be_missing_where_none_are_read():
    tx, params = fusedbun_jax.momentum(0.9), parameters()
    updates, _ = tx.update(gradients(params), tx.init(params))
    np.testing.assert_array_equal(updates["layer"]["bias"], gradients(params)["layer"]["bias"])


def without(tree, name):
    return {"layer": {n: x for n, x in tree["layer"].items() if n != name}}


@representative
def test_trees_that_do_not_match(factory):
    tx, params = factory(), parameters()
    grads, state = gradients(params), tx.init(params)
    for wrong in (
        (without(grads, "bias"), state, params),
        (grads, tx.init(without(params, "bias")), params),
        (grads, state, without(params, "bias")),
        ({"layer": {**grads["layer"], "more": jnp.ones(2)}}, state, params),
        ({"layer": {**grads["layer"], "bias": None}}, state, params),
        (list(grads["layer"].values()), state, params),
    ):
        with pytest.raises(ValueError, match=r"(?i)expected|mismatch|key|another tree"):
            tx.update(*wrong)


def test_parameters_that_go_deeper_than_the_gradients():
    params = {"a": {"b": jnp.ones(3)}}
    tx = fusedbun(0.1)
    with pytest.raises(TypeError, match=r"the parameter of leaf .*'a'.* must be an array, but it is .*\(dict\)"):
        tx.update({"a": jnp.ones(3)}, tx.init(params), params)


@pytest.mark.parametrize("compile_update", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_state_of_other_parameters_or_hyperparameters(compile_update):
    tx, params = fusedbun(0.1), {"w": jnp.ones((3, 4))}
    update = compile_update(tx.update)
    with pytest.raises(ValueError, match=r"sm3_accumulate: the state of leaf .*'w'.* \(2, 1\).* init"):
        update(params, tx.init({"w": jnp.ones((2, 4))}), params)
    with pytest.raises(ValueError, match=r"momentum: the state of leaf .*'w'.* holds nothing, .*'moment': \(3, 4\)"):
        update(params, fusedbun(0.1, momentum_beta=0.0).init(params), params)
    with pytest.raises(ValueError, match=r"momentum: the state of leaf .*'w'.* holds .*but nothing is needed"):
        fusedbun(0.1, momentum_beta=0.0).update(params, tx.init(params), params)


@pytest.mark.parametrize("axis", [2, -3, 7])
@pytest.mark.parametrize("rule", [True, False], ids=["rule", "integer"])
def test_a_channel_axis_that_a_parameter_does_not_have(axis, rule):
    tx = fusedbun(0.1, **RECOMMENDED, channel_axis=(lambda path, param: axis) if rule else axis)
    message = rf"channel_axis must lie in \[-2, 2\) for a parameter of shape \(3, 4\), but it is {axis}"
    with pytest.raises(ValueError, match=message) as raised:
        tx.init({"bias": jnp.ones(4), "layer": {"kernel": jnp.ones((3, 4))}})
    assert "leaf \"['layer']['kernel']\"" in "".join(raised.value.__notes__)


@pytest.mark.parametrize("answer", [None, 1.0, "0", True])
def test_a_rule_that_gives_no_axis(answer):
    tx = fusedbun(0.1, **RECOMMENDED, channel_axis=lambda path, param: answer)
    with pytest.raises(TypeError, match=r"channel_axis must be an integer.*, but it is") as raised:
        tx.init({"kernel": jnp.ones((3, 4))})
    assert "leaf \"['kernel']\"" in "".join(raised.value.__notes__)


def test_an_error_of_the_rules_own_is_left_as_it_is():
    def rule(path, param):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fusedbun(0.1, **RECOMMENDED, channel_axis=rule).init(parameters())
