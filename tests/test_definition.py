"""What makes a rule a definition: it is pure, knows no framework, and can be traced so that a kernel can be made."""

import array_api_strict
import numpy as np
import pytest
from cases import CASES, SHAPES, by_case, problem

from fusedbun import namespace as in_numpy
from fusedbun.compiler.tiles import Tiles, schedule_for
from fusedbun.compiler.trace import evaluate, hyperparameters
from fusedbun.reference import exact_step
from fusedbun.storage.codes import STEP
from fusedbun.transform import Signal

SMALL = [name for name in SHAPES if name != "tall"]


def leaf(case, name):
    params, steps = problem("float64", case.ternary)
    chain = case.chain.at((), params[name])
    rng = np.random.default_rng(3)
    state = {key: rng.uniform(0.5, 1.5, slot.shape(SHAPES[name])) for key, slot in chain.slots(SHAPES[name]).items()}
    arrays = chain.arrays(SHAPES[name], "float64")
    state |= {STEP: np.full(arrays[STEP].shape(SHAPES[name]), 2.0)} if STEP in arrays else {}
    state |= {key: np.rint(state[key]) for key, x in arrays.items() if "int" in x.dtype}
    return chain, params[name], steps[0][name], state


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(**by_case)
def test_runs_on_the_strict_array_api(case, name):
    xp = array_api_strict
    chain, param, grad, state = leaf(case, name)
    want_param, want_state = exact_step(np, chain, 0.5, param, grad, state)
    given = {key: xp.asarray(value) for key, value in state.items()}
    got_param, got_state = exact_step(xp, chain, 0.5, xp.asarray(param), xp.asarray(grad), given)
    np.testing.assert_allclose(np.asarray(got_param), want_param, rtol=1e-14)
    for key in want_state:
        np.testing.assert_allclose(np.asarray(got_state[key]), want_state[key], rtol=1e-14)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(**by_case)
def test_traces_to_a_graph_that_gives_the_same_numbers(case, name):
    chain, param, grad, state = leaf(case, name)
    want_param, want_state = exact_step(np, chain, 0.5, param, grad, state)
    whole = schedule_for(chain, param.shape, param.strides, dtype="float64")
    dtypes = {key: x.dtype for key, x in chain.arrays(param.shape, "float64").items()}
    arrays = {"param": np.array(param), "grad": grad, **{key: np.asarray(x, dtypes[key]) for key, x in state.items()}}
    Tiles(whole, in_numpy).run(
        evaluate(whole.program.scalars, hyperparameters(whole.program, chain, 0.5)), arrays, param.dtype
    )
    np.testing.assert_allclose(arrays["param"], want_param, rtol=1e-14, atol=1e-14)
    for key in want_state:
        np.testing.assert_allclose(arrays[key], want_state[key], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(**by_case)
def test_is_pure(case, name):
    """Neither the arguments nor what a second call makes of them depend on a first."""
    chain, param, grad, state = leaf(case, name)
    copies = param.copy(), grad.copy(), {key: value.copy() for key, value in state.items()}
    for array in (param, grad, *state.values()):
        array.setflags(write=False)
    first = exact_step(np, chain, 0.5, param, grad, state)
    second = exact_step(np, chain, 0.5, *copies)
    np.testing.assert_array_equal(first[0], second[0])
    for key in state:
        np.testing.assert_array_equal(first[1][key], second[1][key])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_keeps_exactly_the_state_it_declares(case):
    for name in SMALL:
        chain, param, grad, state = leaf(case, name)
        for transform in chain:
            slots = transform.slots(param.shape)
            own = {key: state[f"{transform.name}.{key}"] for key in slots}
            own |= {STEP: state[STEP] + 1} if transform.counts else {}
            _, new = transform.update(np, Signal(grad, np.abs(grad)), own, param)
            assert {key: value.shape for key, value in new.items()} == {
                key: slot.shape(param.shape) for key, slot in slots.items()
            }
            assert list(new) == list(slots)
