"""Chains, hyper-parameters, slots and codes: what holds for every transformation."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest

import fusedbun
import fusedbun_jax
from fusedbun import namespace as in_numpy
from fusedbun import recipes
from fusedbun.hyper import NonNegative, hints, is_stateless_at_0, is_structural
from fusedbun.reference import exact_step
from fusedbun.storage import codes
from fusedbun.storage.codes import Stored
from fusedbun.transform import Signal, Slot, Transform
from fusedbun.transforms import Centralize, ClipRMS, Decay, Momentum, RMSScale, SM3Accumulate, SparseMask

NUMBERS = [  # every numeric hyper-parameter of every transformation, with what it may be
    (SparseMask, "eps", "[0, inf)"),
    (SM3Accumulate, "beta", "[0, 1)"),
    (RMSScale, "eps", "[0, inf)"),
    (RMSScale, "eps_root", "[0, inf)"),
    (ClipRMS, "threshold", "(0, inf)"),
    (Momentum, "beta", "[0, 1)"),
    (Momentum, "dampening", "[0, 1)"),
    (Decay, "weight_decay", "[0, inf)"),
]
RECIPE_NUMBERS = [
    ("eps", "[0, inf)"),
    ("beta_decay", "[0, 1)"),
    ("Lambda", "[0, inf)"),
    ("momentum_beta", "[0, 1)"),
    ("clip_rms", "(0, inf)"),
]
OUTSIDE = [-1e-9, -1, float("nan"), float("inf"), -float("inf"), np.float32(-1)]
NOT_A_NUMBER = ["0.9", True, [0.9], (), np.ones(2), 1j, object()]


def refused(error, make, name, value, allowed):
    with pytest.raises(error) as caught:
        make(**{name: value})
    message = str(caught.value)
    assert name in message
    assert allowed in message
    assert repr(value) in message


@pytest.mark.parametrize(("make", "name", "allowed"), NUMBERS)
class TestNumbersOfTransformations:
    @pytest.mark.parametrize("value", OUTSIDE)
    def test_outside_the_range(self, make, name, allowed, value):
        refused(ValueError, make, name, value, allowed)

    @pytest.mark.parametrize("value", [*NOT_A_NUMBER, None])
    def test_not_a_number(self, make, name, allowed, value):
        refused(TypeError, make, name, value, allowed)

    def test_the_upper_end_is_outside(self, make, name, allowed):
        if "1)" in allowed:
            refused(ValueError, make, name, 1.0, allowed)
            refused(ValueError, make, name, 1, allowed)

    @pytest.mark.parametrize("value", [0.5, np.float64(0.5), np.float32(0.5), np.array(0.5)])
    def test_any_scalar_will_do(self, make, name, allowed, value):
        kept = getattr(make(**{name: value}), name)
        assert type(kept) is float
        assert kept == 0.5


@pytest.mark.parametrize(("name", "allowed"), RECIPE_NUMBERS)
class TestNumbersOfRecipes:
    """The message names the recipe's own argument, not the transformation's field behind it."""

    @pytest.mark.parametrize("value", OUTSIDE)
    def test_outside_the_range(self, name, allowed, value):
        refused(ValueError, recipes.fusedbun, name, value, allowed)

    @pytest.mark.parametrize("value", NOT_A_NUMBER)
    def test_not_a_number(self, name, allowed, value):
        refused(TypeError, recipes.fusedbun, name, value, allowed)


@pytest.mark.parametrize("name", ["centralize", "use_rms", "nesterov", "lagged"])
@pytest.mark.parametrize("value", [1, 0, None, "yes", 1.0])
def test_flags(name, value):
    refused(TypeError, recipes.fusedbun, name, value, "True or False")


@pytest.mark.parametrize("value", [0.0, None, "0", True, (0, 1)])
def test_axes(value):
    refused(TypeError, recipes.fusedbun, "channel_axis", value, "an integer")


def test_choices():
    refused(ValueError, SM3Accumulate, "statistic", "median", "one of 'max', 'mean'")
    refused(TypeError, SM3Accumulate, "combine", 0, "one of 'min', 'product'")


def test_an_unknown_hyperparameter():
    with pytest.raises(TypeError, match="momentum_bta"):
        recipes.fusedbun(momentum_bta=0.9)


@dataclass(frozen=True)
class Counting(Transform):
    """Calls something as the counter of steps is called."""

    name: ClassVar[str] = "counting"

    def slots(self, shape):
        return {"step": Slot((), "int32")}

    def update(self, xp, signal, state, param):
        return signal, {"step": state["step"] + 1}


def test_what_is_called_as_the_counter_is_refused():
    with pytest.raises(ValueError, match="counting: a slot may not be called 'step'"):
        fusedbun.chain(Counting()).slots((2, 3))
    with pytest.raises(ValueError, match="a slot may not be called 'step'"):
        fusedbun_jax.lift(Counting()).init(jnp.ones(3))
    named = type("Named", (Counting,), {"name": "step"})
    with pytest.raises(ValueError, match="no transformation may be called so"):
        fusedbun.chain(named())


class TestChain:
    def test_rms_scale_without_an_accumulator(self):
        with pytest.raises(ValueError, match=r"rms_scale reads the second moment.*but that is nothing"):
            fusedbun.chain(RMSScale())
        with pytest.raises(ValueError, match="but that is momentum; put an accumulator such as sm3_accumulate there"):
            fusedbun.chain(SM3Accumulate(), Momentum(), RMSScale())

    def test_two_of_one_name(self):
        with pytest.raises(ValueError, match="'decay' stands in it twice"):
            fusedbun.chain(Decay(0.1), Momentum(), Decay(0.2))

    def test_something_else(self):
        with pytest.raises(TypeError, match=r"made of fusedbun's transformations.*0\.9 is a float"):
            fusedbun.chain(Momentum(), 0.9)

    def test_state_is_named_in_the_order_of_the_chain(self):
        names = list(recipes.fusedbun(use_rms=True).slots((3, 4)))
        assert names == ["sm3_accumulate.axis0", "sm3_accumulate.axis1", "momentum.moment"]

    def test_hyperparameters_by_name(self):
        chain = fusedbun.chain(Momentum(0.5), Decay(0.1))
        assert chain.hyperparameters() == {
            "momentum.beta": 0.5,
            "momentum.dampening": 0.0,
            "momentum.bias_correction": False,
            "momentum.nesterov": False,
            "momentum.undampened_start": False,
            "momentum.dtype": None,
            "decay.weight_decay": 0.1,
        }
        changed = chain.with_hyperparameters(**{"decay.weight_decay": 0.2})
        assert changed == fusedbun.chain(Momentum(0.5), Decay(0.2))

    def test_left_out(self):
        assert fusedbun.chain(None, Decay(), None) == fusedbun.chain(Decay())


def test_the_recipe_is_the_chain_of_the_specification():
    chain = recipes.fusedbun(centralize=True, use_rms=True, clip_rms=1.0, nesterov=True, lagged=True)
    assert list(chain) == [
        Centralize(0),
        SparseMask(1e-8),
        SM3Accumulate(0.8, "mean", "product", lagged=True),
        RMSScale(1e-8),
        ClipRMS(1.0),
        Momentum(0.9, nesterov=True),
        Decay(0.01),
    ]
    assert list(recipes.fusedbun()) == [SparseMask(), SM3Accumulate(0.8, "mean", "product"), Momentum(0.9), Decay(0.01)]


def test_structural_hyperparameters():
    declared = {
        name: hint for name, hint in hints(recipes.fusedbun).items() if name in recipes.RECIPES["fusedbun"].defaults
    }
    structural = ["centralize", "use_rms", "nesterov", "lagged", "channel_axis", "momentum_dtype"]
    assert [name for name, hint in declared.items() if is_structural(hint)] == structural
    assert [name for name, hint in declared.items() if is_stateless_at_0(hint)] == ["momentum_beta"]


@dataclass(frozen=True)
class WarmUp(Transform):
    """Scales the update by how many steps there were: a user's own transformation, with a step counter."""

    name: ClassVar[str] = "warm_up"
    steps: NonNegative = 2.0

    def slots(self, shape):
        return {"count": Slot((), "int32")}

    def update(self, xp, signal, state, param):
        count = state["count"] + 1
        return Signal(signal.update * xp.minimum(count / self.steps, 1.0)), {"count": count}


