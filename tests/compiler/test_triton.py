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
from itertools import permutations
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import gpu_steps
import numpy as np
import pytest
import torch
from cases import CASES, by_case
from interpreter import interpret
from leaves import LOW, Arrays, assert_near, assert_same, by_definition, leaf
from random_chains import random_problem

from fusedbun import Chain, chain, recipes
from fusedbun.compiler import UnschedulableError, schedule, trace
from fusedbun.compiler.triton.module import emit
from fusedbun.compiler.triton.text import numbers
from fusedbun.storage.codes import STEP
from fusedbun.storage.rounding import Rounding
from fusedbun.torch import gpu
from fusedbun.transforms import Centralize, ClipRMS, Decay, Momentum, RMSScale, ScaleByLion, SM3Accumulate

GOLDEN = Path(__file__).parent / "golden"
RECOMMENDED = recipes.fusedbun(centralize=True, use_rms=True, nesterov=True)
PRINTED = {"sm3": recipes.sm3(), "fusedbun_recommended": RECOMMENDED}
TOLERANCE = {"float64": 1e-12, "float32": 4e-6}
SHAPES = ((), (17,), (3, 4, 5), (8, 3, 3, 3))
SEVERAL = ((8, 16), (9, 2), (13, 21), (1, 40), (40, 1))  # in one step: blocks of both shapes, and odd ends
MOMENTS = (None, "bfloat16", "int8", "int4")  # what a momentum is stored in
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
    except UnschedulableError as error:
        pytest.skip(str(error))
    leaves = [leaf(chain, shape)]
    steps = gradients(leaves, 2)
    compare(take([chain], leaves, steps, order=order), defined([chain], leaves, steps), 1e-9)


@pytest.mark.parametrize(("shape", "axis"), [((5, 1), 0), ((1, 5), 1), ((3, 1, 1), 0), ((4, 2), 0)], ids=str)
def test_a_channel_of_one_element_is_not_centralized(shape, axis, take):
    rule = chain(Centralize(axis), Momentum(0.5))
    leaves = [leaf(rule, shape)]
    steps = gradients(leaves, 2)
    compare(take([rule], leaves, steps), defined([rule], leaves, steps), 1e-13)


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


def noisy(code, stochastic=True, seed=11):
    """A chain that adds nothing up, so that every bit is the definition's, with a momentum stored in this code."""
    transforms = (SM3Accumulate(0.9, "max", "min"), RMSScale(1e-8), Momentum(0.9, dtype=code), Decay(0.1))
    return Chain(transforms, Rounding(stochastic, seed))


def noisy_problem(chain, shapes, dtype):
    """Leaves of names of their own, after many steps."""
    chains = [chain.at((), SimpleNamespace(shape=x, dtype=dtype), f"layers.{n}") for n, x in enumerate(shapes)]
    leaves = [leaf(c, shape, dtype, n) for n, (c, shape) in enumerate(zip(chains, shapes, strict=True))]
    for n, arrays in enumerate(leaves):
        for name, x in arrays.items():
            if name.endswith(STEP):
                x[...] = 2**24 + 1 + n if n % 2 else 2**31 - 2  # float32 cannot count so far; and the next one wraps
    return chains, leaves


def widened(steps):
    """Leaves as `take` returns them: NumPy's bfloat16 and float16 as float32."""
    return [
        [{k: np.float32(x) if x.dtype in LOW else x for k, x in arrays.items()} for arrays in leaves]
        for leaves in steps
    ]


def check_bits(take, chain, shapes, dtype, steps=3, spoil=(), **options):
    chains, leaves = noisy_problem(chain, shapes, dtype)
    grads = gradients(leaves, steps)
    for where, value in spoil:
        grads[0][0].flat[where] = value
    got, want = take(chains, leaves, grads, dtype, **options), widened(defined(chains, leaves, grads))
    for got_leaves, want_leaves in zip(got, want, strict=True):
        for got_leaf, want_leaf in zip(got_leaves, want_leaves, strict=True):
            assert {k: x.dtype for k, x in got_leaf.items()} == {k: x.dtype for k, x in want_leaf.items()}
            assert_same(got_leaf, want_leaf)


