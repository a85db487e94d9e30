"""`torch.compile` of a step: the eager numbers, and one graph however the learning rate moves."""

import inspect

import pytest
import torch
from makers import MAKERS, assert_same, copies, parameters, run, set_gradients
from sweeps import NOISY, long, only, sweep
from torch._dynamo.utils import counters
from torch.optim.lr_scheduler import LinearLR

from fusedbun import FusedbunW


@pytest.fixture(autouse=True)
def compiler():
    """A compiler without graphs, which must not compile one twice."""
    torch.compiler.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch.compiler.reset()


# Every class of the table once, or what stands for it; the others differ from these in hyper-parameters.
COMPILED = [
    "fusedbun-recommended",
    "fusedbun-clipped-lagged",
    "sm3-momentum",
    "scaled-optum",
    "mup-adam",
    "mup-sgd",
    "decoupled-lionw",
]


@sweep("name", COMPILED, short=only("mup-adam"))  # each graph takes seconds to compile
def test_a_compiled_step_is_the_eager_step_in_one_graph(name):
    """With a float as learning rate and with a tensor, each set anew at every step; 0-d parameters included."""
    params = parameters((), (5,), (4, 3), (2, 3, 4), dtype=torch.float64)
    optimizer = MAKERS[name](params, lr=0.1, implementation="definition")
    eager = MAKERS[name](copies(params), lr=0.1)
    step, others = torch.compile(optimizer.step), eager.param_groups[0]["params"]
    rates = [0.1, 0.05, 0.2, 0.0, 0.1, 0.15]
    for index, rate in enumerate(rates):
        (group,), (wanted,) = optimizer.param_groups, eager.param_groups
        wanted["lr"] = rate
        if index < 3:
            group["lr"] = rate
        elif index == 3:
            group["lr"] = torch.tensor(rate, dtype=torch.float64)
        else:
            group["lr"].fill_(rate)
        before = [p.detach().clone() for p in params]
        set_gradients(params, index)
        set_gradients(others, index)
        step()
        eager.step()
        assert all(bool((p != b).any()) == (rate > 0) for p, b in zip(params, before, strict=True))
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(dict(optimizer.state[p]), dict(eager.state[q]), rtol=1e-12, atol=1e-14)
    assert counters["stats"]["unique_graphs"] == 1

    # What is checked in eager steps is checked in compiled ones.
    group["lr"] = -0.5
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=r"lr must lie in \[0, inf\), but it is -0.5"):
        step()
    assert_same([p.detach() for p in params], before)


def train(optimizer, params, steps, in_one):
    """Steps under a schedule in code that is compiled: a whole training step, or `step` by itself; and its graphs."""
    graphs = 0

    def counted(graph, _):
        nonlocal graphs
        graphs += 1
        return graph

    def one_step():
        if in_one:
            sum((p * p.detach().cos()).sum() for p in params).backward()
        optimizer.step()
        if in_one:
            optimizer.zero_grad()

    compiled, schedule = torch.compile(one_step, backend=counted), LinearLR(optimizer, total_iters=steps)
    for step in range(steps):
        if not in_one:
            set_gradients(params, step)
        compiled()
        schedule.step()
    return graphs


def with_codes(name):
    """The optimizer's settings: as it is, and with its momentum in every code that it takes."""
    takes = "momentum_dtype" in inspect.signature(getattr(MAKERS[name], "func", MAKERS[name])).parameters
    codes = [code for code in NOISY if takes and (name, code) != ("decoupled-lionw", "int4")]  # too coarse for it
    return [{}, *({"momentum_dtype": code} for code in codes)]


@pytest.mark.parametrize("in_one", [True, False], ids=["training step", "step"])
@sweep(
    ("name", "code"),
    [(name, code) for name in MAKERS for code in with_codes(name)],
    short=lambda name, code: name == "fusedbunw" or not code,
    ids=lambda x: x if isinstance(x, str) else x.get("momentum_dtype", "computed"),
)
def test_a_step_in_code_that_is_compiled(name, code, in_one):
    """Kernels step it, so that the compiler is left with forward and backward, and compiles those once."""
    params = parameters((5,), (4, 3), (2, 3, 33))
    others = copies(params)
    assert train(MAKERS[name](params, lr=0.1, **code), params, 20, in_one) <= 2
    eager = MAKERS[name](others, lr=0.1, **code)
    schedule = LinearLR(eager, total_iters=20)
    for step in range(20):
        if in_one:
            sum((p * p.detach().cos()).sum() for p in others).backward()
        else:
            set_gradients(others, step)
        eager.step()
        eager.zero_grad()
        schedule.step()
    assert_same([p.detach() for p in params], [p.detach() for p in others])


def test_many_parameters_take_no_more_graphs():
    params = parameters(*[(3, 4)] * 300)
    assert train(FusedbunW(params, lr=0.1), params, 5, in_one=False) <= 2


@sweep("code", NOISY, short=only("int8"))
def test_the_definition_rounds_in_one_graph(code):
    """What draws noise and packs bits breaks no graph."""
    params = parameters((5,), (4, 33))
    others = copies(params)
    optimizer = FusedbunW(params, lr=0.1, momentum_dtype=code, implementation="definition")
    assert train(optimizer, params, 4, in_one=False) == 1
    eager = FusedbunW(others, lr=0.1, momentum_dtype=code, implementation="definition")
    schedule = LinearLR(eager, total_iters=4)
    for step in range(4):
        set_gradients(others, step)
        eager.step()
        schedule.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


@long
@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="other versions of torch may have mended it")
def test_why_0d_parameters_are_stepped_eagerly():
    """Compiled, torch 2.13 drops in-place changes of 0-d float64 tensors on the CPU: its own Adam does not move one."""
    compiled, eager = (parameters((), (2,), dtype=torch.float64) for _ in range(2))
    optimizers = [torch.optim.Adam(params, lr=0.1) for params in (compiled, eager)]
    step, before = torch.compile(optimizers[0].step), [p.detach().clone() for p in compiled]
    set_gradients(compiled, 0)
    step()
    run(optimizers[1], 1)
    torch.testing.assert_close(compiled[1], eager[1], rtol=1e-5, atol=0.0)  # its bias correction is float32
    assert (eager[0] - before[0]).abs() > 0.09
    assert_same(compiled[0].detach(), before[0])


def test_metrics_of_a_compiled_step():
    found = []
    for compiled in (False, True):
        params = parameters((3, 40), (5,))
        optimizer = FusedbunW([(str(i), p) for i, p in enumerate(params)], lr=0.1, seed=1)
        optimizer.record_metrics = True
        step = torch.compile(optimizer.step) if compiled else optimizer.step
        for index in range(2):
            set_gradients(params, index)
            step()
        metrics = {}
        for i, p in enumerate(params):
            optimizer.report_per_parameter_metrics(p, str(i), metrics)
        found.append(metrics)
    assert len(found[0]) == 12
    torch.testing.assert_close(found[1], found[0])
