"""The realisations agree: torch by rules, by kernels and compiled, and jitted optax, with NumPy in float64."""

import numpy as np
import pytest
import torch
from cases import CASES, FEW, LR, expected, problem
from realisations import optax_jitted, torch_compiled, torch_definition, torch_kernel
from sweeps import sweep

import fusedbun
from fusedbun.reference import Reference

TOLERANCE = {"float64": 1e-12, "float32": 2e-6}  # relative to the leaf's largest update
OF_FUSEDBUN = [case for case in CASES if case.name.startswith("fusedbun ")]
ROUNDED = [case for case in OF_FUSEDBUN if case.name.split()[1] in ("recommended", "clipped", "lagged")]
REALISATIONS = [torch_definition, torch_kernel, optax_jitted, torch_compiled]
COMPILED = ("sm3-float64",)  # each takes torch seconds
FEWER = ("fusedbun recommended", "sm3 momentum", "mup_adamw amsgrad")


def is_short(case, dtype, realise):
    if realise is torch_compiled:
        return f"{case}-{dtype}" in COMPILED
    if realise is torch_definition:
        return True
    return case.name in (FEW if realise is torch_kernel and dtype == "float32" else FEWER)


@sweep(
    ("case", "dtype", "realise"),
    [(c, d, r) for c in CASES for d in TOLERANCE if d == "float64" or not c.cancels for r in REALISATIONS],
    short=is_short,
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_equals_the_reference(case, dtype, realise):
    *_, got = realise(case, dtype, *problem(dtype, case.ternary))
    want, largest = expected(case.name, dtype)
    error = {leaf: float(np.abs(got[leaf] - want[leaf]).max() / (largest[leaf] or 1.0)) for leaf in want}
    assert {leaf: e for leaf, e in error.items() if not e <= TOLERANCE[dtype]} == {}


@sweep("realise", REALISATIONS, short=lambda realise: realise is not torch_compiled)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@sweep("case", ROUNDED, short=lambda case: case.name in FEW, ids=str)
def test_low_precision_parameters_are_rounded_once(case, dtype, realise):
    """Each step ends at the exact result rounded to the parameter's dtype, or at a neighbour of it.

    A neighbour only where an update is larger than the parameter, which optax adds in the parameter's own dtype.
    """
    params, steps = problem(dtype)
    reference = Reference(params, case.chain, case.lr)
    for grads, got in zip(steps, realise(case, dtype, params, steps), strict=True):
        before = dict(reference.params)
        exact = reference.step(grads)
        for leaf in got:
            rounded = torch.tensor(exact[leaf]).to(getattr(torch, dtype)).double().numpy()
            largest = np.maximum(np.abs(before[leaf]), np.abs(rounded))
            unit = torch.finfo(getattr(torch, dtype)).eps * 2.0 ** np.floor(np.log2(largest))
            noise = TOLERANCE["float32"] * np.abs(exact[leaf] - before[leaf]).max()  # of computing in float32
            right = np.abs(got[leaf] - exact[leaf]) <= unit / 2 + noise
            large = np.abs(rounded - before[leaf]) > np.abs(before[leaf]) / 2
            assert (right | large).all(), leaf
            assert (np.abs(got[leaf] - rounded) <= unit + noise).all(), leaf
        reference.params = dict(got)


@sweep("case", OF_FUSEDBUN, short=lambda case: case.name in FEW, ids=str)
def test_a_chain_of_its_transformations_equals_the_class(case):
    dtype = "float32"
    params, steps = problem(dtype)
    *_, by_class = torch_kernel(case, dtype, params, steps)
    leaves = {name: torch.nn.Parameter(torch.tensor(p, dtype=torch.float32)) for name, p in params.items()}
    optimizer = fusedbun.ChainOptimizer(leaves.values(), list(case.chain), lr=LR)
    for grads in steps:
        for name, p in leaves.items():
            p.grad = torch.tensor(grads[name], dtype=torch.float32)
        optimizer.step()
    for name, p in leaves.items():
        np.testing.assert_array_equal(p.detach().numpy(), by_class[name], err_msg=name)
