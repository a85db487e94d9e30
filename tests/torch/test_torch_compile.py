"""`torch.compile` of a step: the eager numbers, and one graph however the learning rate moves."""

import pytest
import torch
from makers import MAKERS, assert_same, copies, parameters, run, set_gradients
from sweeps import long, only, sweep
from torch._dynamo.utils import counters


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
    optimizer, eager = MAKERS[name](params, lr=0.1), MAKERS[name](copies(params), lr=0.1)
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
