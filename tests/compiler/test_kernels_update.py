"""Kernels that write what is to be added to a parameter: the definition's numbers, in the gradient's memory."""

import numpy as np
import pytest
from cases import CASES, FEW
from leaves import Precise, assert_near, assert_same, by_definition, by_kernel, leaf, updated_by_kernel
from test_kernels import DIGITS, SHAPES, TOLERANCE, adds_up, assert_rounded_alike, gradient
from test_kernels_storage import SHAPES as FEWER_SHAPES
from test_kernels_storage import SHORT, check_coded, settings
from test_kernels_storage import adds_up as step_adds_up

from fusedbun import chain, recipes
from fusedbun.compiler import trace
from fusedbun.compiler.cpp import native
from fusedbun.compiler.trace import UPDATE, used
from fusedbun.storage.rounding import PARAM


def added(param, update):
    """The parameter after `optax.apply_updates`."""
    return np.asarray(np.promote_types(param.dtype, np.float32).type(param) + update, param.dtype)


def problems():
    for case in CASES:
        for dtype in TOLERANCE:
            if case.name in FEW if dtype == "float32" else case.name == "sm3 momentum":
                yield pytest.param(case, dtype, 2, id=f"{case}-{dtype}-2 axes")


@pytest.mark.parametrize(("case", "dtype", "ndim"), [x for x in problems() if x.values[1] != "float16"])
def test_updates_equal_the_definitions(case, dtype, ndim):
    for shape in SHAPES[ndim]:
        transforms = case.chain.at((), np.empty(shape))
        arrays = leaf(transforms, shape, dtype, ternary=case.ternary)
        arrays["grad"] = gradient(shape, dtype)
        got = updated_by_kernel(transforms, arrays)
        want = by_definition(transforms, arrays, Precise(), as_update=True)
        assert {key: x.dtype for key, x in got.items()} == {key: np.asarray(x).dtype for key, x in want.items()}
        if not adds_up(transforms, ndim):
            assert_same(*({key: np.float64(x) for key, x in found.items()} for found in (got, want)))
            continue
        if dtype in DIGITS:
            sums = [np.float64(added(arrays["param"], x.pop(UPDATE))) for x in (got, want)]
            # of a large step the sum is the nearest number or its neighbour
            assert_rounded_alike(*sums, DIGITS[dtype] - 1)
        assert_near(*({key: np.float64(x) for key, x in found.items()} for found in (got, want)), TOLERANCE[dtype])


@pytest.mark.parametrize(("transforms", "dtype"), [x for x in settings() if x.id in SHORT])
@np.errstate(all="ignore")
def test_parameters_and_state_are_those_of_a_step(transforms, dtype):
    """With codes and noise: what is added to the parameter takes it to where a step's kernel would."""
    for shape in FEWER_SHAPES:
        arrays = leaf(transforms, shape, dtype, ternary="vote" in transforms.slots(shape))
        if step_adds_up(transforms, len(shape)):
            arrays["grad"] = gradient(shape, dtype)
        got, want = updated_by_kernel(transforms, arrays), by_kernel(transforms, arrays)
        got = {"param": added(arrays["param"], got.pop(UPDATE)), **got}
        if dtype == "float32" or transforms.rounding.stochastic:
            assert_same(*({key: np.float64(x) for key, x in found.items()} for found in (got, want)))
        else:
            check_coded(transforms, got, want)


def test_a_kernel_reads_the_parameter_only_where_the_rule_does():
    """Of float32 there is no other reason to; a number of fewer bits is needed for rounding."""

    def reads(transforms, dtype):
        outputs = trace(transforms, 2, dtype=dtype, as_update=True).outputs.values()
        return any(v.op == "input" and v.detail == PARAM for v in used(outputs))

    assert not reads(recipes.sm3(momentum=0.9), "float32")
    assert reads(recipes.fusedbunw(weight_decay=0.1), "float32")
    assert reads(recipes.sm3(momentum=0.9), "bfloat16")


def test_there_is_none_for_float16():
    with pytest.raises(native.KernelError, match="float16"):
        native.kernel(chain(), 1, (0,), "float16", as_update=True)
