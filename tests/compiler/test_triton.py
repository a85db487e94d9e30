"""The Triton kernels give the definition's numbers: on a GPU where there is one, and in Triton's interpreter elsewhere.

The interpreter has to be chosen before Triton is imported, so a process of its own runs it. The source of two chains
lies in `golden/` to be read. After a change that is meant to alter it,

    FUSEDBUN_WRITE_GOLDEN=1 python -m pytest tests/compiler/test_triton.py

writes it anew, and `git diff` shows what the change does.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import gpu_steps
import numpy as np
import pytest
import torch
from cases import CASES, by_case
from interpreter import interpret
from leaves import Arrays, assert_near, assert_same, by_definition, leaf
from random_chains import random_problem

from fusedbun import chain, recipes
from fusedbun.compiler import UnplannableError, gpu, schedule, trace
from fusedbun.compiler.triton import emit
from fusedbun.transforms import ClipRMS, Momentum

GOLDEN = Path(__file__).parent / "golden"
RECOMMENDED = recipes.fusedbun(centralize=True, use_rms=True, nesterov=True)
PRINTED = {"sm3": recipes.sm3(), "fusedbun_recommended": RECOMMENDED}
TOLERANCE = {"float64": 1e-12, "float32": 4e-6}
SHAPES = ((), (17,), (3, 4, 5), (8, 3, 3, 3))
SEVERAL = ((8, 16), (9, 2), (13, 21), (1, 40), (40, 1))  # in one step: blocks of both shapes, and odd ends
NO_TRITON = find_spec("triton") is None
REASON = "Triton is not installed (pip install triton, 290 MB): the kernels that it prints for GPUs are not run"
CUDA = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(NO_TRITON or not CUDA, reason="there is no GPU")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Calls a function of `gpu_steps` where the kernels run."""
    if NO_TRITON:
        pytest.skip(REASON)
    if CUDA:
        yield lambda f, *args, **named: f(*args, device="cuda", **named)
        return
    cache = str(tmp_path_factory.mktemp("kernels"))
    with ProcessPoolExecutor(1, get_context("spawn"), interpret, (cache,)) as pool:
        yield lambda f, *args, **named: pool.submit(f, *args, **named).result()


@pytest.fixture
def take(run):
    return partial(run, gpu_steps.take)


def gradients(leaves: list[Arrays], steps: int) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(5)
    return [[np.asarray(rng.standard_normal(x["param"].shape), x["param"].dtype) for x in leaves] for _ in range(steps)]


def defined(chains, leaves, steps):
    """What `take` returns, by the definition."""
    after, now = [], leaves
    for grads in steps:
        now = [by_definition(c, {**x, "grad": g}) for c, x, g in zip(chains, now, grads, strict=True)]
        after.append(now)
    return after


def compare(got, want, tolerance):
    for got_leaves, want_leaves in zip(got, want, strict=True):
        for got_leaf, want_leaf in zip(got_leaves, want_leaves, strict=True):
            assert_near(got_leaf, want_leaf, tolerance)


def problem(case, shapes, dtype):
    chains = [case.chain.at((), np.zeros(shape)) for shape in shapes]
    return chains, [
        leaf(c, shape, dtype, n, case.ternary) for n, (c, shape) in enumerate(zip(chains, shapes, strict=True))
    ]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(**by_case)
def test_equals_the_definition(case, dtype, take):
    if case.cancels and dtype == "float32":
        pytest.skip("its float32 is rounding noise")
    for shapes in (SEVERAL, *((shape,) for shape in SHAPES)):
        chains, leaves = problem(case, shapes, dtype)
        steps = gradients(leaves, 2)
        compare(take(chains, leaves, steps, dtype), defined(chains, leaves, steps), TOLERANCE[dtype])


@pytest.mark.parametrize("seed", range(0, 200, 8))
def test_any_chain_and_any_order_of_axes(seed, take):
    chain, shape, order, _ = random_problem(seed)
    try:
        trace(chain, len(shape), order)
    except UnplannableError as error:
        pytest.skip(str(error))
    leaves = [leaf(chain, shape)]
    steps = gradients(leaves, 2)
    compare(take([chain], leaves, steps, order=order), defined([chain], leaves, steps), 1e-9)


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 5), (3, 2, 2, 3)], ids=str)
def test_operations_that_the_family_leaves_out(shape, take):
    rule = chain(gpu_steps.Everything())
    leaves = [leaf(rule, shape)]
    steps = gradients(leaves, 4)
    compare(take([rule], leaves, steps), defined([rule], leaves, steps), 1e-13)


