"""Noise, stochastic rounding and codes: as they are defined, without a bias, and the same in NumPy and torch."""

import math
import zlib

import numpy as np
import pytest
import torch
from sweeps import sweep

from fusedbun import namespace as in_numpy
from fusedbun.storage import codes, rounding
from fusedbun.storage.noise import draw, start
from fusedbun.torch import namespace as in_torch

WORD = 0xFFFFFFFF
SHAPES = [(), (1,), (37,), (50, 7), (7, 3, 2, 3)]
EVERY = np.arange(65_536, dtype=np.int32)  # all noises


def mix(h: int) -> int:
    """lowbias32, with Python's numbers."""
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & WORD
    h = ((h ^ (h >> 15)) * 0x846CA68B) & WORD
    return h ^ (h >> 16)


def noise_one_by_one(shape, seed, name, step, stream):
    key = mix((seed + stream * 0x9E3779B9) & WORD)
    key = mix((mix((key + zlib.crc32(name.encode())) & WORD) + step) & WORD)
    found = np.zeros(shape, np.int32)
    for place in np.ndindex(*shape):
        h = mix(key)
        for axis, index in enumerate(place):
            h += mix((mix((key + (axis + 1) * 0x9E3779B9) & WORD) + index) & WORD)
        found[place] = mix(h & WORD) >> 16
    return found


def noise(xp, like, seed=42, name="w.0", step=5, stream=0):
    count = xp.whole(like.reshape(-1)[:1] * 0) + step
    index = xp.index(like, range(like.ndim))
    return draw(start(seed, name, stream), count.reshape((1,) * like.ndim), index)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("seed", "name", "step", "stream"), [(42, "w.0", 5, 0), (-7, "ä", 0, 3), (2**40 + 1, "", 2**31 - 1, 2**32 - 1)]
)
@np.errstate(over="ignore")
def test_noise_is_as_defined(shape, seed, name, step, stream):
    want = noise_one_by_one(shape, seed, name, step, stream)
    np.testing.assert_array_equal(noise(in_numpy, np.zeros(shape), seed, name, step, stream), want)
    np.testing.assert_array_equal(noise(in_torch, torch.zeros(shape), seed, name, step, stream).numpy(), want)


def test_a_part_has_the_noise_that_it_has_in_the_whole():
    whole, step = noise(in_numpy, np.zeros((60, 90))), np.full((1, 1), 5, np.int32)
    places = np.arange(60, dtype=np.int32)[20:31, None], np.arange(90, dtype=np.int32)[None, 40::3]
    part = draw(start(42, "w.0", 0), step, places)
    np.testing.assert_array_equal(part, whole[20:31, 40::3])


def test_noise_is_uniform_and_differs_by_all_it_is_made_of():
    drawn = noise(in_numpy, np.zeros((2048, 2048)))
    counts = np.bincount(drawn.ravel(), minlength=65_536)
    expected = drawn.size / 65_536
    squares = ((counts - expected) ** 2 / expected).sum() / 65_535  # chi-square for each degree of freedom
    assert abs(squares - 1) < 5 * math.sqrt(2 / 65_535)
    small = np.zeros((512, 512))
    base = noise(in_numpy, small)
    others = [
        noise(in_numpy, small, **change) for change in ({"seed": 43}, {"name": "w.1"}, {"step": 6}, {"stream": 1})
    ]
    others += [np.roll(base, 1, axis) for axis in (0, 1)] + [base.T]
    for other in others:
        assert abs(np.corrcoef(base.ravel(), other.ravel())[0, 1]) < 5 / 512


NUMBERS = [1.2345678, -3.3, 1.0, -0.0, 0.0, 1e-38, -1e-40, 1.4e-45, 65504.5, 3.3e38, -1.99999988, 0.1]


@pytest.mark.parametrize("number", NUMBERS)
def test_rounding_is_without_bias_for_every_number(number):
    """Exhaustively: the mean over all noises is the number, and each result is one of its two neighbours."""
    x = np.full(65_536, number, np.float32)
    rounded = np.float64(rounding.to_bfloat16(in_numpy, x, EVERY))
    assert rounded.mean() == np.float64(np.float32(number))
    below, above = np.unique(rounded)[[0, -1]]
    assert len(np.unique(rounded)) <= 2
    assert below <= np.float32(number) <= above
    assert not (x[:2].view(np.int32) & 0xFFFF).any() or below < above


@np.errstate(invalid="ignore")
def test_every_pattern_of_bits_rounds_alike_in_numpy_and_torch():
    bits = np.random.default_rng(0).integers(-(2**31), 2**31, 200_000).astype(np.int32)
    special = [0x7F800000, -0x800000, 0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001, 0x7F7FFFFF, 1, -(2**31)]
    x = np.concatenate([np.array(special * 40, np.int32), bits]).view(np.float32)
    n = noise(in_numpy, x)
    rounded = rounding.to_bfloat16(in_numpy, x, n)
    assert not (rounded.view(np.int32) & 0xFFFF).any()
    np.testing.assert_array_equal(np.isnan(rounded), np.isnan(x))
    np.testing.assert_array_equal(rounded[np.isinf(x)], x[np.isinf(x)])
    again = rounding.to_bfloat16(in_torch, torch.from_numpy(x), torch.from_numpy(n))
    np.testing.assert_array_equal(again.numpy().view(np.int32), rounded.view(np.int32))


