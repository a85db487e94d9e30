"""Codes of 1, 2 and 4 bits are packed and unpacked as by `fusedbun.storage.codes`, to the bit, whatever uses them."""

import numpy as np
import planes
import pytest
from leaves import assert_same, by_definition, by_kernel, by_tiles, leaf
from test_triton import run  # noqa: F401  # a fixture

from fusedbun.compiler.cpp import native
from fusedbun.storage import codes

SHAPES = ((9, 70), (5, 1), (3, 32), (1, 33), (40, 96))
of_codes = pytest.mark.parametrize("code", planes.CODES)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(codes, "CODES", dict(codes.CODES))
    planes.register()


def problems(code):
    """A chain, and leaves whose state is any bytes."""
    chain, rng = planes.mean_in(code), np.random.default_rng(1)
    for shape in SHAPES:
        arrays = leaf(chain, shape, "float32")
        packed = {k: rng.integers(0, 256, x.shape, "uint8") for k, x in arrays.items() if x.dtype == "uint8"}
        yield chain, arrays | {key: x for key, x in packed.items() if not key.endswith(codes.EXPONENTS)}


@of_codes
@pytest.mark.parametrize("registers", [1, 2, 3])
def test_in_cpp(code, registers, monkeypatch):
    if registers > native.registers():
        pytest.skip("this machine has no registers as wide")
    monkeypatch.setattr(native, "registers", lambda: registers)
    for chain, arrays in problems(code):
        assert_same(by_kernel(chain, arrays), by_definition(chain, arrays))


@of_codes
def test_in_tiles(code):
    for chain, arrays in problems(code):
        assert_same(by_tiles(chain, arrays, 64), by_definition(chain, arrays))


@of_codes
def test_in_triton(code, run):  # noqa: F811
    for chain, arrays in problems(code):
        assert_same(run(planes.take, code, arrays), by_definition(chain, arrays))
