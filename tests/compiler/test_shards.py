"""Phases: run on a leaf's parts, with what crosses combined here, they do what the step of the whole does."""

from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import ClassVar

import numpy as np
import pytest
from cases import SHAPES, by_case
from leaves import LR, assert_near, assert_same, by_definition, computed, has_sums, leaf
from random_chains import COUNT, random_problem

from fusedbun import chain, recipes
from fusedbun import namespace as in_numpy
from fusedbun.compiler.schedule import WIDE
from fusedbun.compiler.shards import phases
from fusedbun.compiler.tiles import Tiles, schedule_for, schedule_of
from fusedbun.compiler.trace import FIRST, SIZE, evaluate, hyperparameters, trace, used
from fusedbun.transform import Slot, Transform
from fusedbun.transforms import Decay, Momentum, SM3Accumulate

COMBINE = {"sum": np.add, "max": np.maximum, "min": np.minimum}
RECOMMENDED = recipes.fusedbun(centralize=True, use_rms=True, nesterov=True)


class Part:
    """A part of a leaf: copies of its pieces of the arrays, and where it begins."""

    def __init__(self, arrays, shape, bounds):
        self.bounds = bounds
        self.first = [start for start, _ in bounds]
        self.shape = tuple(stop - start for start, stop in bounds) if shape else ()
        self.arrays = {name: x[self.of(x)].copy() for name, x in arrays.items()} if shape else {**arrays}

    def of(self, x):
        """The slices of an array of the whole leaf that are this part's; what is repeated is every part's."""
        if x.ndim < len(self.first):
            return ()
        return tuple(slice(*at) if n > 1 else slice(None) for at, n in zip(self.bounds, x.shape, strict=True))