@pytest.mark.parametrize(
    ("dtype", "code", "stochastic"),
    [
        ("bfloat16", None, True),
        ("bfloat16", "bfloat16", True),
        ("bfloat16", "param", True),
        ("float32", "bfloat16", False),
    ],
)
def test_what_is_rounded_with_noise_has_the_bits_of_the_definition(dtype, code, stochastic, take):
    for shapes in (SEVERAL, *((shape, shape) for shape in SHAPES)):
        check_bits(take, noisy(code, stochastic), shapes, dtype)


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_noise_is_that_of_an_elements_place_in_any_order_of_axes(order, take):
    check_bits(take, noisy("bfloat16"), [(3, 4, 5), (2, 9, 7)], "bfloat16", order=order)


def test_noise_where_no_element_depends_on_another(take):
    chain = Chain((ScaleByLion(dtype="bfloat16"), Decay(0.1)), Rounding(True, 3))
    for shapes in ([()], [(17,), (100,)], [(9, 18), (40, 3)]):
        check_bits(take, chain, shapes, "bfloat16")


@pytest.mark.parametrize(("dtype", "stochastic"), [("float32", False), ("bfloat16", True)])
@pytest.mark.parametrize("code", ["int8", "int4"])
def test_codes_that_share_an_exponent_have_the_bits_of_the_definition(code, dtype, stochastic, take):
    """In blocks that are whole and that are not, of one column, and along more than one axis."""
    for shapes in (
        ((9, 70), (5, 1), (3, 32), (1, 33), (40, 96)),
        ((3, 4, 11), (2, 5, 8)),
        ((8, 3, 3, 3),),
        ((17,),),
        ((),),
    ):
        check_bits(take, noisy(code, stochastic), shapes, dtype)


@pytest.mark.parametrize("code", [*MOMENTS])
def test_what_is_not_finite_is_rounded_and_coded_as_in_the_definition(code, take):
    spoil = ((0, np.nan), (40, np.inf), (100, -np.inf), (150, 1e-42), (151, 3e38))
    check_bits(take, noisy(code), [(5, 70)], "bfloat16", spoil=spoil)


def test_words_that_float32_cannot_hold_are_read_as_they_are(take):
    for seed in range(1, 5):
        chain = noisy(None, seed=seed)
        (named,), _ = noisy_problem(chain, [(6, 5)], "bfloat16")
        start = named.rounding.start("param")
        assert int(np.float32(start)) != start
        check_bits(take, chain, [(6, 5)], "bfloat16", steps=1)


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
        compile_for = partial(pool.submit, gpu_steps.compile_for, 90)
        dtypes = ("float32", "bfloat16", "float64")
        assembly = compile_for(RECOMMENDED, 4, str(tmp_path), dtypes).result()
        in_fewer_bits = [compile_for(noisy(code), 3, str(tmp_path), ("bfloat16",)).result() for code in MOMENTS]
    names = ("pass_0", "combine_1", "between_1", "pass_1", "between_2")
    assert assembly.keys() == {(dtype, name) for dtype in dtypes for name in names}
    assert "cvt.rn.bf16" in assembly["bfloat16", "pass_1"]  # rounded to nearest
    assert all(("bfloat16", "pass_0") in made for made in in_fewer_bits)


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
        with pytest.raises(ValueError, match="the schedule is for parameters of 2 axes, but the parameter has 3"):
            self.step(param=torch.zeros(4, 6, 1))
        with pytest.raises(ValueError, match=r"parameter must be torch.float32 of .*, but it is torch\.int32"):
            self.step(torch.int32)

    def test_of_the_slots(self):
        with pytest.raises(ValueError, match=r"momentum.moment must be torch.float32 of shape \(4, 6\) on cpu, but"):
            self.step(**{"momentum.moment": torch.zeros(4, 6, dtype=torch.bfloat16)})
        with pytest.raises(ValueError, match=r"the slots must be \['momentum.moment', .*\], but they are"):
            self.step(other=torch.zeros(1))

    def test_of_the_words(self):
        program = trace(noisy(None), 2, dtype="bfloat16")
        slots = {key: torch.zeros(x.shape((4, 6)), dtype=getattr(torch, x.dtype)) for key, x in program.arrays.items()}
        param, scalars = torch.zeros(4, 6, dtype=torch.bfloat16), torch.zeros(1, len(numbers(program)))
        with pytest.raises(ValueError, match=r"the words must be \['param.start'\], but they are \[\]"):
            gpu.GpuStep(schedule(program), [gpu.Leaf(param, slots)], scalars)

    def test_of_the_scalars(self):
        with pytest.raises(ValueError, match=r"the scalars must be a contiguous torch.float32 tensor with rows of 7"):
            self.step(scalars=torch.zeros(1, 2))

    def test_of_the_schedule(self):
        with pytest.raises(ValueError, match="tiles of rows, but these are of columns"):
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
