"""Optimizers by their names, in both frameworks."""

import jax
import jax.numpy as jnp
import pytest
import torch

import fusedbun
import fusedbun_jax
from fusedbun.recipe import named
from fusedbun.recipes import RECIPES

NAMES = {name: recipe for recipe in RECIPES.values() for name in (recipe.name, *recipe.torch_names)}
MADE = {fusedbun.create: "fusedbun.create", fusedbun_jax.create: "fusedbun_jax.create"}
in_both = pytest.mark.parametrize("create", MADE, ids=MADE.values())


def model():
    """A module whose weights any optimizer steps: TernaryVote's are -1, 0 and +1."""
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    for p in network.parameters():
        p.data.sign_()
    return network


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_an_optimizer_makes_it(name):
    recipe = NAMES[name]
    untyped = {"allow_non_unit_scaling_params": True} if "mup" in recipe.defaults else {}
    rate = {} if recipe.fixed_lr else {"lr": 0.25}
    optimizer = fusedbun.create(name, model(), **rate, **untyped)
    assert type(optimizer) is getattr(fusedbun, recipe.torch_class)
    assert optimizer.param_groups[0]["lr"] == rate.get("lr", recipe.lr)
    tx = fusedbun_jax.create(name, *rate.values(), **untyped)
    params = {"w": jnp.ones((3, 4))}
    expected = getattr(fusedbun_jax, recipe.name)(*rate.values(), **untyped)
    for found, wanted in zip(tx.step(params, tx.init(params), params), run(expected, params), strict=True):
        assert jax.tree.all(jax.tree.map(jnp.array_equal, found, wanted))


def run(tx, params):
    return tx.step(params, tx.init(params), params)


def test_a_learning_rate_that_is_not_given_is_the_default():
    assert fusedbun.create("SM3", model()).param_groups[0]["lr"] == RECIPES["sm3"].lr
    assert fusedbun_jax.create("SM3").driver.learning_rate == RECIPES["sm3"].lr
    with pytest.raises(TypeError, match="'lr'"):
        fusedbun.create("fusedbun", model())
    with pytest.raises(TypeError, match="'learning_rate'"):
        fusedbun_jax.create("fusedbun")


def test_a_learning_rate_of_0_is_given():
    assert fusedbun.create("SM3", model(), 0.0).param_groups[0]["lr"] == 0.0
    assert fusedbun_jax.create("SM3", 0.0).driver.learning_rate == 0.0


def test_a_modules_parameters_have_their_names():
    optimizer = fusedbun.create("sm3", network := model())
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in network.named_parameters()]
    assert optimizer.param_groups[0]["params"] == list(network.parameters())


@pytest.mark.parametrize("given", ["named_parameters", "parameters"])
def test_what_every_torch_optimizer_takes_is_taken(given):
    network = model()
    optimizer = fusedbun.create("sm3", getattr(network, given)())
    assert optimizer.param_groups[0]["params"] == list(network.parameters())
    assert ("param_names" in optimizer.param_groups[0]) == (given == "named_parameters")


def test_arguments_and_param_groups_are_the_classs():
    groups = fusedbun.param_groups(model(), {"2.*": {"lr": 0.5}}, no_decay="weight_decay")
    optimizer = fusedbun.create("FusedbunW", groups, 0.25, weight_decay=0.5)
    found = {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert found == {(0.25, 0.5), (0.25, 0.0), (0.5, 0.5), (0.5, 0.0)}


@in_both
@pytest.mark.parametrize(
    ("name", "near"),
    [("fusedbnw", "FusedbunW"), ("sm-3", "SM3"), ("lion", "DecoupledLionW"), ("adamw", "MupAdamW")],
)
def test_an_unknown_name_is_answered_with_the_nearest_and_all(create, name, near):
    with pytest.raises(ValueError, match=rf"^{MADE[create]}: there is no optimizer '{name}'; do you mean .*'{near}'"):
        create(name, 0.1)
    with pytest.raises(ValueError, match=rf"There are {', '.join(NAMES)}$"):
        create(name, 0.1)


def test_what_no_name_is_like_is_answered_with_all():
    with pytest.raises(ValueError, match=rf"no optimizer 'qqq'\. There are {', '.join(NAMES)}$"):
        named("create", "qqq")


@in_both
def test_a_name_is_a_string(create):
    with pytest.raises(TypeError, match=r"name must be one of fusedbunw, .*, but it is .*Fusedbun"):
        create(fusedbun.Fusedbun, 0.1)


@in_both
def test_an_unknown_argument_is_named(create):
    with pytest.raises(TypeError, match="'beta3'; its arguments are"):
        create("sm3", model() if create is fusedbun.create else 0.1, beta3=0.5)