class TestCodes:
    def test_a_counter_is_stored_as_an_integer_and_computed_as_a_number(self):
        slot = Slot((), "int32")
        assert slot.shape((3, 4)) == (1, 1)
        assert codes.arrays(slot, "bfloat16") == {"": Stored("int32", ())}
        decoded = codes.CODES["int32"].decode(in_numpy, {"": np.full((1, 1), 7, np.int32)}, (3, 4), np.float64)
        assert (decoded.dtype, decoded.item()) == (np.float64, 7)

    def test_an_unknown_code(self):
        with pytest.raises(ValueError, match=r"code must be one of compute, int8, .*, block4, but it is 'int7'"):
            codes.arrays(Slot((0,), "int7"), "float32")

    def test_a_counter_in_every_driver(self, x64):
        import jax.numpy as jnp
        import torch

        import fusedbun_jax
        from fusedbun.reference import Reference

        chain = fusedbun.chain(WarmUp(2.0))
        p, g = np.arange(6.0).reshape(2, 3), np.ones((2, 3))
        reference = Reference({"p": p}, chain, 1.0)
        parameter = torch.nn.Parameter(torch.tensor(p))
        optimizer = fusedbun.ChainOptimizer([parameter], chain, lr=1.0)
        tx = fusedbun_jax.from_chain(chain, 1.0)
        params, state = jnp.asarray(p), tx.init(jnp.asarray(p))
        for expected in (p - 0.5, p - 1.5, p - 2.5):
            np.testing.assert_array_equal(reference.step({"p": g})["p"], expected)
            parameter.grad = torch.tensor(g)
            optimizer.step()
            np.testing.assert_array_equal(parameter.detach().numpy(), expected)
            updates, state = tx.update(jnp.asarray(g), state, params)
            params = params + updates
            np.testing.assert_array_equal(params, expected)
        assert optimizer.state[parameter]["warm_up.count"].dtype == torch.int32
        assert state.warm_up.count.dtype == jnp.int32


def test_one_step_is_the_update_times_the_learning_rate():
    chain = fusedbun.chain(Decay(0.5))
    param, state = exact_step(np, chain, 0.1, np.ones(2), np.array([1.0, 2.0]), {})
    np.testing.assert_allclose(param, [1 - 0.1 * 1.5, 1 - 0.1 * 2.5])
    assert state == {}
