"""The table of operations: on every row NumPy, torch, JAX, tiles and kernels agree, and Triton's text can be run.

A new row is tested by being in the table.
"""

import ast
from functools import cache
from inspect import isclass

import jax
import numpy as np
import pytest
import torch
from leaves import by_definition, by_kernel, by_tiles
from rules import stateful

from fusedbun import Slot
from fusedbun import namespace as in_numpy
from fusedbun.compiler import UnschedulableError, schedule, trace
from fusedbun.compiler.graph import Graph
from fusedbun.compiler.trace import Symbolic, evaluate
from fusedbun.compiler.triton.module import emit
from fusedbun.operations import FUNCTIONS, OPERATIONS
from fusedbun.storage.codes import Storing
from fusedbun.torch import namespace as in_torch
from fusedbun.transform import Namespace
from fusedbun_jax import namespace as in_jax

# A row and the kind of its operands.
CASES = {
    f"{row.name}_{kind}": (row, kind)
    for row in OPERATIONS.values()
    for kind in (("number", "word") if row.takes == "any" else (row.takes,))
}
EDGES = [0.0, -0.0, 1.0, -1.0, 0.5, 2.5, -2.5, 1e-3, 20.0, -90.0, 1e30, -3e38, 2e-38, np.inf, -np.inf, np.nan]
TINY = float(np.finfo(np.float32).tiny)  # below it some libraries make zeros of numbers
LIBRARIES = {"numpy": in_numpy, "torch": in_torch, "jax": in_jax}
of_rows = pytest.mark.parametrize("case", CASES)
of_libraries = pytest.mark.parametrize("xp", LIBRARIES.values(), ids=LIBRARIES)


def numbers():
    """Every pair of edges, and random ones."""
    pairs = np.array(np.meshgrid(EDGES, EDGES)).reshape(2, -1)
    random = np.random.default_rng(3).standard_normal((2, 301)) * np.geomspace(1e-6, 1e6, 301)
    return np.concatenate([pairs, random], 1).astype(np.float32)


def operands(case, xp, a, b):
    row, kind = CASES[case]
    if kind == "word":
        a, b = (xp.bits(x) & 0x7FFFFFFF for x in (a, b))
        b = b & 31 if row.name in ("lshift", "rshift") else b
    if row.name == "whole":
        a = xp.real((xp.bits(a) & 0xFFFF) - 0x8000)
    return {1: (a,), 2: (a, b), 3: (a < b, a, b)}[row.operands]


def result(case, xp, args):
    row, _ = CASES[case]
    found = getattr(xp, row.name)(*args) if row.name in FUNCTIONS else row.host(*args)
    return xp.where(found, 1.0, 0.0) if row.gives == "condition" else found


def is_word(case):
    row, kind = CASES[case]
    return "word" in (row.gives, kind if row.gives == "same" else "")


def results(xp, a, b):
    return {case: result(case, xp, operands(case, xp, a, b)) for case in CASES}


def all_of_them():
    """A chain whose state is every row's result, of the gradient and of its first slot."""
    slots = {case: Slot.full(1, "int32" if is_word(case) else "compute") for case in CASES}
    return stateful({"b": Slot.full(1), **slots}, lambda xp, u, state: {"b": state["b"], **results(xp, u, state["b"])})


@cache
@np.errstate(all="ignore")
def by(realisation):
    a, b = numbers()
    if realisation == "torch":
        return {case: x.numpy() for case, x in results(in_torch, torch.from_numpy(a), torch.from_numpy(b)).items()}
    if realisation == "jax":
        return jax.tree.map(np.asarray, jax.jit(lambda a, b: results(in_jax, a, b))(a, b))
    run = {"numpy": by_definition, "tiles": by_tiles, "kernel": by_kernel}[realisation]
    arrays = {"param": np.zeros_like(a), "grad": a, "rule.b": b}
    arrays |= {f"rule.{case}": np.zeros(a.shape, "int32" if is_word(case) else "float32") for case in CASES}
    return {name.removeprefix("rule."): x for name, x in run(all_of_them(), arrays).items()}