def test_prints_numbers_that_float32_cannot_hold_in_the_precision_computed_in():
    source = emit(schedule(trace(chain(gpu_steps.Everything()), 2)))
    assert "tl.full((), 0.3, T)" in source  # a plain one Triton's functions round to float32
    assert "tl.full((), 3.0, T)" not in source


@pytest.mark.parametrize("shape", [(17,), (9, 18), (3, 4, 5)], ids=str)
@pytest.mark.parametrize(**by_case)
def test_what_is_not_finite_flows_as_in_the_definition(case, shape, take):
    chains, leaves = problem(case, [shape], "float64")
    steps = gradients(leaves, 2)
    for where, value in ((0, np.nan), (6, np.inf), (11, -np.inf)):
        steps[0][0].flat[where] = value
    compare(take(chains, leaves, steps), defined(chains, leaves, steps), 1e-12)


def stored(x, dtype):
    """As a kernel stores it: a GPU rounds, but Triton's interpreter cuts bfloat16 off."""
    if dtype == "bfloat16" and not CUDA:
        return (np.asarray(x, np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    return torch.tensor(x).to(getattr(torch, dtype)).float().numpy()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(**by_case)
def test_low_precision_parameters_are_rounded_once(case, dtype, take):
    chains, leaves = problem(case, SEVERAL, "float32")
    leaves = [{**x, "param": stored(x["param"], dtype)} for x in leaves]
    (grads,) = [[stored(g, dtype) for g in step] for step in gradients(leaves, 1)]
    (got,), (want,) = take(chains, leaves, [grads], dtype), defined(chains, leaves, [grads])
    for before, a, b in zip(leaves, got, want, strict=True):
        noise = TOLERANCE["float32"] * np.abs(b["param"] - before["param"]).max()
        assert (a["param"] >= stored(b["param"] - noise, dtype)).all()
        assert (a["param"] <= stored(b["param"] + noise, dtype)).all()
        assert_near({**a, "param": 0.0}, {**b, "param": np.zeros(())}, TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gives_the_same_bits_again_and_beside_other_leaves(dtype, take):
    case = next(c for c in CASES if c.name == "fusedbun clipped")
    chains, leaves = problem(case, SEVERAL, "float32")
    steps = gradients(leaves, 2)
    first, second = take(chains, leaves, steps, dtype), take(chains, leaves, steps, dtype)
    for n in range(len(leaves)):
        (alone,) = take(chains[n : n + 1], leaves[n : n + 1], [step[n : n + 1] for step in steps], dtype)[-1]
        assert_same(first[-1][n], second[-1][n])
        assert_same(first[-1][n], alone)


def test_a_step_reads_its_scalars_when_it_runs(take):
    leaves = [leaf(RECOMMENDED, (6, 5))]
    steps = gradients(leaves, 1) * 2
    once = take([RECOMMENDED], leaves, steps, lrs=(0.5, 0.0))
    np.testing.assert_array_equal(once[1][0]["param"], once[0][0]["param"])
    again = take([RECOMMENDED], leaves, steps, lrs=(0.5, 0.25))
    assert (again[1][0]["param"] != once[1][0]["param"]).all()


def test_leaves_have_hyperparameters_of_their_own(take):
    chains = [chain(ClipRMS(threshold), Momentum(beta)) for threshold, beta in ((0.1, 0.5), (0.7, 0.9))]
    leaves = [leaf(c, (6, 5)) for c in chains]
    steps = gradients(leaves, 2)
    compare(take(chains, leaves, steps), defined(chains, leaves, steps), 1e-12)


def test_takes_no_more_launches_for_more_leaves(run):
    leaves = [leaf(RECOMMENDED, (20, 30), seed=n) for n in range(40)]
    assert run(gpu_steps.launches, RECOMMENDED, leaves) == run(gpu_steps.launches, RECOMMENDED, leaves[:1]) == 5


@pytest.mark.parametrize("name", PRINTED)
def test_the_source_is_as_it_was(name):
    path = GOLDEN / f"triton_{name}.py.txt"
    source = emit(schedule(trace(PRINTED[name], 2)))
    if os.environ.get("FUSEDBUN_WRITE_GOLDEN"):
        path.write_text(source)
    assert source == path.read_text(), (
        "the Triton that is printed has changed; where it should, "
        f"write it anew with FUSEDBUN_WRITE_GOLDEN=1 python -m pytest {Path(__file__).name}"
    )


@pytest.mark.skipif(NO_TRITON, reason=REASON)
def test_compiles_for_a_gpu_that_is_not_there(tmp_path):
    """In a process whose Triton does not interpret."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assembly = pool.submit(gpu_steps.compile_for, 90, RECOMMENDED, 4, str(tmp_path)).result()
    names = ("pass_0", "combine_1", "between_1", "pass_1", "between_2")
    assert assembly.keys() == {(dtype, name) for dtype in ("float32", "bfloat16", "float64") for name in names}
    assert "cvt.rn.bf16" in assembly["bfloat16", "pass_1"]  # rounded to nearest


@needs_gpu
def test_a_cuda_graph_captures_it():
    def train(captured):
        leaves = [leaf(RECOMMENDED, shape, "float32") for shape in SEVERAL]
        chains = [RECOMMENDED] * len(leaves)
        step, made, scalars = gpu_steps.prepare(chains, leaves, "float32", "cuda", None)
        scalars.fill_(0.25)
        grads = [gpu_steps.tensor(g, torch.float32, "cuda") for g in gradients(leaves, 1)[0]]
        step(grads)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                step(grads)
        for lr in (0.25, 0.5):
            scalars[:, 0] = lr
            graph.replay() if captured else step(grads)
        return [{"param": x.param.cpu().numpy()} for x in made]

    for got, want in zip(train(True), train(False), strict=True):
        assert_same(got, want)


@needs_gpu
def test_large_leaves_equal_the_definition(take):
    leaves = [leaf(RECOMMENDED, shape, "float64") for shape in ((300, 700), (5000, 3), (400, 30), (3, 5000))]
    chains, steps = [RECOMMENDED] * len(leaves), gradients(leaves, 3)
    compare(take(chains, leaves, steps), defined(chains, leaves, steps), 1e-11)


class TestErrors:
    program = trace(RECOMMENDED, 2)

    def step(self, dtype=torch.float32, scalars=None, **changed):
        slots = {key: torch.zeros(x.shape((4, 6))) for key, x in self.program.arrays.items()}
        param = changed.pop("param", torch.zeros(4, 6, dtype=dtype))
        scalars = torch.zeros(1, len(self.program.scalars)) if scalars is None else scalars
        return gpu.GpuStep(schedule(self.program), [gpu.Leaf(param, slots | changed)], scalars)

    def test_of_the_parameter(self):
        with pytest.raises(ValueError, match=r"dense in memory along its axes \(0, 1\), but its strides are \(1, 4\)"):
            self.step(param=torch.zeros(6, 4).T)
        with pytest.raises(ValueError, match="the plan is for parameters of 2 axes, but the parameter has 3"):
            self.step(param=torch.zeros(4, 6, 1))
        with pytest.raises(ValueError, match=r"must be of a dtype among .*, but it is torch\.int32"):
            self.step(torch.int32)

    def test_of_the_slots(self):
        with pytest.raises(ValueError, match=r"momentum.moment must be torch.float32 of shape \(4, 6\) on cpu, but"):
            self.step(**{"momentum.moment": torch.zeros(4, 6, dtype=torch.bfloat16)})
        with pytest.raises(ValueError, match=r"the slots must be \['momentum.moment', .*\], but they are"):
            self.step(other=torch.zeros(1))

    def test_of_the_scalars(self):
        with pytest.raises(ValueError, match=r"the scalars must be a contiguous torch.float32 tensor with rows of 7"):
            self.step(scalars=torch.zeros(1, 2))

    def test_of_the_schedule(self):
        with pytest.raises(ValueError, match="blocks of rows, but these are of columns"):
            emit(schedule(self.program, "columns"))

    def test_without_triton(self, monkeypatch):
        monkeypatch.setattr(gpu, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match="pip install triton"):
            self.step()

    @pytest.mark.skipif(NO_TRITON, reason=REASON)
    def test_of_the_gradients(self, monkeypatch, tmp_path):
        monkeypatch.setenv("FUSEDBUN_CACHE", str(tmp_path))
        with pytest.raises(ValueError, match=r"the gradient must be dense in memory along its axes \(0, 1\), but"):
            self.step()([torch.zeros(6, 4).T])
