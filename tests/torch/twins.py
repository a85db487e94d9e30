"""Optimizers of one kind on equal parameters, and how near their runs are, for the tests of implementations."""

from __future__ import annotations

import pytest
import torch
from makers import MAKERS, copies
from sweeps import sweep

from fusedbun.compiler.graph import Span
from fusedbun.compiler.trace import trace, used

FAST = ("kernel", "tiles")
TOLERANCE = 2e-6  # of the largest number, as for the reference in test_equivalence.py
each_fast = pytest.mark.parametrize("implementation", FAST)
# Several passes over memory; sums over all of a parameter; elementwise steps, without state and with a counter
STEPPED = ("fusedbun-recommended", "fusedbun-clipped-lagged", "sm3-momentum", "scaled-optum", "mup-adamw")
each_make = pytest.mark.parametrize("make", [MAKERS[name] for name in STEPPED], ids=STEPPED)
# For what needs kernels that do not come with the package: each takes a second to compile
FEW = [MAKERS["fusedbun-recommended"], MAKERS["mup-adamw"]]
sweep_of_makes = sweep("make", [MAKERS[name] for name in STEPPED], short=lambda make: make in FEW, ids=STEPPED)


def is_exact(chain, ndim):
    """Whether every operation of a step is rounded alike everywhere: no sums, and no functions.

    Not even a root: torch's is MKL's on some machines, and off by the last bit.
    """
    values = used(trace(chain, ndim).outputs.values())
    return not any(v.span > Span.HOST and (v.detail == "sum" or v.op in ("sqrt", "expm1", "log")) for v in values)


def assert_near(found, wanted):
    """Equal up to float32's rounding, relative to the largest number of each tensor."""
    for x, y in zip(found, wanted, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        torch.testing.assert_close(x, y, rtol=0, atol=TOLERANCE * float(y.abs().max()) if y.numel() else 0)


def everything(optimizer):
    """The parameters and the state."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [x for p in params for x in (p.detach(), *optimizer.state[p].values())]


def assert_near_run(optimizer, other):
    assert [list(s) for s in optimizer.state.values()] == [list(s) for s in other.state.values()]
    assert_near(everything(optimizer), everything(other))


def twins(make, params, implementation="kernel", **options):
    """Two optimizers over equal parameters: by an implementation, and by the definition."""
    return [
        make(p, lr=0.1, implementation=i, **options)
        for p, i in ((params, implementation), (copies(params), "definition"))
    ]
