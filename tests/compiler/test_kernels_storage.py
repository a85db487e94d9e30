"""Kernels, and tiles, round and code as the definition does: to the bit where nothing is added up."""

from dataclasses import replace

import numpy as np
import pytest
from leaves import Precise, by_definition, by_kernel, by_tiles, leaf
from leaves import assert_same as assert_same_numbers
from sweeps import CODED, NOISY, long
from test_kernels import adds_up as chain_adds_up
from test_kernels import check, gradient

from fusedbun import chain, recipes
from fusedbun.compiler import UnschedulableError, trace
from fusedbun.compiler.cpp import native
from fusedbun.storage.rounding import Rounding
from fusedbun.transforms import Momentum, ScaleByAdam

RECOMMENDED = {"use_rms": True, "centralize": True, "nesterov": True}
CHAINS = {
    "sm3": recipes.sm3(),
    **{f"sm3 {dtype}": recipes.sm3(momentum=0.9, momentum_dtype=dtype) for dtype in NOISY},
    "fusedbun int8": recipes.fusedbun(**RECOMMENDED, momentum_dtype="int8"),
    "fusedbun int4": recipes.fusedbun(**RECOMMENDED, lagged=True, momentum_dtype="int4"),
    "fusedbun param": recipes.fusedbun(use_rms=True, momentum_dtype="param"),
    "lion int8": recipes.decoupled_lionw(weight_decay=1e-4, initial_lr=0.1, momentum_dtype="int8"),
    "adam": chain(ScaleByAdam(dtype="int8", second_dtype="bfloat16", amsgrad=True)),
    "sign": recipes.scaled_optum(0.1),
    "vote": recipes.ternary_vote(2),
}
SHAPES = [(), (1,), (1000,), (70_001,), (37, 45), (8, 16), (130, 257), (64, 512), (700, 3), (33_003, 1), (2, 33_001)]
SHORT = ("sm3 int8-bfloat16-stochastic", "fusedbun int4-float32")
SHAPES += [(3, 4, 5), (8, 3, 3, 3), (130, 20, 3, 1)]


def adds_up(transforms, ndim):
    return chain_adds_up(replace(transforms, rounding=Rounding()), ndim)


def assert_same(got, want):
    """NumPy does not know that a bfloat16 may be NaN."""
    assert_same_numbers(*({key: np.float64(x) for key, x in arrays.items()} for arrays in (got, want)))


def settings():
    for name, transforms in CHAINS.items():
        for dtype in ("bfloat16", "float32", "float16"):
            for stochastic in (False, True) if dtype == "bfloat16" else (False,):
                changed = replace(transforms, rounding=Rounding(stochastic, seed=7, name="layer.weight"))
                title = f"{name}-{dtype}{'-stochastic' * stochastic}"
                yield pytest.param(changed, dtype, id=title, marks=() if title in SHORT else long)


@pytest.mark.parametrize(("transforms", "dtype"), [*settings()])
@np.errstate(all="ignore")
def test_kernels_round_and_code_as_the_definition(transforms, dtype):
    for shape in SHAPES:
        arrays = leaf(transforms, shape, dtype, ternary="vote" in transforms.slots(shape))
        if adds_up(transforms, len(shape)):
            arrays["grad"] = gradient(shape, dtype)
        for _ in range(2):
            want = by_definition(transforms, arrays, Precise())
            got = by_kernel(transforms, arrays)
            if adds_up(transforms, len(shape)):
                check_coded(transforms, got, want)
            else:
                assert_same(got, want)
            arrays = {**{key: np.asarray(x) for key, x in want.items()}, "grad": np.asarray(-arrays["grad"], dtype)}
            arrays = {"param": arrays.pop("param"), "grad": arrays.pop("grad"), **arrays}


def check_coded(transforms, got, want):
    """Near: codes and what is rounded with noise may be the neighbour, where a sum's last bit decides."""
    dtype = {key: x.dtype.name for key, x in want.items()}
    coded = [key for key in want if dtype[key] in ("int8", "uint8", "bfloat16", "float16")]
    for key in coded:
        a, b = np.float64(got.pop(key)), np.float64(want[key])
        assert np.count_nonzero(a != b) <= max(2, 0.01 * a.size), key
    rest = {key: x for key, x in want.items() if key not in coded}
    placeholder = {"param": np.zeros((2, 2), np.float32)} if "param" in coded else {}
    check(replace(transforms, rounding=Rounding()), placeholder | got, placeholder | rest)


@pytest.mark.parametrize(("transforms", "dtype"), [s for s in settings() if "sm3" in s.id or "lion" in s.id])
@np.errstate(all="ignore")
def test_blocks_round_and_code_as_the_definition(transforms, dtype):
    for shape in SHAPES:
        if shape != (70_001,):  # too many blocks
            arrays = leaf(transforms, shape, dtype)
            want = by_definition(transforms, arrays, Precise())
            assert_same(by_tiles(transforms, arrays, 200), want)


@pytest.mark.parametrize("name", [*(f"sm3 {dtype}" for dtype in CODED), "lion int8"])
@np.errstate(all="ignore")
def test_nan_and_infinities_spoil_their_block_alone(name):
    transforms = replace(CHAINS[name], rounding=Rounding(True))
    arrays = leaf(transforms, (6, 100), "bfloat16")
    arrays["grad"][1, 40], arrays["grad"][4, 99] = np.nan, np.inf
    want = by_definition(transforms, arrays, Precise())
    assert_same(by_kernel(transforms, arrays), want)
    (exponents,) = (x for key, x in want.items() if key.endswith("exponents"))
    np.testing.assert_array_equal(np.argwhere(exponents[..., 0] == 255), [(1, 1), (4, 3)])


def test_any_number_of_threads_gives_the_same_bits():
    transforms = replace(CHAINS["sm3 int8"], rounding=Rounding(True))
    arrays = leaf(transforms, (9000, 257), "bfloat16")
    assert_same(by_kernel(transforms, arrays, threads=2), by_kernel(transforms, arrays))


def test_steps_beyond_what_float32_counts_to():
    transforms = replace(CHAINS["sm3 int8"], rounding=Rounding(True))
    arrays = leaf(transforms, (5, 70), "bfloat16")
    arrays["step"][...] = 2**31 - 1  # and around the end of what an int32 counts to
    with np.errstate(over="ignore"):
        assert_same(by_kernel(transforms, arrays), by_definition(transforms, arrays, Precise()))


def test_what_the_noise_is_made_of_is_no_part_of_the_code():
    def kernel(**rounding):
        return native.kernel(replace(CHAINS["sm3"], rounding=Rounding(True, **rounding)), 2, (0, 1), "bfloat16")

    assert kernel(seed=1, name="a") is kernel(seed=2, name="b")
    assert kernel() is not native.kernel(CHAINS["sm3"], 2, (0, 1), "bfloat16")


def test_blocks_lie_along_rows_as_they_are():
    transforms = chain(Momentum(dtype="int8"))
    with pytest.raises(UnschedulableError, match="is for blocks along the parameter's axes as they are"):
        trace(transforms, 2, (1, 0))
    with pytest.raises(UnschedulableError, match="computed in float32"):
        trace(transforms, 2, dtype="float64")
