"""The step in tiles, with NumPy and with torch: the definition's numbers, in place, without a copy of a leaf."""

import tracemalloc

import numpy as np
import pytest
import torch
from cases import SHAPES, by_case
from leaves import LR, assert_near, assert_same, by_definition, by_tiles, has_sums, leaf
from random_chains import COUNT, random_problem
from rules import rule, stateful

from fusedbun import Slot, chain, recipes
from fusedbun import namespace as in_numpy
from fusedbun.compiler import UnschedulableError
from fusedbun.compiler.tiles import ELEMENTS, Tiles, schedule_for
from fusedbun.compiler.trace import evaluate, hyperparameters
from fusedbun.reference import exact_step
from fusedbun.torch import namespace
from fusedbun.torch.state import compute_dtype, dtype_name
from fusedbun.transforms import Momentum, ScaleByAdam

TOLERANCE = {"float64": 1e-12, "float32": 2e-5}
RECOMMENDED = recipes.fusedbun(centralize=True, use_rms=True, nesterov=True)


def for_case(case, name, dtype="float64"):
    transforms = case.chain.at((), np.empty(SHAPES[name]))
    return transforms, leaf(transforms, SHAPES[name], dtype, ternary=case.ternary)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(**by_case)
def test_gives_the_definitions_numbers(case, name):
    transforms, arrays = for_case(case, name)
    want = by_definition(transforms, arrays)
    for elements in [20_000] if name == "tall" else [1, 7, 50]:
        assert_near(by_tiles(transforms, arrays, elements), want, TOLERANCE["float64"])


@pytest.mark.parametrize("name", ["vector", "matrix", "convolution"])
@pytest.mark.parametrize(**by_case)
def test_gives_the_definitions_bits_where_nothing_is_added_up(case, name):
    """Also in any number of tiles, and where the gradient is not finite."""
    transforms, arrays = for_case(case, name, "float32")
    arrays["grad"].flat[[2, 9]] = np.nan, -np.inf
    want = by_definition(transforms, arrays)
    for elements in (1, 20, ELEMENTS):
        got = by_tiles(transforms, arrays, elements)
        if has_sums(transforms, len(SHAPES[name])):
            assert_near(got, want, TOLERANCE["float32"])
        else:
            assert_same(got, want)


@pytest.mark.parametrize("seed", range(COUNT))
def test_chains_composed_at_random(seed):
    transforms, shape, order, elements = random_problem(seed)
    arrays = leaf(transforms, shape, seed=seed)
    for name, array in arrays.items():
        if shape and array.shape == shape:  # laid out in memory by `order`
            arrays[name] = np.ascontiguousarray(array.transpose(order)).transpose(np.argsort(order))
    assert_near(by_tiles(transforms, arrays, elements), by_definition(transforms, arrays), TOLERANCE["float64"])


def test_the_random_chains_reach_everything():
    used = [t for seed in range(COUNT) for t in random_problem(seed)[0]]
    assert len({type(t) for t in used}) == 14
    for name in ("nesterov", "undampened_start", "bias_correction", "amsgrad", "lagged"):
        assert {getattr(t, name) for t in used if hasattr(t, name)} == {False, True}
    for name in ("beta", "beta1", "beta2", "dampening", "weight_decay", "eps", "eps_root"):
        assert {0.0} < {getattr(t, name) for t in used if hasattr(t, name)}


def test_repeats_its_bits():
    arrays = leaf(RECOMMENDED, (50, 40), "float32")
    assert_same(by_tiles(RECOMMENDED, arrays, 100), by_tiles(RECOMMENDED, arrays, 100))


def test_long_sums_stay_accurate():
    """A hundred thousand tiles of ones: one by one, float32 would lose count."""
    mean = rule(lambda xp, u: u - xp.mean(u, axis=(0,), keepdims=True))
    arrays = {"param": np.zeros((100_000, 1), np.float32), "grad": np.full((100_000, 1), 0.1, np.float32)}
    assert np.abs(by_tiles(mean, arrays, 1)["param"]).max() < 1e-7


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4, 2)])
def test_an_empty_leaf_is_left_as_it_is(shape):
    arrays = leaf(RECOMMENDED, shape)
    after = by_tiles(RECOMMENDED, arrays)
    for name, array in after.items():
        np.testing.assert_array_equal(array, arrays[name])