def blocks(seed=0, rows=300):
    """Blocks of every size of number, some with NaN, infinities, zeros and denormals, and some random bits."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, 4, 32)) * 10.0 ** rng.uniform(-46, 38, (rows, 4, 1))).astype(np.float32)
    x[0, 0, 3], x[0, 1, 5], x[0, 2], x[0, 3, 0] = np.nan, -np.inf, 0, 1e-45
    x[1, 0] = rng.integers(-(2**31), 2**31, 32).astype(np.int32).view(np.float32)
    return x


@pytest.mark.parametrize("bits", [8, 4])
@np.errstate(all="ignore")
def test_codes_are_as_defined(bits):
    x = blocks()
    n = noise(in_numpy, x)
    found, exponents = codes.to_words(in_numpy, x, n, bits)
    q = 2 ** (bits - 1) - 1
    for block, noises, coded, (e,) in zip(*(a.reshape(-1, a.shape[-1]) for a in (x, n, found, exponents)), strict=True):
        largest = int((block.view(np.int32) & 0x7FFFFFFF).max()) >> 23
        assert e == (0 if largest < 27 else largest)
        want = np.zeros(32)
        if 27 <= largest < 255:
            exact = np.float64(block) * 2.0 ** (125 + bits - largest) + (noises + 0.5) / 65_536
            want = np.clip(np.floor(np.float32(exact)), -q, q)
        np.testing.assert_array_equal(coded, want)
    assert np.abs(found).max() == q
    decoded = codes.from_words(in_numpy, found, exponents, bits)
    np.testing.assert_array_equal(np.isnan(decoded), np.broadcast_to(exponents == 255, decoded.shape))
    spacing = 2.0 ** (np.float64(exponents) - 125 - bits)
    fine = (exponents >= 27) & (exponents < 255)
    assert (
        np.abs(decoded - np.float64(x))[np.broadcast_to(fine, x.shape)]
        <= np.broadcast_to(spacing, x.shape)[np.broadcast_to(fine, x.shape)]
    ).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_without_bias(bits):
    """Exhaustively over the noise, but for a block's largest number, which may be cut off at the scale's end."""
    x = np.random.default_rng(1).standard_normal(32).astype(np.float32)
    x[0] = 4.0
    many = np.broadcast_to(x, (65_536, 32)).copy()
    decoded = codes.from_words(in_numpy, *codes.to_words(in_numpy, many, np.repeat(EVERY[:, None], 32, 1), bits), bits)
    error = np.abs(np.float64(decoded).mean(axis=0) - x)
    assert (error[1:] < 2e-5 * 4).all()  # the noise has 65,536 values


def test_noise_of_codes_lies_in_the_middle_of_its_steps():
    """A number half a step of the noise below a code is always that code, and one and a half are it all but once."""
    for below, others in ((2.0**-17, 0), (3 * 2.0**-17, 1)):
        x = np.full((65_536, 32), 1 - below, np.float32)
        x[:, 0] = 127  # of which the codes are the numbers themselves
        found, _ = codes.to_words(in_numpy, x, np.repeat(EVERY[:, None], 32, 1), 8)
        assert np.count_nonzero(found[:, 1] != 1) == others


@pytest.mark.parametrize("bits", [8, 4])
@sweep("run", [lambda f: f, torch.compile], short=lambda run: run is not torch.compile, ids=["eager", "compiled"])
@np.errstate(all="ignore")
def test_codes_are_the_same_in_torch(bits, run):
    x = blocks(2)
    n = noise(in_numpy, x)
    want = codes.to_words(in_numpy, x, n, bits)

    def there_and_back(x, n):
        encoded = codes.to_words(in_torch, x, n, bits)
        return (*encoded, codes.from_words(in_torch, *encoded, bits))

    got = run(there_and_back)(torch.from_numpy(x), torch.from_numpy(n))
    for a, b in zip(got, (*want, codes.from_words(in_numpy, *want, bits)), strict=True):
        np.testing.assert_array_equal(a.numpy(), b)


@pytest.mark.parametrize("bits", [4, 2, 1])
@pytest.mark.parametrize("shape", [(3, 5), (4, 32), (2, 100), (6, 3, 2, 7), (5, 1)], ids=str)
def test_blocks_and_packed_codes_are_undone(shape, bits):
    x = (np.arange(math.prod(shape), dtype=np.int32).reshape(shape) % 2**bits) - 2 ** (bits - 1)
    cut = in_numpy.to_blocks(x)
    assert cut.shape == (shape[0], -(-math.prod(shape[1:]) // 32), 32)
    np.testing.assert_array_equal(in_numpy.from_blocks(cut, shape), x)
    packed = in_numpy.pack(cut, bits).astype(np.uint8)
    assert packed.shape == codes.Stored("uint8", tuple(range(len(shape))), "packed", bits).shape(shape)
    np.testing.assert_array_equal(in_numpy.unpack(packed, bits), cut)
    np.testing.assert_array_equal(in_torch.unpack(torch.from_numpy(packed), bits).numpy(), cut)
    np.testing.assert_array_equal(in_torch.to_blocks(torch.from_numpy(x)).numpy(), cut)


def test_rounded_to_nearest_a_moment_would_never_decay():
    """Why codes are rounded with noise: 4 of 127 loses a tenth in each step, and to the nearest stays 4."""
    x = np.zeros((1, 32), np.float32)
    x[0, :2] = 100.0, 3.0
    kept = x.copy()
    for step in range(200):
        kept[0, 0] = 100.0
        kept[0, 1:] *= np.float32(0.9)
        encoded = codes.to_words(in_numpy, kept, noise(in_numpy, kept, step=step), 8)
        kept = codes.from_words(in_numpy, *encoded, 8)
    assert abs(kept[0, 1]) <= 1
