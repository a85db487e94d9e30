"""Hyper-parameters by patterns on parameter names, in both frameworks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

import fusedbun
import fusedbun_jax
from fusedbun.groups import overrides

NAMES = ["encoder.0.weight", "encoder.0.bias", "head.weight"]


class TestPatterns:
    def test_a_later_rule_prevails(self):
        found = overrides(NAMES, {"*": {"lr": 1, "beta": 2}, "encoder.*": {"lr": 3}})
        assert found == {
            "encoder.0.weight": {"lr": 3, "beta": 2},
            "encoder.0.bias": {"lr": 3, "beta": 2},
            "head.weight": {"lr": 1, "beta": 2},
        }

    def test_a_pattern_that_matches_nothing_is_named_with_what_is_near(self):
        with pytest.raises(ValueError, match=r"pattern 'hed\.weight' matches no parameter.*'head\.weight'"):
            overrides(NAMES, {"hed.weight": {"lr": 1}})

    def test_case_counts(self):
        with pytest.raises(ValueError, match=r"'Head\.\*'"):
            overrides(NAMES, {"Head.*": {}})


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(5, 4)
        self.conv = torch.nn.Conv1d(4, 4, 3)
        self.norm = torch.nn.BatchNorm1d(4)
        self.head = torch.nn.Linear(4, 5)
        self.head.weight = self.embed.weight  # tied


class TestTorch:
    def test_no_decay_on_biases_norms_and_embeddings(self):
        model = Net()
        groups = fusedbun.param_groups(model, no_decay="Lambda")
        optimizer = fusedbun.Fusedbun(groups, lr=0.1, Lambda=0.5)
        decay = {n: g["Lambda"] for g in optimizer.param_groups for n in g["param_names"]}
        assert decay == {
            "embed.weight": 0.0,
            "conv.weight": 0.5,
            "conv.bias": 0.0,
            "norm.weight": 0.0,
            "norm.bias": 0.0,
            "head.bias": 0.0,
        }

    def test_rules_and_no_decay_together(self):
        groups = fusedbun.param_groups(
            Net(), {"head.*": {"lr": 0.5}, "*.bias": {"weight_decay": 0.1}}, no_decay="weight_decay"
        )
        optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.2)
        found = {n: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for n in g["param_names"]}
        assert found["head.bias"] == (0.5, 0.1)
        assert found["conv.bias"] == (0.1, 0.1)
        assert found["conv.weight"] == (0.1, 0.2)
        assert found["norm.weight"] == (0.1, 0.0)

    def test_as_few_groups_as_there_are_settings(self):
        assert len(fusedbun.param_groups(Net())) == 1
        assert len(fusedbun.param_groups(Net(), no_decay="Lambda")) == 2

    def test_a_pattern_that_matches_nothing(self):
        with pytest.raises(ValueError, match=r"pattern 'tail\.\*' matches no parameter"):
            fusedbun.param_groups(Net(), {"tail.*": {"lr": 1.0}})


PARAMS = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, "embed": {"embedding": jnp.ones((4, 2))}}


def one_update(tx, params=PARAMS):
    grads = jax.tree.map(lambda p: 0.5 * p, params)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    return updates


class TestOptax:
    def test_no_decay_on_biases_norms_and_embeddings(self):
        with_decay = one_update(fusedbun_jax.fusedbun(0.1, Lambda=0.5))
        without = one_update(fusedbun_jax.fusedbun(0.1, Lambda=0.0))
        found = one_update(
            fusedbun_jax.by_name(fusedbun_jax.fusedbun, no_decay="Lambda", learning_rate=0.1, Lambda=0.5)
        )
        np.testing.assert_array_equal(found["dense"]["kernel"], with_decay["dense"]["kernel"])
        np.testing.assert_array_equal(found["dense"]["bias"], without["dense"]["bias"])
        np.testing.assert_array_equal(found["embed"]["embedding"], without["embed"]["embedding"])
        assert not np.array_equal(with_decay["dense"]["bias"], without["dense"]["bias"])

    def test_weight_decay_is_another_name_of_fusedbuns_lambda(self):
        factory = fusedbun_jax.fusedbun
        wanted = one_update(fusedbun_jax.by_name(factory, {"dense.*": {"Lambda": 0.3}}, learning_rate=0.1, Lambda=0.5))
        for name, other in (("weight_decay", "Lambda"), ("Lambda", "weight_decay")):
            rules = {"dense.*": {name: 0.3}}
            found = one_update(fusedbun_jax.by_name(factory, rules, learning_rate=0.1, **{other: 0.5}))
            jax.tree.map(np.testing.assert_array_equal, found, wanted)
        spared = [fusedbun_jax.by_name(factory, no_decay=n, learning_rate=0.1) for n in ("Lambda", "weight_decay")]
        jax.tree.map(np.testing.assert_array_equal, *map(one_update, spared))
        with pytest.raises(TypeError, match=r"fusedbun.*: weight_decay is another name for Lambda, and both are given"):
            factory(0.1, Lambda=0.1, weight_decay=0.1)

    def test_a_no_decay_that_the_factory_does_not_own(self):
        with pytest.raises(ValueError, match="no_decay='weight_decay' is no argument of sm3, which has learning_rate"):
            fusedbun_jax.by_name(fusedbun_jax.sm3, no_decay="weight_decay")

    def test_rules_for_one_of_optaxs_own(self):
        tx = fusedbun_jax.by_name(optax.sgd, {"dense.*": {"learning_rate": 1.0}}, learning_rate=0.1)
        found = one_update(tx)
        np.testing.assert_allclose(found["dense"]["bias"], -0.5 * np.ones(2))
        np.testing.assert_allclose(found["embed"]["embedding"], -0.05 * np.ones((4, 2)), rtol=1e-6)

    def test_a_pattern_that_matches_nothing(self):
        tx = fusedbun_jax.by_name(fusedbun_jax.sm3, {"tail.*": {"beta": 0.5}})
        with pytest.raises(ValueError, match=r"pattern 'tail\.\*' matches no parameter.*'dense\.bias'"):
            tx.init(PARAMS)

    def test_a_flax_model(self):
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        tx = fusedbun_jax.by_name(fusedbun_jax.sm3, {"kernel*": {"learning_rate": 0.0}}, learning_rate=0.1)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        before = nnx.state(model, nnx.Param)
        optimizer.update(model, jax.tree.map(jnp.ones_like, before))
        np.testing.assert_array_equal(model.kernel[...], before["kernel"][...])
        assert not np.array_equal(model.bias[...], np.zeros(2))