@pytest.mark.parametrize(
    ("shape", "strides", "order"),
    [
        ((), (), ()),
        ((1000,), (1,), (0,)),
        ((50, 40), (40, 1), (0, 1)),
        ((50, 40), (1, 50), (1, 0)),
        ((8, 3, 4, 4), (48, 1, 12, 3), (0, 2, 3, 1)),
        ((3, 1000), (1000, 1), (1, 0)),  # a row is longer than a tile
        ((2, 50, 40), (2000, 40, 1), (1, 0, 2)),
        ((500, 600), (600, 1), (1, 0)),  # along every axis one index is more than a tile
    ],
)
def test_rows_are_taken_where_they_are_far_apart_in_memory_and_fit(shape, strides, order):
    made = schedule_for(chain(Momentum()), shape, strides, elements=100)
    assert made.program.graph.order == (order or (0,))
    assert made.tiles == ("rows" if len(shape) > 1 else "columns")


def test_rows_are_taken_as_the_rules_ask():
    def centred(*axes):
        return rule(lambda xp, u: sum(u - xp.mean(u, axis=axis, keepdims=True) for axis in axes))

    assert schedule_for(centred((0,)), (4, 50, 40), (1, 4, 200), elements=100).program.graph.order == (0, 2, 1)
    assert schedule_for(centred((1,)), (4, 50, 40), (2000, 40, 1), elements=100).program.graph.order == (1, 0, 2)
    with pytest.raises(UnschedulableError, match="over some, but not all"):
        schedule_for(centred((0,), (1,)), (4, 50, 40), (2000, 40, 1))


def test_a_part_of_the_columns_meets_the_rows():
    def update(xp, u):
        row = xp.mean(u, axis=(1, 2), keepdims=True)
        middle = xp.max(u, axis=(0, 2), keepdims=True)
        return u + row * middle / xp.max(row * middle, axis=(0, 1, 2), keepdims=True)

    transforms = rule(update)
    arrays = leaf(transforms, (3, 4, 5))
    assert_near(by_tiles(transforms, arrays, 20), by_definition(transforms, arrays), TOLERANCE["float64"])


def test_numbers_alone_may_make_a_tile():
    where = rule(lambda xp, u: xp.where(u > 0, 1.0, 0.5) * u)
    arrays = leaf(where, (6, 4))
    want = by_definition(where, arrays)
    assert_same(by_tiles(where, arrays, 8), want)
    assert_same(plain(torch_tiles(where, in_torch(arrays, torch.float64), 8)), want)


def test_slots_may_take_over_what_other_slots_were():
    slots = {name: Slot((0, 1)) for name in ("last", "before")} | {"left": Slot((1,)), "right": Slot((1,))}

    def update(xp, u, state):
        return {"last": u, "before": state["last"], "left": state["right"], "right": state["left"]}

    transforms = stateful(slots, update)
    arrays = leaf(transforms, (6, 4))
    assert_same(by_tiles(transforms, arrays, 8), by_definition(transforms, arrays))


def test_a_slot_is_read_whole_before_its_rows_are_written():
    def update(xp, u, state):
        total = xp.sum(u, axis=(0, 1), keepdims=True)
        row = state["row"] + xp.sum(u, axis=(1,), keepdims=True)
        return {"row": row, "one": xp.sum(state["row"] * total, axis=(0, 1), keepdims=True)}

    transforms = stateful({"row": Slot((0,)), "one": Slot(())}, update)
    arrays = leaf(transforms, (6, 4))
    assert_near(by_tiles(transforms, arrays, 8), by_definition(transforms, arrays), TOLERANCE["float64"])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "transforms",
    [recipes.sm3(), RECOMMENDED, recipes.decoupled_lionw(initial_lr=0.1), chain(ScaleByAdam(amsgrad=True))],
    ids=["sm3", "fusedbun", "lion", "amsgrad"],
)
def test_holds_a_few_tiles_and_vectors(transforms, dtype):
    shape, elements = (4000, 1000), 16_000
    arrays = leaf(transforms, shape, "float32")
    arrays |= {name: arrays[name].astype(dtype) for name in ("param", "grad")}
    made = schedule_for(transforms, shape, arrays["param"].strides, elements=elements)
    tiles = Tiles(made, in_numpy)
    scalars = evaluate(made.program.scalars, hyperparameters(made.program, transforms, LR))
    tracemalloc.start()
    tiles.run(scalars, arrays, np.dtype("float32"), elements)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 4 * elements + 0.01 * arrays["param"].nbytes