@pytest.mark.parametrize("realisation", ["torch", "jax", "tiles", "kernel"])
@of_rows
def test_computes_what_numpy_does(case, realisation):
    got, want = by(realisation)[case], by("numpy")[case]
    if is_word(case):
        np.testing.assert_array_equal(got, want)
    else:
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=TINY)


@of_rows
@np.errstate(all="ignore")
def test_python_computes_it_on_hyper_parameters(case):
    row, _ = CASES[case]
    a, b = numbers()[:, -99:]
    args = operands(case, in_numpy, a, b)
    computed = 0
    for *one, want in zip(*args, result(case, in_numpy, args), strict=True):
        try:
            got = row.host(*(x.item() for x in one))
        except (ArithmeticError, ValueError):  # outside its domain Python has no number
            continue
        computed += 1
        if is_word(case):
            assert (got - int(want)) % (1 << 32) == 0
        else:
            np.testing.assert_allclose(np.float32(got), want, rtol=2e-6, atol=TINY)
    assert computed > 20


@pytest.mark.parametrize("mixed", [False, True], ids=["arrays", "mixed"])
@pytest.mark.parametrize("array", [np.asarray, torch.tensor, jax.numpy.asarray], ids=LIBRARIES)
@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("_number") and not is_word(case)])
def test_a_library_computes_it_on_hyper_parameters_that_are_arrays(case, array, mixed):
    row, _ = CASES[case]
    graph = Graph(1)
    a, b = graph.hyperparameter("a"), graph.hyperparameter("b")
    args = {1: (a,), 2: (a, b), 3: (graph.apply("lt", a, b), a, b)}[row.operands]
    xp = dict(zip((np.asarray, torch.tensor, jax.numpy.asarray), LIBRARIES.values(), strict=True))[array]
    values = {"a": array(0.25), "b": 3.0 if mixed else array(3.0)}
    goal = graph.apply(row.name, *args)
    (got,), (want,) = evaluate((goal,), values, xp), evaluate((goal,), {"a": 0.25, "b": 3.0})
    assert float(got) == pytest.approx(float(want), rel=1e-6)


def test_tritons_text_can_be_run():
    source = emit(schedule(trace(all_of_them(), 1)))
    tree = ast.parse(source)
    known = {f.name for f in tree.body if isinstance(f, ast.FunctionDef)} | {"range", "float"}
    called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert called <= known


MEMBERS = {
    name
    for protocol in (Namespace, Storing)
    for base in protocol.__mro__
    for name in vars(base)
    if not name.startswith("_")
}


@of_libraries
def test_a_library_has_the_functions_of_the_table_and_of_the_protocols_and_no_others(xp):
    found = {name for name, x in vars(xp).items() if callable(x) and not isclass(x) and not name.startswith("_")}
    assert found - {"functions_of"} == {*FUNCTIONS, *MEMBERS}


def test_so_have_symbols():
    xp = Symbolic(Graph(1))
    assert {name for name in vars(Symbolic) if not name.startswith("_")} <= {*FUNCTIONS, *MEMBERS}
    for name in {*FUNCTIONS, *MEMBERS}:
        assert callable(getattr(xp, name))
    with pytest.raises(UnschedulableError, match=r"a rule uses xp\.arctan, which the compiler does not know"):
        _ = xp.arctan


def test_numbers_and_words_are_told_apart():
    graph = Graph(1)
    number, word = graph.input("u", (0,)), graph.index(0)
    for op, operand, kind, other in (("sqrt", word, "word", "number"), ("xor", number, "number", "word")):
        with pytest.raises(UnschedulableError, match=rf"computes with {kind}s where only {other}s will do \({op}\)"):
            graph.apply(op, *[operand] * OPERATIONS[op].operands)
