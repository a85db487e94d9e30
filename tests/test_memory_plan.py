"""`fusedbun.plan`: what it reads, what it counts, and what it refuses."""

import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from memory_plans import ELEMENTS, OURS, SHAPES, SM3, seven_billion, the_one
from torch import nn

import fusedbun
from fusedbun.recipes import RECIPES
from fusedbun.storage.codes import STEP
from fusedbun.tools.plan import Estimate, Plan, Refusal, Setting, temporaries
from fusedbun.tools.plan.settings import ADAMW, USUAL
from fusedbun.tools.plan.sizes import parse_size, readable
from fusedbun.tools.plan.sources import Tensor
from fusedbun.tools.shared.networks import gpt2

# ---- what is counted


def test_the_parts_add_up():
    usual, released = the_one({"w": (1000, 500), "b": (500,)}, dtype="bfloat16", stochastic_rounding=False)
    elements = 1000 * 500 + 500
    assert usual.parameters == elements
    assert (usual.weights, usual.gradients, usual.state) == (2 * elements, 2 * elements, 4 * (1000 + 500 + 500))
    assert usual.total == usual.weights + usual.gradients + usual.state + usual.temporaries
    assert usual.bytes_per_parameter == usual.total / elements
    assert (usual.gradient_release, released.gradient_release) == (False, True)
    assert (released.weights, released.gradients, released.state) == (2 * elements, 2 * 1000 * 500, usual.state)


def test_stochastic_rounding_keeps_a_counter_for_each_bfloat16_tensor():
    shapes = {"a": ((9, 9), "bfloat16"), "b": ((9,), "bfloat16"), "c": ((9, 9), "float32")}
    rounded, nearest = the_one(shapes)[0], the_one(shapes, stochastic_rounding=False)[0]
    assert rounded.state - nearest.state == 2 * 4
    assert (rounded.stochastic_rounding, nearest.stochastic_rounding) == (True, False)
    assert not the_one({"c": (9, 9)})[0].stochastic_rounding


@pytest.mark.parametrize("setting", OURS, ids=lambda s: f"{s.optimizer} {s.label}")
def test_the_state_of_a_jax_tree_is_what_optax_keeps(setting):
    """But for four bytes in place of every array that other parameters have, and one counter for all."""
    import fusedbun_jax

    leaves = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    tree = {"a": leaves, "b": (None, [leaves["scale"]])}
    typed = {"mup": lambda path, param: "norm"} if setting.optimizer.startswith("mup") else {}
    rate = () if RECIPES[setting.optimizer].fixed_lr else (0.1,)
    factory = getattr(fusedbun_jax, setting.optimizer)
    state = jax.eval_shape(factory(*rate, **setting.hyperparameters, **typed).init, tree)
    arrays = jax.tree.leaves(state)
    kept = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
    planned, chain = the_one(tree, setting)[0].state, setting.chain(False)
    declared = [
        key
        for shape in [*SHAPES.values(), SHAPES["scale"]]
        for key in chain.at((), np.empty(shape)).arrays(shape, "float32")
    ]
    absent = len(arrays) - 1 - sum(key != STEP for key in declared)  # of four bytes, as counters and the count are
    assert planned == kept - 4 * (absent + 1) + 4 * declared.count(STEP)


