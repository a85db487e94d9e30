"""The implementations of a step: all do what the definition does, whatever tensors they meet and whatever changes."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from cases import CASES, FEW, SHAPES, problem
from makers import MAKERS, SM3_CHAIN, assert_same, assert_same_run, parameters, run, set_gradients, unchanged
from sweeps import only, sweep
from torch._dynamo.utils import counters
from twins import (
    FAST,
    STEPPED,
    assert_near,
    assert_near_run,
    each_fast,
    each_make,
    everything,
    is_exact,
    sweep_of_makes,
    twins,
)

from fusedbun import SM3, ChainOptimizer, DecoupledLionW, Fusedbun, ScaledOptum, Signal, Slot, Transform
from fusedbun.compiler.cpp import build, native
from fusedbun.compiler.cpp.native import KernelError
from fusedbun.torch import IMPLEMENTATIONS, dispatch, openmp
from fusedbun.torch.overlap import Written, check_overlap


@sweep("case", CASES, short=lambda case: case.name in FEW, ids=str)
def test_is_the_definition(case):
    """To the last bit where every operation is rounded alike."""
    dtype = "float64" if case.cancels else "float32"
    start, steps = problem(dtype, case.ternary)
    leaves = {}
    optimizers = {}
    for name in ("definition", *FAST):
        leaves[name] = {k: torch.nn.Parameter(torch.tensor(x, dtype=getattr(torch, dtype))) for k, x in start.items()}
        optimizers[name] = case.torch(leaves[name].values(), implementation=name)
        for grads in steps[:3]:
            for k, p in leaves[name].items():
                p.grad = torch.tensor(grads[k], dtype=p.dtype)
            optimizers[name].step()
    for name in FAST:
        for k, p in leaves[name].items():
            q = leaves["definition"][k]
            found, wanted = ([x.detach(), *optimizers[i].state[x].values()] for i, x in ((name, p), ("definition", q)))
            if is_exact(case.chain.at((), p), p.ndim):
                assert_same(found, wanted)
            else:
                assert_near(found, wanted)


# The argument


@pytest.mark.parametrize("value", ["fast", "Kernel", "", 1, True])
def test_another_name_is_refused(value):
    with pytest.raises(ValueError, match=rf"Fusedbun: implementation must be one of 'kernel', .*, but it is {value!r}"):
        Fusedbun(parameters((2,)), 0.1, implementation=value)
    with pytest.raises(ValueError, match="ChainOptimizer: implementation must"):
        ChainOptimizer(parameters((2,)), SM3_CHAIN, 0.1, implementation=value)


@pytest.mark.parametrize("name", [None, *IMPLEMENTATIONS])
def test_is_the_optimizers_own_and_is_not_saved_with_its_state(name):
    optimizer = Fusedbun(parameters((2,)), 0.1, implementation=name)
    assert optimizer.implementation == name
    assert "implementation" not in {**optimizer.defaults, **optimizer.param_groups[0]}
    assert [clone.implementation for clone in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)))] == [
        name
    ] * 2
    other = Fusedbun(parameters((2,)), 0.1, implementation="definition")
    other.load_state_dict(optimizer.state_dict())
    assert other.implementation == "definition"


# Tensors

LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "sliced": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "strided": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
}
GRADIENTS = {
    **LAYOUTS,
    "expanded": lambda x: x[:1, :1].expand(x.shape),
    "repeated": lambda x: x[..., :1].expand(x.shape),
}


@pytest.mark.parametrize("of_gradient", GRADIENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@sweep_of_makes
def test_layouts(make, layout, of_gradient):
    """Of a parameter and of its gradients, the one whatever the other is."""
    (plain,) = parameters((3, 4, 5, 2))
    param = LAYOUTS[layout](plain).detach().requires_grad_()
    optimizer, wanted = (
        make([param], lr=0.1, implementation="kernel"),
        make([plain], lr=0.1, implementation="definition"),
    )
    for step in range(2):
        set_gradients([plain], step)
        plain.grad = GRADIENTS[of_gradient](plain.grad)
        param.grad = plain.grad
        optimizer.step()
        wanted.step()
    assert_near_run(optimizer, wanted)


@each_fast
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@sweep_of_makes
def test_dtypes(make, dtype, implementation):
    """Almost every number of a smaller dtype is the same; the rest are its neighbours."""
    optimizer, wanted = twins(make, parameters(*SHAPES.values(), dtype=dtype), implementation)
    for step in range(3):
        for o in (optimizer, wanted):
            run(o, range(step, step + 1))
        pairs = [x.param_groups[0]["params"] for x in (optimizer, wanted)]
        for p, q in zip(*pairs, strict=True):
            torch.testing.assert_close(
                p, q, rtol=max(1e-12, torch.finfo(dtype).eps), atol=1e-6 if dtype != torch.float64 else 1e-12
            )
            p.data.copy_(q.detach())


def sparse_rows(param):
    param.grad = torch.sparse_coo_tensor([[1, 3]], torch.ones(2, *param.shape[1:]), param.shape, check_invariants=True)


def of_another_dtype(param):
    param.grad.data = param.grad.data.double()


def negated(param):
    param.grad = torch._neg_view(-param.grad)
    assert param.grad.is_neg()


class Halved(torch.Tensor):
    """A tensor that says what it is made of in its own way."""

    def to(self, *args, **kwargs):
        return 2 * self.as_subclass(torch.Tensor)


def of_a_subclass(param):
    param.grad = param.grad.as_subclass(Halved)


UNUSUAL = {"sparse": sparse_rows, "another dtype": of_another_dtype, "negated": negated, "subclass": of_a_subclass}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_what_kernels_do_not_serve_is_stepped_beside_what_they_do_without_a_word(kind):
    optimizers = [
        ChainOptimizer(parameters((4, 3), (5, 2), (0,)), SM3_CHAIN[:2], 0.1, implementation=i)
        for i in (None, "definition")
    ]
    for step in range(3):
        for optimizer in optimizers:
            params = optimizer.param_groups[0]["params"]
            set_gradients(params, step)
            if step or kind == "sparse":  # all gradients are, or none
                UNUSUAL[kind](params[0])
            optimizer.step()
    assert_near_run(*optimizers)
    for state in optimizers[1].state.values():
        assert state


def test_a_parameter_cut_short_in_its_place_is_seen():
    params = parameters((4, 3), (5,))
    optimizer = ScaledOptum(params)
    run(optimizer, 2)
    params[0].data = params[0].data[:3]
    with unchanged(optimizer), pytest.raises(ValueError, match=r"the gradient of parameter 0 .* has shape \(4, 3\)"):
        optimizer.step()


def filled(value, number):
    if isinstance(value, list):
        value[:] = [number, number]
    else:
        value[...] = number


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (Fusedbun, "momentum_beta", torch.tensor(0.25)),
        (Fusedbun, "momentum_beta", np.array(0.25)),
        (DecoupledLionW, "betas", [0.25, 0.25]),
    ],
    ids=["tensor", "array", "list"],
)
def test_hyper_parameters_that_are_changed_in_place(make, name, value):
    optimizer, wanted = twins(make, parameters((4, 3)), None, **{name: value})
    for number in (0.25, 0.75, 0.5):
        filled(value, number)
        wanted.param_groups[0][name] = (number, number) if name == "betas" else number
        run(optimizer, 2)
        run(wanted, 2)
        assert_near_run(optimizer, wanted)


def test_kernels_take_no_tensors_but_for_a_learning_rate():
    optimizer = Fusedbun(parameters((4, 3)), torch.tensor(0.1), eps=torch.tensor(0.1), implementation="kernel")
    with pytest.raises(KernelError, match="one of its hyper-parameters is a tensor"):
        run(optimizer, 1)


# Memory that is shared


def test_interleaved_views_of_one_tensor_are_parameters_of_their_own():
    whole = parameters((8, 6))[0].detach()
    views = [whole[::2, :3], whole[1::2, :3], whole[:, 3:].T]
    optimizer, wanted = twins(Fusedbun, [v.requires_grad_() for v in views], use_rms=True)
    run(optimizer, 3)
    run(wanted, 3)
    assert_near_run(optimizer, wanted)


def expanded(whole):
    return [whole[:1].expand(4, 6)], "parameter 0 of group 0 has several elements in one place"


def overlapping(whole):
    return [whole[:5], whole[4:]], "parameter 0 of group 0 and parameter 1 of group 0 share memory"


@pytest.mark.parametrize("make", [expanded, overlapping])
def test_parameters_that_overlap_are_refused(make):
    views, message = make(parameters((8, 6))[0].detach())
    optimizer = SM3([v.requires_grad_() for v in views])
    set_gradients(views, 0)
    with unchanged(optimizer), pytest.raises(ValueError, match=message):
        optimizer.step()


def test_a_gradient_or_a_state_in_a_parameters_memory_is_refused():
    p, q = parameters((4, 3), (4, 3))
    optimizer = DecoupledLionW([p, q])
    set_gradients([p, q], 0)
    q.grad = p.detach()
    with unchanged(optimizer), pytest.raises(ValueError, match="the gradient of parameter 1 of group 0 share memory"):
        optimizer.step()
    run(optimizer, 1)
    optimizer.state[q]["scale_by_lion.moment"] = optimizer.state[p]["scale_by_lion.moment"]
    with unchanged(optimizer), pytest.raises(ValueError, match=r"the state 'scale_by_lion.moment' of .* share memory"):
        optimizer.step()


def test_overlap_is_found_exactly():
    """Against counting, for random strides."""
    rng = np.random.default_rng(0)
    memory = torch.zeros(60)
    found = {True: 0, False: 0}
    for _ in range(400):
        places, views = [], []
        for _ in range(2):
            shape, strides = rng.integers(1, 4, 3).tolist(), rng.integers(0, 6, 3).tolist()
            views.append(torch.as_strided(memory, shape, strides, int(rng.integers(0, 12))))
            places.append(
                (torch.as_strided(torch.arange(60), shape, strides, views[-1].storage_offset())).flatten().tolist()
            )
        overlaps = any(len(set(p)) < len(p) for p in places) or bool(set(places[0]) & set(places[1]))
        found[overlaps] += 1
        try:
            check_overlap([Written("a", views[0]), Written("b", views[1])])
        except ValueError:
            assert overlaps, views
        else:
            assert not overlaps, views
    assert min(found.values()) > 20
    check_overlap([Written("a", memory, is_written=False), Written("b", memory, is_written=False)])


# Threads, and autograd


@pytest.mark.parametrize("name", ["fusedbun-recommended", "fusedbun-clipped-lagged", "sm3-momentum", "mup-adamw"])
def test_any_number_of_threads_gives_the_same_bits(name):
    optimizers = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            optimizers.append(
                MAKERS[name](parameters((700, 300), (3, 70_000), (5,), (100_000,)), lr=0.1, implementation="kernel")
            )
            run(optimizers[-1], 2)
    finally:
        torch.set_num_threads(1)
    for other in optimizers[1:]:
        assert_same_run(optimizers[0], other)


def test_threads_are_torchs_own_where_it_has_openmp():
    assert bool(openmp.parallel()) == ("libgomp" in openmp.MAPS.read_text())


@each_fast
def test_backward_through_what_has_been_stepped_is_refused(implementation):
    params = parameters((4, 3), (5,))
    optimizer = Fusedbun(params, 0.1, implementation=implementation)
    run(optimizer, 2)
    loss = params[0].square().sum()
    versions = [x._version for x in everything(optimizer)]
    params[1].grad = None
    optimizer.step()
    changed = [x._version > version for x, version in zip(everything(optimizer), versions, strict=True)]
    count = 1 + len(optimizer.state[params[0]])
    assert changed == [True] * count + [False] * (len(changed) - count)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Where there is no kernel


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    """A machine without a compiler, for which nothing has been compiled."""
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    monkeypatch.setattr(build, "_in_bundle", lambda *args: None)
    monkeypatch.setattr(build, "BUILT", tmp_path)
    monkeypatch.setenv("FUSEDBUN_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_KERNELS", {})


@pytest.mark.usefixtures("no_compiler")
@each_make
def test_without_a_compiler_it_says_so_once_and_gives_the_same_numbers(make):
    optimizer, wanted = twins(make, parameters((), (5,), (4, 3), (2, 3, 4)), None)
    with pytest.warns(UserWarning, match="longer than they need to, for there is no C.. compiler: install") as warned:
        run(optimizer, 2)
    assert len(warned) == 1
    assert warned[0].filename.endswith("makers.py")  # the line that called step
    run(wanted, 2)
    assert_near_run(optimizer, wanted)
    run(copy.deepcopy(optimizer), 1)


@pytest.mark.usefixtures("no_compiler")
def test_a_kernel_that_was_asked_for_and_cannot_be_is_an_error():
    optimizer = Fusedbun(parameters((5,)), 0.1, implementation="kernel")
    set_gradients(optimizer.param_groups[0]["params"], 0)
    message = "Fusedbun: implementation='kernel' cannot step parameter 0 of group 0: there is no C.. compiler"
    with unchanged(optimizer), pytest.raises(KernelError, match=message):
        optimizer.step()
    assert not optimizer.state


@dataclass(frozen=True)
class Sorted(Transform):
    """A rule that no plan knows."""

    name: ClassVar[str] = "sorted"
    table: Any = None

    def slots(self, shape):
        return {"last": Slot.full(len(shape))}

    def update(self, xp, signal, state, param):
        return Signal(signal.update.flip(0) + state["last"]), {"last": signal.update}


@pytest.mark.parametrize("table", [None, [1.0]], ids=["unplannable", "unhashable"])
def test_a_chain_that_cannot_be_planned(table):
    optimizer = ChainOptimizer(parameters((4, 3)), [Sorted(table)], 0.1)
    with pytest.warns(UserWarning, match="longer than they need to, for") as warned:
        run(optimizer, 3)
    assert len(warned) == 1
    wanted = ChainOptimizer(parameters((4, 3)), [Sorted(table)], 0.1, implementation="definition")
    run(wanted, 3)
    assert_same_run(optimizer, wanted)
    for implementation in FAST:
        optimizer = ChainOptimizer(parameters((4, 3)), [Sorted(table)], 0.1, implementation=implementation)
        with pytest.raises(KernelError, match=f"implementation='{implementation}' cannot step parameter 0 of group 0"):
            run(optimizer, 1)


def test_a_leaf_that_kernels_do_not_serve_is_an_error_where_they_were_asked_for():
    optimizer = Fusedbun(parameters((4, 3)), 0.1, implementation="kernel")
    set_gradients(optimizer.param_groups[0]["params"], 0)
    of_another_dtype(optimizer.param_groups[0]["params"][0])
    with pytest.raises(KernelError, match=r"its gradient is torch\.float64, but it is torch\.float32"):
        optimizer.step()


def test_the_best_of_each_device():
    assert dispatch.BEST == {"cpu": ("kernel", "tiles", "definition"), "cuda": ("compiled", "tiles", "definition")}
    assert dispatch.ELSEWHERE == ("tiles", "definition")


@sweep("name", STEPPED, short=only("scaled-optum"))  # each graph takes seconds to compile
def test_compiled(name):
    """By torch, when that was asked for: one graph, however the learning rate moves."""
    torch.compiler.reset()
    counters.clear()
    optimizer, wanted = twins(MAKERS[name], parameters((), (5,), (4, 3), dtype=torch.float64), "compiled")
    for step, rate in enumerate((0.1, 0.2, 0.05)):
        for o in (optimizer, wanted):
            o.param_groups[0]["lr"] = rate
            run(o, range(step, step + 1))
    for x, y in zip(everything(optimizer), everything(wanted), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)
    assert counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()
