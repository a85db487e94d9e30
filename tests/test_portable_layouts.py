"""Other names and layouts: accumulators change places with their axes, moments are permuted, codes rounded anew."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from sweeps import CODED

import fusedbun
import fusedbun_jax as fj
from fusedbun import Slot, Transform
from fusedbun import namespace as in_numpy
from fusedbun.portable import inverse
from fusedbun.portable.match import recoded
from fusedbun.storage import codes, noise

SHAPES = {
    "conv.weight": (6, 3, 3, 2),
    "conv.bias": (6,),
    "fc.weight": (5, 40),
    "fc.bias": (5,),
    "norm.weight": (5,),
    "table.weight": (7, 4),
}
MODULES = {"Conv_0": "conv", "Dense_0": "fc", "LayerNorm_0": "norm", "Embed_0": "table"}
KINDS = {"conv.weight": "kernel", "fc.weight": "kernel", "norm.weight": "scale", "table.weight": "embedding"}
AXES = {"conv.weight": (2, 3, 1, 0), "fc.weight": (1, 0)}
MAPPING = {
    "conv.weight": ("Conv_0.kernel", (2, 3, 1, 0)),
    "conv.bias": "Conv_0.bias",
    "fc.weight": ("Dense_0.kernel", (1, 0)),
    "fc.bias": "Dense_0.bias",
    "norm.weight": "LayerNorm_0.scale",
    "table.weight": "Embed_0.embedding",
}


def to_flax(values):
    """torch's arrays by name as Flax's tree."""
    back, tree = {theirs: ours for ours, theirs in MODULES.items()}, {}
    for name, x in values.items():
        module, _, kind = name.partition(".")
        x = np.transpose(x, AXES[name]) if name in AXES else x
        tree.setdefault(back[module], {})[KINDS.get(name, kind)] = jnp.array(x, "float32")
    return tree


def values(step):
    rng = np.random.default_rng(step)
    return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}


def step_torch(optimizer, params, steps):
    for step in steps:
        for name, g in values(step).items():
            params[name].grad = torch.tensor(g, dtype=torch.float32)
        optimizer.step()


def parameters(x):
    return {name: torch.nn.Parameter(torch.as_tensor(v).float().clone()) for name, v in x.items()}


CASES = {
    "sm3": (partial(fusedbun.SM3, lr=0.1, momentum=0.9), partial(fj.sm3, 0.1, momentum=0.9)),
    "fusedbun": (
        partial(fusedbun.Fusedbun, lr=0.1, centralize=True, use_rms=True),
        partial(fj.fusedbun, 0.1, centralize=True, use_rms=True, channel_axis=fj.flax_channel_axis),
    ),
    "lion": (partial(fusedbun.DecoupledLionW, lr=0.1), partial(fj.decoupled_lionw, 0.1)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_in_the_other_layout_and_back(case, tmp_path):
    make, factory = CASES[case]
    params = parameters(values(0))
    optimizer = make(list(params.items()))
    step_torch(optimizer, params, range(1, 11))
    fusedbun.save_state(optimizer, tmp_path / "a")

    tree, tx = to_flax({name: p.detach().numpy() for name, p in params.items()}), factory()
    assert fj.flax_mapping(tree, MODULES) == MAPPING
    state = fj.load_state(tmp_path / "a", tx, tx.init(tree), tree, MAPPING)
    fj.save_state(tmp_path / "b", tx, state, tree)
    twins = parameters({name: p.detach() for name, p in params.items()})
    back = make(list(twins.items()))
    fusedbun.load_state(back, tmp_path / "b", inverse(MAPPING))
    for p, q in zip(params.values(), twins.values(), strict=True):
        assert all(torch.equal(x, back.state[q][key]) for key, x in optimizer.state[p].items())

    before = jax.tree.map(np.array, tree)
    step_torch(optimizer, params, range(11, 21))
    for step in range(11, 21):
        tree, state = tx.step(to_flax(values(step)), state, tree)
    wanted = to_flax({name: p.detach().numpy() for name, p in params.items()})
    for x, y, was in zip(*map(jax.tree.leaves, (tree, wanted, before)), strict=True):
        # Sums run in another order here, and are rounded otherwise.
        assert np.abs(x - y).max() <= 1e-5 * np.abs(y - was).max()


def test_a_rule_maps_names(tmp_path):
    optimizer = fusedbun.SM3(list(parameters(values(0)).items()))
    fusedbun.save_state(optimizer, tmp_path / "a")
    other = parameters({f"module.{name}": x for name, x in values(0).items()})
    fusedbun.load_state(fusedbun.SM3(list(other.items())), tmp_path / "a", lambda name: f"module.{name}")


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"fc.weight": ("Dense_0.kernel", (0,))}, "must be a name, or a name and the order of its 2 axes"),
        ({"fc.weight": ("Dense_0.kernel", (1, 1))}, "order of its 2 axes"),
        ({"fc.weight": 3}, "order of its 2 axes"),
        ({"none": "fc.weight"}, "'none' is in the mapping, but not in the file"),
        ({"fc.bias": "norm.weight"}, "'fc.bias' and 'norm.weight' of the file are both to be 'norm.weight'"),
        ({"fc.weight": ("fc.weight", (1, 0))}, r"has shape \(5, 40\) in the file and \(40, 5\) in the order \(1, 0\)"),
    ],
)
def test_wrong_mappings_are_named(mapping, message, tmp_path):
    params = parameters(values(0))
    optimizer = fusedbun.SM3(list(params.items()))
    fusedbun.save_state(optimizer, tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        fusedbun.load_state(optimizer, tmp_path / "a", mapping)


@dataclass(frozen=True)
class TwoFamilies(Transform):
    """Keeps two vectors along each axis, under names that say nothing of it, a moment twice and a counter."""

    name: ClassVar[str] = "two_families"

    def slots(self, shape):
        k = len(shape)
        vectors = {f"{'abcd'[i]}_{kind}": Slot((i,)) for kind in ("mean", "sum") for i in range(k)}
        return {**vectors, "first": Slot.full(k), "second": Slot.full(k), "count": Slot((), "int32")}

    def update(self, xp, signal, state, param):
        s, new = signal.update * signal.update, {}
        for i in range(s.ndim):
            axes = tuple(j for j in range(s.ndim) if j != i)
            new[f"{'abcd'[i]}_mean"] = xp.mean(s, axis=axes, keepdims=True)
            new[f"{'abcd'[i]}_sum"] = state[f"{'abcd'[i]}_sum"] + xp.max(s, axis=axes, keepdims=True)
        return signal, new | {"first": signal.update, "second": s, "count": state["count"] + 1}


def test_slots_are_found_by_their_declared_axes_whatever_their_names(tmp_path):
    chain = fusedbun.chain(TwoFamilies())
    param = torch.nn.Parameter(torch.zeros(2, 3, 4))
    optimizer = fusedbun.ChainOptimizer([("a", param)], chain, lr=0.1, implementation="definition")
    param.grad = torch.randn(2, 3, 4)
    optimizer.step()
    fusedbun.save_state(optimizer, tmp_path / "a")
    tx, tree = fj.from_chain(chain, 0.1), {"b": jnp.zeros((4, 2, 3))}
    axes = (2, 0, 1)
    found = fj.load_state(tmp_path / "a", tx, tx.init(tree), tree, {"a": ("b", axes)})
    _, wanted = tx.update({"b": jnp.asarray(param.grad.permute(axes).numpy())}, tx.init(tree), tree)
    chex.assert_trees_all_close(found[0], wanted[0], rtol=1e-6)


def test_an_accumulator_that_is_not_there_is_named(tmp_path):
    chain = fusedbun.chain(fusedbun.transforms.SM3Accumulate(0.9, covers="rows"))
    param = torch.nn.Parameter(torch.ones(2, 3))
    param.grad = torch.ones(2, 3)
    optimizer = fusedbun.ChainOptimizer([("a", param)], chain, lr=0.1)
    optimizer.step()
    fusedbun.save_state(optimizer, tmp_path / "a")
    tx, tree = fj.from_chain(chain, 0.1), {"a": jnp.ones((3, 2))}
    with pytest.raises(ValueError, match=r"'sm3_accumulate\.axis0' of 'a' is kept here, but not in the file"):
        fj.load_state(tmp_path / "a", tx, tx.init(tree), tree, {"a": ("a", (1, 0))})


@given(st.data())
def test_codes_in_another_layout_are_within_half_a_step(data):
    code = codes.MOMENTS[data.draw(st.sampled_from(CODED))]
    bits = code.bits
    shape = tuple(data.draw(st.lists(st.integers(1, 40), min_size=2, max_size=3)))
    axes = tuple(data.draw(st.permutations(range(len(shape)))))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    x = (rng.standard_normal(shape) * 10.0 ** rng.uniform(-30, 30, shape)).astype(np.float32)
    index = in_numpy.index(x, range(x.ndim))
    with np.errstate(over="ignore"):  # a word's products wrap
        parts = code.encode(in_numpy, x, noise.draw(5, np.zeros((), np.int32), index))
    parts = {key: p.astype(np.int8 if key == "" and bits == 8 else np.uint8) for key, p in parts.items()}
    found = recoded(parts, shape, axes, code)
    assert all(found[key].dtype == parts[key].dtype for key in found)
    new_shape = tuple(shape[axis] for axis in axes)
    wanted = code.decode(in_numpy, parts, shape, np.float64).transpose(axes)
    got = code.decode(in_numpy, found, new_shape, np.float64)
    error = in_numpy.to_blocks(np.abs(got - wanted))
    assert (error <= 0.5 * 2.0 ** (found[codes.EXPONENTS].astype(float) - 125 - bits)).all()


@pytest.mark.parametrize("moment", CODED)
def test_codes_go_to_another_layout_through_the_file(moment, tmp_path):
    param = torch.nn.Parameter(torch.zeros(40, 70))
    make = partial(fusedbun.SM3, momentum=0.9, momentum_dtype=moment)
    optimizer = make([("a", param)])
    for step in range(3):
        param.grad = torch.randn(40, 70, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    fusedbun.save_state(optimizer, tmp_path / "a")
    tx, tree = fj.sm3(0.1, momentum=0.9, momentum_dtype=moment), {"a": jnp.zeros((70, 40))}
    found = fj.load_state(tmp_path / "a", tx, tx.init(tree), tree, {"a": ("a", (1, 0))})
    assert found.count == 3
    code = codes.MOMENTS[moment]
    ours = {key.removeprefix("momentum.moment"): x.numpy() for key, x in optimizer.state[param].items() if "mom" in key}
    parts = code.arrays((0, 1))
    theirs = {part: np.asarray(getattr(found.momentum, f"moment{part}".replace(".", "_"))["a"]) for part in parts}
    x = code.decode(in_numpy, ours, (40, 70), np.float32)
    y = code.decode(in_numpy, theirs, (70, 40), np.float32)
    steps = 2.0 ** (theirs[codes.EXPONENTS].astype(float) - 125 - code.bits)
    assert (in_numpy.to_blocks(np.abs(x.T - y)) <= steps / 2).all()


def test_nnx_goes_on(tmp_path):
    """With the conversions that the docstring gives."""
    linear = torch.nn.Linear(3, 2)
    optimizer = fusedbun.SM3(linear.named_parameters(), lr=0.1, momentum=0.9)
    linear(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    fusedbun.save_state(optimizer, tmp_path / "a")
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    tx = fj.sm3(0.1, momentum=0.9)
    there = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    mapping = fj.flax_mapping(params, {"": ""})
    assert mapping["weight"] == ("kernel", (1, 0))
    there.opt_state = nnx.data(fj.load_state(tmp_path / "a", tx, there.opt_state, params, mapping))
    for _ in range(2):
        found = nnx.as_pure(there.opt_state).momentum.moment["kernel"]
        np.testing.assert_array_equal(found, optimizer.state[linear.weight]["momentum.moment"].T)
        there.update(model, nnx.grad(lambda m: m(jnp.ones((4, 3))).sum())(model))
        optimizer.step()  # with the gradient of before, which is the same
        fj.save_state(tmp_path / "b", tx, there.opt_state, params)
        fusedbun.load_state(optimizer, tmp_path / "b", inverse(mapping))


def test_modules_must_be_those_of_the_parameters():
    params = {"Dense_0": {"kernel": jnp.ones((8, 4))}}
    with pytest.raises(ValueError, match=r"'Dense_0\.kernel' is in 'Dense_0', but modules has 'Dense_1'"):
        fj.flax_mapping(params, {"Dense_1": "fc"})
    with pytest.raises(ValueError, match="'Dense_1' of modules has no parameters"):
        fj.flax_mapping(params, {"Dense_0": "fc", "Dense_1": "fc"})