def test_what_the_goal_allows_for_gpt2():
    share = 50257 * 768 / 124_439_808
    allowed = {
        ("sm3", "no momentum"): 2.05 + 2 * share,
        ("fusedbun", "momentum int8"): 3.10 + 2 * share,
        ("fusedbun", "momentum int4"): 2.60 + 2 * share,
    }
    found = fusedbun.plan(list(gpt2()), dtype="bfloat16", threads=1).estimates
    least = {(e.setting.optimizer, e.setting.label): e.bytes_per_parameter for e in found if e.gradient_release}
    assert all(least[key] <= most for key, most in allowed.items())
    assert found[-2].setting.is_torch_adamw
    assert found[-2].bytes_per_parameter == pytest.approx(16, abs=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
def test_temporaries_are_at_most_one_in_a_hundred_of_the_weights(threads):
    for model in (list(gpt2()), seven_billion()):
        for one in fusedbun.plan(model, dtype="bfloat16", threads=threads).estimates:
            assert one.temporaries <= 0.01 * one.weights


def test_seven_billion_parameters_take_less_than_two_seconds():
    temporaries._PROGRAMS.clear()
    began = time.perf_counter()
    plan = fusedbun.plan(seven_billion(), dtype="bfloat16")
    str(plan)
    assert time.perf_counter() - began < 2
    assert plan.parameters == 6_738_415_616


def test_more_threads_take_more():
    for one, two in zip(*(fusedbun.plan(list(gpt2()), threads=n).estimates for n in (1, 2)), strict=True):
        assert (one.state, one.gradients, one.weights) == (two.state, two.gradients, two.weights)
        assert two.temporaries >= one.temporaries


def test_frozen_parameters_and_buffers_are_weights_alone():
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(100, 100), nn.BatchNorm1d(100), nn.Linear(100, 10))
    module[0].requires_grad_(False)
    usual, released = the_one(module)
    trained = 2 * 100 + 100 * 10 + 10
    assert usual.parameters == 100 * 100 + 100 + trained
    assert usual.weights == 4 * (usual.parameters + 2 * 100) + 8  # running mean and variance, and a counter in int64
    assert usual.gradients == 4 * trained
    assert usual.state == 4 * (2 * 100 + (100 + 10) + 10)
    assert released.gradients == 4 * 100 * 10


def test_a_tied_weight_is_counted_once_and_named():
    with torch.device("meta"):
        model = nn.ModuleDict({"embed": nn.Embedding(50, 8), "head": nn.Linear(8, 50, bias=False)})
        model["head"].weight = model["embed"].weight
    plan = fusedbun.plan(model, SM3)
    assert plan.parameters == 50 * 8
    assert plan.tied == ("embed.weight",)
    assert "the further gradients of a tied weight (embed.weight)" in str(plan)
    shapes = fusedbun.plan({"embed.weight": (50, 8)}, "sm3")
    assert shapes.tied is None
    assert "the further gradients of a tied weight, which shapes do not show" in str(shapes)


def test_sparse_embeddings_keep_a_number_for_each_row():
    sparse = fusedbun.plan(SHAPES, ["sm3", "fusedbun", "scaled_optum"], sparse="embed*", tokens=1000)
    dense = fusedbun.plan(SHAPES, ["sm3", "scaled_optum"])
    assert sparse.sparse == ("embed.weight",)
    for one, other in zip(sparse.estimates[:2], dense.estimates[:2], strict=True):
        assert one.state == other.state - 4 * 70
    assert sparse.estimates[0].gradients == 4 * (ELEMENTS - 50 * 70) + 1000 * (4 * 70 + 8)
    assert sparse.estimates[1].gradients == 1000 * (4 * 70 + 8)
    assert {one.setting.optimizer for one in sparse.estimates} == {"sm3", "scaled_optum"}
    assert {one.reason for one in sparse.refusals} == {"centralize needs every row of a gradient"}


def test_a_pattern_matches_from_the_beginning_or_from_behind_a_dot():
    names = {"model.embed_tokens.weight": (9, 2), "model.layer.weight": (9, 2), "head": (9, 2)}
    assert fusedbun.plan(names, SM3, sparse="embed*").sparse == ("model.embed_tokens.weight",)
    assert fusedbun.plan(names, SM3, sparse=["*.layer.*", "head"]).sparse == ("model.layer.weight", "head")


def test_adamw_in_float32_is_told_from_adamw_in_the_weights_dtype():
    both = fusedbun.plan((1000, 10), ADAMW, dtype="bfloat16").estimates
    assert [(one.weights, one.gradients, one.state) for one in both] == [
        (40_000, 40_000, 80_004),
        (20_000, 20_000, 40_004),
    ]
    assert len(fusedbun.plan((1000, 10), ADAMW).estimates) == 1


# ---- what is read


def test_ways_to_give_the_same_model():
    dtypes = dict.fromkeys(SHAPES, "bfloat16")
    arrays = {name: np.zeros(shape, jnp.bfloat16) for name, shape in SHAPES.items()}
    models = [
        {name: (shape, "bfloat16") for name, shape in SHAPES.items()},
        {name: (list(shape), torch.bfloat16) for name, shape in SHAPES.items()},
        [(shape, jnp.bfloat16) for shape in SHAPES.values()],
        arrays,
        {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()},
        {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in SHAPES.items()},
    ]
    first, *others = [fusedbun.plan(model, dtype=None) for model in models]
    assert {t.name: t.dtype for t in first.tensors} == dtypes
    for other in others:
        assert [e.as_dict() for e in other.estimates] == [e.as_dict() for e in first.estimates]


