"""The kernels give the definition's numbers, to the bit where nothing is added up.

What is not marked compiles about fifty kernels and takes half a minute on a processor the first time, and a few
seconds after that; what is marked `long` runs every case in every dtype, and all chains composed at random.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
from cases import CASES, FEW
from gpu_steps import Everything
from leaves import (
    Precise,
    assert_near,
    assert_same,
    by_definition,
    by_kernel,
    leaf,
    step_in_place,
)
from random_chains import COUNT, random_problem
from rules import rule, stateful
from sweeps import long, only, sweep

from fusedbun import Slot, chain
from fusedbun.compiler import trace
from fusedbun.compiler.cpp import native
from fusedbun.transforms import Decay, Momentum, ScaleByAdam, ScaleByLion

# By the number of axes. Between them they are gone over in every way (runtime/driver.cpp): as one long row, in rows of
# whole registers and not, in rows shorter than a register, in columns; in one chunk and in many, with odd ends.
SHAPES = {
    1: ((), (1,), (17,), (1000,), (70_001,)),
    2: (
        *((1, 1), (1, 50), (50, 1), (8, 16), (9, 33), (130, 257), (301, 200)),
        *((33_003, 1), (17_001, 2), (11_011, 3), (1500, 9), (2003, 17), (1111, 31)),
        *((1, 33_000), (2, 33_001), (3, 33_000)),
    ),
    3: ((3, 4, 5), (1, 1, 4), (130, 20, 13), (40, 1, 1), (6000, 2, 3)),
    4: ((8, 3, 3, 3), (130, 20, 3, 1), (1, 3, 1, 5), (20_003, 1, 2, 1)),
    5: ((37, 5, 3, 3, 1), (3, 2, 1, 2, 3)),
}
EMPTY = ((0,), (0, 5), (3, 0), (2, 0, 4))
TOLERANCE = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 2e-6, "float16": 2e-6}
DIGITS = {"bfloat16": 8, "float16": 11}  # binary, of the parameter, where it is rounded
NAMED = {case.name: case for case in CASES}
RECOMMENDED, CLIPPED = NAMED["fusedbun recommended"].chain, NAMED["fusedbun clipped"].chain
SM3, LION = NAMED["sm3 momentum"].chain, NAMED["decoupled_lionw"].chain
VOTE = NAMED["ternary_vote"].chain
IN_EVERY_DTYPE = ("sm3 momentum", "ternary_vote", "decoupled_lionw")


def adds_up(transforms, ndim):
    """Whether a step adds up elements, which a kernel does in another order than NumPy."""
    return any(v.detail == "sum" for v in trace(transforms, ndim).graph.values)


def check(transforms, got, want):
    """That a kernel's numbers are the definition's."""
    dtype, shape = want["param"].dtype.name, want["param"].shape
    got = {name: np.float64(x) for name, x in got.items()}
    want = {name: np.float64(x) for name, x in want.items()}
    if not adds_up(transforms, len(shape)):
        assert_same(got, want)
        return
    if dtype in DIGITS:
        assert_rounded_alike(got.pop("param"), want.pop("param"), DIGITS[dtype])
    assert_near(got, want, TOLERANCE[dtype])


def assert_rounded_alike(got, want, digits):
    """Numbers that differ by float32's noise are rounded to the same one, or to neighbours where the middle lies
    between them, which is rare."""
    assert got.shape == want.shape
    apart = np.abs(got - want)
    noise = TOLERANCE["float32"] * np.abs(want).max(initial=0)
    assert (apart <= np.ldexp(1.0, np.frexp(want)[1] - digits) + noise).all()
    assert np.count_nonzero(apart > noise) <= max(2, 0.01 * apart.size)


def defined(transforms, arrays, **options):
    return by_definition(transforms, arrays, Precise(), **options)


def gradient(shape, dtype, seed=0):
    """Multiples of 1/64, whose sums are exact: rounding noise in the mean of a nearly constant row would be all that
    is left of the row without it, and be lifted to order one by a division."""
    return np.asarray(np.rint(np.random.default_rng(seed).standard_normal(shape) * 64) / 64, dtype)


def check_training(transforms, shape, dtype, ternary=False):
    """The first two steps, and one in the middle of a training."""
    middle = leaf(transforms, shape, dtype, ternary=ternary)
    middle["grad"] = gradient(shape, dtype)
    first = {name: x if name in ("param", "grad") else np.zeros_like(x) for name, x in middle.items()}
    want = defined(transforms, first)
    second = {name: np.asarray(x, first[name].dtype) for name, x in want.items()}
    second = {"param": second.pop("param"), "grad": gradient(shape, dtype, 1), **second}
    check(transforms, by_kernel(transforms, first), want)
    for arrays in (second, middle):
        check(transforms, by_kernel(transforms, arrays), defined(transforms, arrays))


def problems():
    for case in CASES:
        for dtype in TOLERANCE:
            for ndim in SHAPES:
                is_short = case.name in (FEW if dtype == "float32" else IN_EVERY_DTYPE) and ndim == 2
                is_short = is_short or (dtype == "float32" and case.name == "sm3 momentum")
                marks = () if is_short else long
                yield pytest.param(case, dtype, ndim, marks=marks, id=f"{case}-{dtype}-{ndim} axes")


@pytest.mark.parametrize(("case", "dtype", "ndim"), [*problems()])
def test_equals_the_definition(case, dtype, ndim):
    for shape in SHAPES[ndim]:
        check_training(case.chain.at((), np.empty(shape)), shape, dtype, case.ternary)


@pytest.mark.parametrize("seed", [pytest.param(n, marks=() if n % 60 == 0 else long) for n in range(COUNT)])
def test_chains_composed_at_random(seed):
    transforms, shape, order, _ = random_problem(seed)
    dtype = "float32" if seed % 2 and not adds_up(transforms, len(shape)) else "float64"
    larger = SHAPES[max(1, len(shape))]
    for some in (shape, larger[seed % len(larger)]):
        if len(some) != len(shape):
            continue
        for axes in (order, range(len(shape))):
            arrays = leaf(transforms, some, dtype, seed)
            for name, x in arrays.items():
                if some and x.shape == some:  # laid out in memory by `axes`
                    arrays[name] = np.ascontiguousarray(x.transpose(axes)).transpose(np.argsort(axes))
            try:
                got = by_kernel(transforms, arrays)
            except native.KernelError as error:
                assert "over some, but not all" in str(error)  # noqa: PT017 (such chains have a kernel for other orders)
                assert list(axes) != sorted(axes)
                continue
            check(transforms, got, defined(transforms, arrays))


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_an_empty_leaf_is_left_as_it_is(shape):
    transforms = NAMED["sm3"].chain
    arrays = leaf(transforms, shape, "float32")
    after = by_kernel(transforms, arrays)
    assert_same(after, {name: x for name, x in arrays.items() if name != "grad"})


@sweep("shape", [(33, 40), (700, 3), (3, 33_000), (4, 3, 2, 5)], short=lambda shape: len(shape) == 2, ids=str)
def test_operations_that_the_family_leaves_out(shape):
    transforms = chain(Everything())
    arrays = leaf(transforms, shape)
    for steps in range(4):
        arrays["every-thing.steps"][...] = steps
        check(transforms, by_kernel(transforms, arrays), defined(transforms, arrays))


def swap(xp, u, state):
    return {"last": u, "before": state["last"], "left": state["right"], "right": state["left"]}


def read_whole(xp, u, state):
    total = xp.sum(u, axis=(0, 1), keepdims=True)
    row = state["row"] + xp.sum(u, axis=(1,), keepdims=True)
    return {"row": row, "one": xp.sum(state["row"] * total, axis=(0, 1), keepdims=True)}


def kept(xp, u):
    row = xp.max(u, axis=(1,), keepdims=True)
    return u - row * xp.max(row * 0.5, axis=(0,), keepdims=True) / xp.min(row - u, axis=(0, 1), keepdims=True)


def condition_kept(xp, u):
    """Where the quotient is large is known in a sweep before the one that needs it."""
    large = 1.0 / u > xp.max(u, axis=(0,), keepdims=True)
    return xp.where(large, 0.0, u) - xp.max(xp.where(large, -1.0, u), axis=(1,), keepdims=True)


OTHER_KINDS = {
    "swap": stateful({"last": Slot((0, 1)), "before": Slot((0, 1)), "left": Slot((1,)), "right": Slot((1,))}, swap),
    "read whole": stateful({"row": Slot((0,)), "one": Slot(())}, read_whole),
    "kept": rule(kept),
    "condition": rule(condition_kept),
    "numbers alone": rule(lambda xp, u: xp.where(u > 0, 1.0, 0.5) * u),
}


@pytest.mark.parametrize("shape", [(33, 40), (700, 3), (3, 33_000), (300, 200)], ids=str)
@sweep("kind", OTHER_KINDS, short=only("read whole", "condition"))
def test_rules_of_other_kinds(kind, shape):
    transforms = OTHER_KINDS[kind]
    for dtype in ("float64",) if adds_up(transforms, 2) else ("float64", "float32"):
        arrays = leaf(transforms, shape, dtype)
        check(transforms, by_kernel(transforms, arrays), defined(transforms, arrays))


def extremes(arrays, seed):
    """The leaf with every kind of number in it."""
    rng = np.random.default_rng(seed)
    dtype = arrays["param"].dtype
    info = np.finfo(dtype)
    kinds = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0]
    kinds += [info.smallest_subnormal, -3 * info.smallest_subnormal, info.tiny, -info.tiny / 4]
    kinds += [info.max, -info.max, info.max**0.5, -(info.tiny**0.5), info.eps, 1 / info.eps]
    return {
        name: np.where(rng.random(x.shape) < 0.5, rng.choice(np.asarray(kinds, dtype), x.shape), x).astype(x.dtype)
        if x.dtype.kind == "f"
        else rng.integers(-127, 128, x.shape).astype(x.dtype)
        for name, x in arrays.items()
    }


@sweep(
    ("name", "dtype"),
    [*product(NAMED, ("float32", "float64"))],
    short=lambda name, dtype: dtype == "float32" and name in FEW,
)
def test_every_kind_of_number_flows_as_in_the_definition(name, dtype):
    case = NAMED[name]
    for seed, shape in enumerate([(1000,), (37, 45), (150, 7), (3, 33_000)]):
        transforms = case.chain.at((), np.empty(shape))
        if adds_up(transforms, len(shape)):
            arrays = leaf(transforms, shape, dtype) | {"grad": gradient(shape, dtype)}
            for scale in (2.0**-50, 2.0**50, 0.0):  # powers of 2 keep the sums exact
                scaled = {**arrays, "grad": arrays["grad"] * np.asarray(scale, dtype)}
                check(transforms, by_kernel(transforms, scaled), defined(transforms, scaled))
            for where, value in ((0, np.nan), (17, np.inf), (34, -np.inf)):
                arrays["grad"].flat[where] = value
                check(transforms, by_kernel(transforms, arrays), defined(transforms, arrays))
        else:
            arrays = extremes(leaf(transforms, shape, dtype), seed)
            check(transforms, by_kernel(transforms, arrays), defined(transforms, arrays))


class Layout(NamedTuple):
    """How an array lies in memory.

    Args:
        order: its axes from the slowest to the fastest, as a function of their number.
        before: elements that are left out before it along the fastest axis, and as many behind it.
        step: from one element to the next along the fastest axis.
        rows: the same along the slowest axis.
        shift: elements before all of it, so that no register is aligned.
    """

    order: str = "forward"
    before: int = 0
    step: int = 1
    rows: int = 1
    shift: int = 0

    def axes(self, ndim):
        forward = tuple(range(ndim))
        return {
            "forward": forward,
            "backward": forward[::-1],
            "channels last": (*forward[:1], *forward[2:], *forward[1:2]),
        }[self.order]

    def place(self, array):
        """The array in memory of its own, and that memory with a function that views it as the array is viewed."""
        axes = self.axes(array.ndim)
        room = [array.shape[axis] for axis in axes]
        if room:
            room[-1] = room[-1] * self.step + 2 * self.before
            room[0] = room[0] * (self.rows if array.ndim > 1 else 1)
        count = int(np.prod(room))

        def view(memory):
            inner = memory[count + self.shift : 2 * count + self.shift].reshape(room)
            if array.ndim > 1:
                inner = inner[:: self.rows]
            if array.ndim:
                inner = inner[..., self.before : inner.shape[-1] - self.before : self.step]
            return inner.transpose(np.argsort(axes))

        memory = np.full(3 * count + self.shift, GUARD).astype(array.dtype)
        view(memory)[...] = array
        return view(memory), memory, view


GUARD = 77
LAYOUTS = {
    "dense": Layout(),
    "unaligned": Layout(shift=1),
    "part of wider rows": Layout(before=3),
    "every other row": Layout(rows=2, before=1),
    "every other element": Layout(step=2, shift=1),
    "transposed": Layout("backward"),
    "transposed part": Layout("backward", before=2, rows=2),
    "channels last": Layout("channels last"),
}


@pytest.mark.parametrize("of_gradient", ["the same", "dense", "transposed", "every other element", "expanded", "one"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("transforms", "dtype", "shapes"),
    [
        (RECOMMENDED, "float32", [(37, 21), (301, 200), (700, 3)]),
        (SM3, "float64", [(37, 21), (700, 3), (3, 33_000)]),
        (SM3, "float32", [(6, 4, 3, 5)]),
        (VOTE, "float32", [(37, 21), (300, 200), (1000,), (1, 9), (9, 1)]),
        (LION, "bfloat16", [(37, 21), (300, 200), (40_001,), (6, 4, 3, 5)]),
    ],
    ids=["fusedbun", "sm3", "sm3 4 axes", "vote", "lion"],
)
def test_any_layout_and_nothing_around_it_changes(transforms, dtype, shapes, layout, of_gradient):
    """The slots lie as the parameter, and as nothing else, in turn."""
    for n, shape in enumerate(shapes):
        arrays = leaf(transforms, shape, dtype)
        if of_gradient in ("expanded", "one"):
            seen = tuple(1 if of_gradient == "one" or axis == 0 else size for axis, size in enumerate(shape))
            arrays["grad"] = np.broadcast_to(gradient(seen, arrays["grad"].dtype), shape)
        want = defined(transforms, arrays)
        placed = {}
        for name, x in arrays.items():
            chosen = LAYOUTS[layout] if name == "param" or (n % 2 and x.shape == shape) else Layout()
            if name == "grad" and of_gradient in LAYOUTS:
                chosen = LAYOUTS[of_gradient]
            placed[name] = chosen.place(x)
            if name == "grad" and of_gradient in ("expanded", "one"):
                placed[name] = x, x, None
        step_in_place([(transforms, {name: x for name, (x, _, _) in placed.items()})], threads=2)
        np.testing.assert_array_equal(placed.pop("grad")[0], arrays["grad"])
        check(transforms, {name: x for name, (x, _, _) in placed.items()}, want)
        for _, memory, view in placed.values():
            outside = np.ones(memory.size, bool)
            view(outside)[...] = False
            assert (memory[outside] == GUARD).all()


@pytest.mark.parametrize(
    ("transforms", "shape", "dtype"),
    [
        (CLIPPED, (301, 200), "float32"),
        (CLIPPED, (11_011, 3), "float32"),
        (CLIPPED, (3, 33_000), "float32"),
        (RECOMMENDED, (1300, 257), "float32"),
        (SM3, (8400, 257), "float32"),  # more chunks than there may be
        (SM3, (2, 1_100_000), "float32"),
        (LION, (70_001,), "bfloat16"),
    ],
    ids=lambda x: str(x) if isinstance(x, tuple) else "",
)
def test_any_number_of_threads_gives_the_same_bits(transforms, shape, dtype):
    arrays = leaf(transforms, shape, dtype)
    alone = by_kernel(transforms, arrays)
    check(transforms, alone, defined(transforms, arrays))
    for threads in (1, 2, 3, 3, 2):
        assert_same(by_kernel(transforms, arrays, threads), alone)


def test_several_leaves_in_one_call():
    """Of different chains, shapes and dtypes, with numbers of their own; one has no gradient in this step."""
    given = [
        (CLIPPED, (37, 21), "float32", 0.5),
        (CLIPPED, (301, 200), "float32", 0.25),
        (SM3, (700, 3), "float64", 1.0),
        (SM3, (37, 21), "float32", 1e-3),
        (LION, (70_001,), "bfloat16", 0.125),
        (SM3, (0, 5), "float32", 1.0),
        (chain(Momentum(0.5), Decay(0.25)), (33,), "float32", 0.5),
        (chain(Momentum(0.75), Decay(0.125)), (33,), "float32", 2.0),
        (VOTE, (3, 33_000), "float32", 1.0),
    ]
    chains, lrs = [c for c, *_ in given], [lr for *_, lr in given]
    leaves = [leaf(c, shape, dtype, seed) for seed, (c, shape, dtype, _) in enumerate(given)]
    for absent in ((), (3, 7)):
        bits = []
        for threads in (1, 3):
            after = [{name: x.copy() for name, x in arrays.items()} for arrays in leaves]
            step_in_place([*zip(chains, after, strict=True)], threads, lrs, absent)
            bits.append(after)
        for n, (transforms, before, one, three, lr) in enumerate(zip(chains, leaves, *bits, lrs, strict=True)):
            assert_same(one, three)
            if n in absent or not before["param"].size:
                assert_same(one, before)
            else:
                del one["grad"]
                check(transforms, one, defined(transforms, before, lr=lr))


def test_a_step_of_no_leaves():
    step_in_place([])


def test_one_kernel_serves_every_value_of_a_number():
    chains = [chain(Momentum(beta), Decay(decay)) for beta, decay in ((0.9, 0.1), (0.5, 3.0))]
    one, other = (native.kernel(transforms, 2, (0, 1), "float32") for transforms in chains)
    assert one is other


def test_maximize_climbs():
    for transforms in (SM3, LION):
        arrays = leaf(transforms, (37, 21), "float32")
        want = defined(transforms, {**arrays, "grad": -arrays["grad"]})
        step_in_place([(transforms, arrays)], maximize=True)
        del arrays["grad"]
        check(transforms, arrays, want)


NARROW = {
    "fusedbun-float32": (RECOMMENDED, "float32"),
    "sm3-float64": (SM3, "float64"),
    "sm3-bfloat16": (SM3, "bfloat16"),
    "vote-float16": (VOTE, "float16"),
    "vote-float32": (VOTE, "float32"),
    "adam": (chain(ScaleByAdam()), "float64"),
    "lion": (chain(ScaleByLion()), "bfloat16"),
}


@sweep(
    ("name", "registers"),
    [*product(NARROW, (2, 1))],
    short=lambda name, registers: registers == 1 and name in ("sm3-float64", "vote-float32", "vote-float16", "lion"),
)
def test_narrower_registers(name, registers, monkeypatch):
    transforms, dtype = NARROW[name]
    if registers > native.registers():
        pytest.skip("this machine's registers are narrower")
    monkeypatch.setattr(native, "registers", lambda: registers)
    monkeypatch.setattr(native, "_KERNELS", {})
    for shape in ((37, 21), (301, 200), (700, 3), (1111, 13), (3, 33_000)):
        check_training(transforms, shape, dtype, ternary=transforms is VOTE)
        if not adds_up(transforms, 2) and dtype in ("float32", "float64"):
            arrays = extremes(leaf(transforms, shape, dtype), 1)
            check(transforms, by_kernel(transforms, arrays), defined(transforms, arrays))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_rounded_to_the_nearest_once(dtype):
    """To the nearest even in a tie, to infinity beyond the largest, and with every NaN a NaN."""
    subtract = rule(lambda xp, u: u)
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    for grad in (1.0, 2.0**-9, -(2.0**-12), 2.0**-24, 0.0, 6e4):
        arrays = {"param": every, "grad": np.full(every.shape, grad).astype(every.dtype)}
        check(subtract, by_kernel(subtract, arrays), defined(subtract, arrays))