def in_parts(transforms, arrays, cuts):
    """The parts of a leaf after a step; it is cut into so many along each axis."""
    param = arrays["param"]
    shape, dtype = param.shape, param.dtype
    sizes = shape or (1,)
    edges = [
        [(k * n // parts, (k + 1) * n // parts) for k in range(parts)] for n, parts in zip(sizes, cuts, strict=True)
    ]
    along = [axis for axis, parts in enumerate(cuts) if parts > 1]
    arrays = {name: x.copy() for name, x in arrays.items()}
    parts = {at: Part(arrays, shape, [edges[i][k] for i, k in enumerate(at)]) for at in product(*map(range, cuts))}
    program = schedule_for(transforms, shape, np.empty(shape).strides, dtype=dtype.name).program
    for phase in phases(program, frozenset(along)):
        runner = Tiles(schedule_of(phase.program), in_numpy)
        for part in parts.values():
            for name in phase.program.arrays.keys() - part.arrays.keys():
                part.arrays[name] = np.full(phase.program.arrays[name].shape(part.shape), np.nan, computed(dtype))
            numbers = hyperparameters(phase.program, transforms, LR)
            for axis, (size, first) in enumerate(zip(sizes, part.first, strict=True)):
                numbers |= {SIZE.format(axis): size, FIRST.format(axis): first}
            runner.run(evaluate(phase.program.scalars, numbers), part.arrays, computed(dtype), 7)
        for name, crossing in phase.crossings.items():
            combined(parts, name, COMBINE[crossing.function], crossing.over)
    return parts.values()


def combined(parts, name, combine, over):
    """Combines the arrays of the parts that differ in their places along these axes alone."""
    groups = {}
    for at, part in parts.items():
        groups.setdefault(tuple(k for axis, k in enumerate(at) if axis not in over), []).append(part.arrays)
    for group in groups.values():
        total = group[0][name]
        for other in group[1:]:
            total = combine(total, other[name])
        for each in group:
            each[name] = total.copy()


def compared(parts, want, compare):
    for part in parts:
        pieces = {name: x[part.of(x)] if part.shape else x for name, x in want.items()}
        compare({name: part.arrays[name] for name in want}, pieces)


def some_cuts(shape):
    """No part is empty here."""
    every = product(*((1, 2, 3) if n > 2 else (1, 2)[:n] for n in shape or (1,)))
    return [cuts for cuts in every if sum(parts > 1 for parts in cuts) <= 2][-4:]


@np.errstate(all="ignore")
@pytest.mark.parametrize("name", ["scalar", "vector", "matrix", "pairs", "cube", "convolution"])
@pytest.mark.parametrize(**by_case)
def test_parts_step_as_the_whole_does(case, name):
    transforms = case.chain.at((), np.empty(SHAPES[name]))
    arrays = leaf(transforms, SHAPES[name], ternary=case.ternary)
    want = by_definition(transforms, arrays)
    for cuts in some_cuts(SHAPES[name]):
        compared(in_parts(transforms, arrays, cuts), want, partial(assert_near, tolerance=1e-12))


@np.errstate(all="ignore")
@pytest.mark.parametrize("name", ["vector", "matrix", "convolution"])
@pytest.mark.parametrize(**by_case)
def test_to_the_bit_where_nothing_is_added_up(case, name):
    transforms = case.chain.at((), np.empty(SHAPES[name]))
    adds = has_sums(transforms, len(SHAPES[name]))
    arrays = leaf(transforms, SHAPES[name], "float32", ternary=case.ternary)
    arrays["grad"].flat[[2, 9]] = np.nan, -np.inf
    want = by_definition(transforms, arrays)
    for cuts in some_cuts(SHAPES[name]):
        compared(
            in_parts(transforms, arrays, cuts), want, partial(assert_near, tolerance=2e-5) if adds else assert_same
        )


@np.errstate(all="ignore")
@pytest.mark.parametrize("seed", range(COUNT))
def test_chains_composed_at_random(seed):
    transforms, shape, *_ = random_problem(seed)
    arrays = leaf(transforms, shape, seed=seed)
    want = by_definition(transforms, arrays)
    compared(in_parts(transforms, arrays, some_cuts(shape)[-1]), want, partial(assert_near, tolerance=1e-11))


@pytest.mark.parametrize("cuts", [(2, 1), (1, 3), (2, 3)])
def test_the_noise_is_that_of_an_elements_place_in_the_whole(cuts):
    transforms = chain(Momentum(0.9, dtype="bfloat16"))
    arrays = leaf(transforms, (5, 7), "float32")
    compared(in_parts(transforms, arrays, cuts), by_definition(transforms, arrays), assert_same)


@dataclass(frozen=True)
class Probe(Transform):
    """Passes the update on, and keeps what no transformation here does.

    A sum of minima, one number, is known late, and divides what is each row's own. A column adds it up times the age as
    it was before this step, while the age itself is renewed: so the age must not be written before the column is.
    """

    name: ClassVar[str] = "probe"

    def slots(self, shape):
        return {"share": Slot((0,)), "column": Slot((1,)), "age": Slot((1,))}

    def update(self, xp, signal, state, param):
        s = signal.update * signal.update
        lows, highs = (f(s, axis=(1,), keepdims=True) for f in (xp.min, xp.max))
        total = xp.sum(lows, axis=(0,), keepdims=True)
        age = 0.5 * state["age"] + xp.max(s, axis=(0,), keepdims=True)
        return signal, {"share": highs / total, "column": state["column"] + total * state["age"], "age": age}


@pytest.mark.parametrize("cuts", [(2, 1), (1, 3), (2, 3)])
def test_what_is_read_late_is_written_late_and_different_functions_cross_apart(cuts):
    transforms = chain(Probe())
    arrays = leaf(transforms, (5, 7))
    compared(
        in_parts(transforms, arrays, cuts), by_definition(transforms, arrays), partial(assert_near, tolerance=1e-12)
    )


@pytest.mark.parametrize(
    ("transforms", "cut"), [*product([recipes.sm3(0.9)], [{0}, {1}, {0, 1}]), (chain(Probe()), {1})]
)
def test_once_the_parameter_is_written_nothing_of_full_size_is_read(transforms, cut):
    made = phases(trace(transforms, 2), frozenset(cut))
    (written,) = (t for t, phase in enumerate(made) if "param" in phase.program.outputs)
    after = made[written + 1 :]
    assert after
    for phase in after:
        assert not [v.detail for v in used(phase.program.outputs.values()) if v.op == "input" and v.span in WIDE]


def described(transforms, cut, ndim=2):
    """Of each phase what crosses, how it is combined and over which axes, and what is written."""
    return [
        (
            sorted((c.function, sorted(c.over), c.stored.axes) for c in phase.crossings.values()),
            [name for name in phase.program.outputs if name not in phase.crossings],
        )
        for phase in phases(trace(transforms, ndim), frozenset(cut))
    ]


def test_sm3_writes_in_one_phase_and_then_combines_its_column_maxima():
    assert described(recipes.sm3(), {0}) == [
        ([("max", [0], (1,))], ["param", "sm3_accumulate.axis0"]),
        ([], ["sm3_accumulate.axis1"]),
    ]


def test_fusedbun_waits_once_for_the_sums_of_columns():
    (first, second) = described(RECOMMENDED, {0})
    assert first == ([("sum", [0], ()), ("sum", [0], (1,))], [])
    assert second[0] == []
    assert len(second[1]) == 4


def test_elementwise_chains_have_one_phase_and_nothing_crosses():
    ((crossings, written),) = described(chain(Momentum(0.9), Decay(0.1)), {0, 1})
    assert crossings == []
    assert written == ["param", "momentum.moment"]


def test_of_a_convolution_the_maxima_along_each_axis_cross_and_not_those_of_all_columns():
    (crossings, _), *_ = described(chain(SM3Accumulate()), {0}, ndim=4)
    assert crossings == [("max", [0], (axis,)) for axis in (1, 2, 3)]


def test_uncut_there_is_one_phase_the_step_itself():
    program = trace(RECOMMENDED, 2)
    (phase,) = phases(program, frozenset())
    assert phase.program is program
    assert not phase.crossings