def test_a_registered_node_is_taken_apart():
    jax.tree_util.register_pytree_with_keys(
        (kind := type("Node", (), {})),
        lambda node: ([(jax.tree_util.GetAttrKey("weight"), node.weight)], None),
        lambda _, children: children,
    )
    node = kind()
    node.weight = jnp.zeros((3, 4))
    assert [t.name for t in fusedbun.plan({"layer": node}, SM3).tensors] == ["layer.weight"]


def test_another_dtype_is_for_floating_point_tensors():
    model = {"w": ((9, 9), "float8_e4m3fn"), "n": ((7,), "int64")}
    plan = fusedbun.plan(model, SM3, dtype=torch.bfloat16)
    assert [(t.dtype, t.role) for t in plan.tensors] == [("bfloat16", "trained"), ("int64", "buffer")]
    assert plan.parameters == 81
    assert plan.estimates[0].weights == 2 * 81 + 8 * 7


def test_it_needs_neither_torch_nor_jax_and_allocates_nothing():
    code = """
import resource, sys
sys.modules.update(torch=None, jax=None)
import fusedbun
fusedbun.plan([(8, 8)], threads=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(fusedbun.plan([(1 << 20, 1 << 20), (1 << 30,)], threads=1).parameters)
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8192
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"{(1 << 40) + (1 << 30)}\n"), done.stderr


# ---- what is refused


class Unknown:
    def __repr__(self):
        return "an unknown object"


@pytest.mark.parametrize(
    ("model", "error", "reason"),
    [
        ({"w": (3, -1)}, ValueError, "the shape of 'w' must be of whole numbers from 0 up, but it is (3, -1)"),
        ((True, 2), ValueError, "the shape of 'the tensor' must be of whole numbers"),
        ({"w": (1 << 60, 1 << 60)}, ValueError, "'w' must have at most 2**59 elements"),
        ({"w": ((2, 2), "float31")}, ValueError, "the dtype of 'w' must be one of float64, float32"),
        ({"w": ((2, 2), "float8_e5m2")}, ValueError, "'w' is float8_e5m2, but the optimizers step float64"),
        ({"w": ((2, 2), "complex64")}, ValueError, "'w' is complex64"),
        ({"w": ((2, 2), "int8")}, ValueError, "nothing to plan"),
        ([], ValueError, "nothing to plan"),
        ((0, 4), ValueError, "nothing to plan"),
        ({"w": (2.5, 3)}, TypeError, "at 'w.0' there is 2.5 (float)"),
        (Unknown(), TypeError, "it is an unknown object (Unknown)"),
        (7, TypeError, "a model must be a torch module, a tree of arrays, a shape"),
        (nn.LazyLinear(3), ValueError, "'weight' has no shape yet; give its module a batch first"),
    ],
)
def test_a_model_that_is_none(model, error, reason):
    with pytest.raises(error, match=re.escape(reason)):
        fusedbun.plan(model, SM3)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "int8"}, "dtype must be one of float64, float32, bfloat16, float16, but it is 'int8'"),
        ({"threads": 0}, "threads must be a whole number of at least 1, but it is 0"),
        ({"tokens": 1.5}, "tokens must be a whole number of at least 1, but it is 1.5"),
        ({"budget": -1}, "budget must be a whole number of at least 1, but it is -1"),
        ({"budget": "much"}, "budget must be a size above 0, a number and one of the units B, KiB"),
        ({"sparse": "embde*"}, "'embde*' matches none of the 3: 'embed.weight', 'layer.weight', 'kernel'"),
        ({"sparse": "layer.bias"}, "sparse must match trained parameters of two or more axes"),
    ],
)
def test_options_that_are_not_valid(options, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        fusedbun.plan(SHAPES, SM3, **options)


@pytest.mark.parametrize(
    ("make", "error", "reason"),
    [
        (lambda: Setting("sm4"), ValueError, "but it is 'sm4'; did you mean 'sm3'?"),
        (lambda: fusedbun.plan(SHAPES, ["adamq"]), ValueError, "did you mean 'adamw'?"),
        (
            lambda: Setting("sm3", {"momentun": 0.9}),
            TypeError,
            "its arguments are momentum, beta, eps, statistic, momentum_dtype",
        ),
        (lambda: Setting("sm3", {"momentum_dtype": "int3"}), ValueError, "but it is 'int3'"),
        (lambda: Setting("decoupled_lionw", {"momentum_dtype": "int4"}), ValueError, "too coarse"),
        (lambda: Setting("adamw", {"amsgrad": True}), TypeError, 'adamw takes "weights" only'),
        (lambda: Setting("adamw", {"weights": "int8"}), ValueError, 'weights must be "float32" or "param"'),
    ],
)
def test_settings_that_are_not_valid(make, error, reason):
    with pytest.raises(error, match=re.escape(reason)):
        make()


def test_an_optimizer_goes_by_either_name():
    assert Setting("Fusedbun") == Setting("fusedbun")
    assert Setting("DecoupledLionW").optimizer == "decoupled_lionw"
    assert {s.optimizer for s in USUAL} == {*RECIPES, ADAMW}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 << 30),
        ("24 gib", 24 << 30),
        ("1.5GB", 1_500_000_000),
        (" 7B ", 7),
        ("1KiB", 1024),
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "24", "GiB", "24G", "-1GiB", "0GiB", "1e3GiB", "24GiBs", "9" * 99 + "GiB", "99999999TiB", "٣GiB"]
)
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="must be a size above 0, a number and one of the units"):
        parse_size(text)


def test_sizes_are_readable():
    assert [readable(n) for n in (0, 1023, 1 << 20, 24 << 30)] == ["0 B", "1,023 B", "1.00 MiB", "24.00 GiB"]


# ---- the table

TABLE = Path(__file__).parent / "golden" / "memory_plan.txt"


def test_the_table_says_what_fits():
    tensors = Tensor("a", (8000, 10_000), "bfloat16"), Tensor("b", (20_000_000,), "float32", "frozen")
    settings = [Setting("sm3", {}, "no momentum"), Setting("Fusedbun", {}, "momentum int8"), Setting(ADAMW, {}, "")]
    size, largest = 240_000_000, 160_000_000
    estimates = [
        Estimate(settings[0], True, False, 100_000_000, size, largest, 72_004, 1_000_000),
        Estimate(settings[0], True, True, 100_000_000, size, largest // 4, 72_004, 2000),
        Estimate(settings[1], True, False, 100_000_000, size, largest, 82_500_000, 1_000_000),
        Estimate(settings[1], True, True, 100_000_000, size, largest // 4, 82_500_000, 2000),
        Estimate(settings[2], False, False, 100_000_000, 2 * size, 2 * largest, 4 * largest + 4, 0),
    ]
    refusals = (Refusal(settings[0], "its reasons"), Refusal(settings[1], "others"))
    plan = Plan(tensors, tuple(estimates), refusals, 2, 500, ("a",), ("a",), 450_000_000)
    assert f"{plan}\n" == TABLE.read_text()
    assert [e.gradient_release for e in plan.fitting().estimates] == [False, True, True]
    assert "Nothing fits in 1.00 KiB" in str(fusedbun.plan(SHAPES, SM3, budget="1KiB").fitting())


def test_the_numbers_as_json():
    plan = fusedbun.plan(SHAPES, ["sm3", ADAMW], budget="99MiB", sparse="embed*")
    found = json.loads(json.dumps(plan.as_dict()))
    assert (found["parameters"], found["tensors"], found["budget"]) == (ELEMENTS, len(SHAPES), 99 << 20)
    first = found["estimates"][0]
    assert first["total"] == sum(first[part] for part in ("weights", "gradients", "state", "temporaries"))
    assert first["fits"] is True
    assert found["refused"][0]["reason"] == "torch's AdamW takes dense gradients"


def test_the_chart_is_a_picture():
    from fusedbun.tools.plan.picture import draw

    assert draw(fusedbun.plan(SHAPES, budget="1MiB")).startswith(b"\x89PNG")
    assert draw(fusedbun.plan(SHAPES, budget="1KiB").fitting()).startswith(b"\x89PNG")