def in_torch(arrays, dtype):
    """The arrays as tensors: the parameter and its gradient in `dtype`, the state as it is computed."""
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[name] = tensor.to(dtype if name in ("param", "grad") else compute_dtype(dtype))
    return tensors


def torch_definition(transforms, tensors):
    dtype = compute_dtype(tensors["param"].dtype)
    p, g, *state = (tensor.to(dtype) for tensor in tensors.values())
    param, state = exact_step(namespace, transforms, LR, p, g, dict(zip([*tensors][2:], state, strict=True)))
    return {"param": param.to(tensors["param"].dtype), **state}


def torch_tiles(transforms, tensors, elements):
    """A step in tiles, in place."""
    param = tensors["param"]
    made = schedule_for(
        transforms, tuple(param.shape), param.stride(), dtype=dtype_name(param.dtype), elements=elements
    )
    scalars = evaluate(made.program.scalars, hyperparameters(made.program, transforms, LR))
    Tiles(made, namespace).run(scalars, tensors, compute_dtype(param.dtype), elements)
    return {name: tensor for name, tensor in tensors.items() if name != "grad"}


def plain(tensors):
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(**by_case)
def test_in_torch_and_rounded_once(case, dtype):
    for name in ("scalar", "matrix", "convolution"):
        transforms, arrays = for_case(case, name)
        tensors = in_torch(arrays, dtype)
        want = plain(torch_definition(transforms, tensors))
        got = plain(torch_tiles(transforms, tensors, 40))
        if not has_sums(transforms, len(SHAPES[name])):
            assert_same(got, want)
        else:
            param = {"param": got.pop("param")}
            assert_near(param, {"param": want.pop("param")}, max(2e-5, torch.finfo(dtype).eps))
            assert_near(got, want, 2e-5)


def transposed(x):
    return x.mT.contiguous().mT


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def strided(x):
    """Every other element of a tensor twice as long."""
    return torch.stack([x, torch.full_like(x, 7.0)], -1).flatten(-2)[..., ::2]


@pytest.mark.parametrize("layout", [transposed, channels_last, strided], ids=lambda f: f.__name__)
@pytest.mark.parametrize("of_gradient", [torch.Tensor.contiguous, transposed], ids=lambda f: f.__name__)
def test_any_layout_in_torch(layout, of_gradient):
    for transforms in (RECOMMENDED, recipes.sm3(momentum=0.9), recipes.ternary_vote(threshold=2)):
        tensors = in_torch(leaf(transforms, (6, 4, 3, 5)), torch.float64)
        want = plain(torch_definition(transforms, tensors))
        tensors["param"], tensors["grad"] = layout(tensors["param"]), of_gradient(tensors["grad"])
        assert_near(plain(torch_tiles(transforms, tensors, 30)), want, TOLERANCE["float64"])


def test_writes_to_its_own_elements_alone():
    tensors = in_torch(leaf(RECOMMENDED, (6, 4)), torch.float64)
    whole = torch.full((12, 9), 7.0, dtype=torch.float64)
    whole[::2, 1::2] = tensors["param"]
    tensors["param"] = whole[::2, 1::2]
    places = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    gradient = tensors["grad"].clone()
    torch_tiles(RECOMMENDED, tensors, 8)
    assert places == {name: tensor.data_ptr() for name, tensor in tensors.items()}
    assert torch.equal(tensors["grad"], gradient)
    untouched = torch.ones_like(whole, dtype=torch.bool)
    untouched[::2, 1::2] = False
    assert (whole[untouched] == 7).all()
    assert (whole[~untouched] != 7).all()


def test_a_learning_rate_may_be_a_tensor():
    tensors = in_torch(leaf(RECOMMENDED, (6, 4)), torch.float32)
    want = plain(torch_definition(RECOMMENDED, tensors))
    made = schedule_for(RECOMMENDED, (6, 4), (4, 1))
    lr = torch.tensor(LR, dtype=torch.float64)
    scalars = evaluate(made.program.scalars, hyperparameters(made.program, RECOMMENDED, lr), namespace)
    Tiles(made, namespace).run(scalars, tensors, torch.float32)
    del tensors["grad"]
    assert_near(plain(tensors), want, TOLERANCE["float32"])
