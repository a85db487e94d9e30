"""`fusedbun.plan` beside what steps take in torch: the state to the byte, the temporaries at most."""

import ctypes
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from sweeps import sweep

import fusedbun
from fusedbun.compiler.cpp import native
from fusedbun.compiler.graph import UnschedulableError
from fusedbun.recipes import RECIPES
from fusedbun.tools.plan import Setting, temporaries
from fusedbun.tools.plan.settings import ADAMW, USUAL
from fusedbun.tools.shared.machine import peak_during

SMALL = {"matrix": (50, 70), "narrow": (40, 3), "vector": (70,), "kernel": (3, 4, 5, 6), "scalar": (), "empty": (0, 3)}
# Some for each way of going over memory: tiles of rows, of columns, packed rows, and every element for itself.
LARGE = {
    "rows": (9000, 700),
    "columns": (8, 400_000),
    "packed": (700_000, 5),
    "flat": (5000,),
    "kernel": (256, 128, 3, 3),
}
DTYPES = ("float32", "bfloat16", "float16", "float64")
# The pages that Python takes while it prepares a step, which the system counts in whole.
SLACK = 128 << 10
# An allocator that gives back at once what is freed, so that what is resident is what is held.
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "32768", "MALLOC_TRIM_THRESHOLD_": "32768"}


def by_name(setting):
    return f"{setting.optimizer} {setting.label}"


def made(setting, shapes, dtype, **own):
    """A torch optimizer with a gradient for each of its parameters, and what `plan` is to be told of it."""
    generator = torch.Generator().manual_seed(0)
    params = {}
    for name, shape in shapes.items():
        params[name] = torch.nn.Parameter(torch.randn(shape, generator=generator).sign().to(getattr(torch, dtype)))
        params[name].grad = torch.randn(shape, generator=generator).to(params[name].dtype)
    if setting.is_torch_adamw:
        return torch.optim.AdamW(list(params.values()), 1e-3, fused=True)
    recipe = RECIPES[setting.optimizer]
    typed = {"mup": lambda path, param: "norm"} if setting.optimizer.startswith("mup") else {}
    rate = {} if recipe.fixed_lr else {"lr": 1e-3}
    optimizer_class = getattr(fusedbun, recipe.torch_class)
    return optimizer_class(params.items(), **rate, **setting.hyperparameters, **typed, **own)


def state_bytes(optimizer):
    return sum(x.numel() * x.element_size() for state in optimizer.state.values() for x in state.values())


@pytest.mark.parametrize(("dtype", "rounding"), [*((dtype, False) for dtype in DTYPES), ("bfloat16", True)])
@pytest.mark.parametrize("setting", [s for s in USUAL if not s.is_torch_adamw], ids=by_name)
def test_the_state_is_what_torch_keeps(setting, dtype, rounding):
    optimizer = made(setting, SMALL, dtype, stochastic_rounding=rounding, implementation="definition")
    optimizer.step()
    planned = fusedbun.plan(SMALL, setting, dtype=dtype, stochastic_rounding=rounding).estimates
    assert [one.state for one in planned] == [state_bytes(optimizer)] * 2


@pytest.mark.parametrize("setting", [s for s in USUAL if not s.is_torch_adamw], ids=by_name)
def test_the_state_of_stacks_is_what_torch_keeps(setting):
    shapes = {"layers.up": (3, 5, 40), "layers.scale": (3, 7), "embed": (9, 7)}
    own = {"stacked": lambda path, param: int(path[0] == "layers")}
    optimizer = made(setting, shapes, "bfloat16", **own, stochastic_rounding=True, implementation="definition")
    optimizer.step()
    assert fusedbun.plan(shapes, setting, dtype="bfloat16", **own).estimates[0].state == state_bytes(optimizer)


@pytest.mark.parametrize("weights", ["float32", "param"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_state_of_torch_adamw(dtype, weights):
    setting, shapes = Setting(ADAMW, {"weights": weights}), {k: v for k, v in SMALL.items() if math.prod(v)}
    optimizer = made(setting, shapes, "float32" if weights == "float32" else dtype)
    optimizer.step()
    (planned,) = fusedbun.plan(shapes, setting, dtype=dtype).estimates
    params = optimizer.param_groups[0]["params"]
    assert planned.state == state_bytes(optimizer)
    assert planned.weights == sum(p.numel() * p.element_size() for p in params)
    assert planned.gradients == sum(p.grad.numel() * p.grad.element_size() for p in params)


@pytest.mark.parametrize("tokens", [100, 1000])
@pytest.mark.parametrize("setting", [s for s in USUAL if s.optimizer in ("sm3", "scaled_optum")], ids=by_name)
@pytest.mark.filterwarnings("ignore::UserWarning")  # the momentum that is left out
def test_the_state_and_the_gradient_of_a_sparse_embedding(setting, tokens):
    embedding = torch.nn.Embedding(300, 16, sparse=True)
    embedding(torch.randint(300, (tokens,))).sum().backward()
    grad = embedding.weight.grad
    optimizer = getattr(fusedbun, RECIPES[setting.optimizer].torch_class)(
        embedding.named_parameters(), 0.1, **setting.hyperparameters
    )
    optimizer.step()
    planned = fusedbun.plan(embedding, setting, sparse="weight", tokens=tokens).estimates[0]
    assert planned.state == state_bytes(optimizer)
    indices, values = grad._indices(), grad._values()
    assert planned.gradients == indices.numel() * 8 + values.numel() * 4


# ---- the plan of a kernel, as it was compiled

Index = ctypes.c_int64


class CompiledPlan(ctypes.Structure):
    """`Plan` in runtime/kernel.h."""

    _fields_ = [
        *((name, Index) for name in ("passes", "vectors", "scalars", "partial_vectors", "partial_scalars", "kept")),
        *((name, ctypes.c_void_p) for name in ("between", "begin", "run", "buffer")),
    ]


class CompiledKernel(ctypes.Structure):
    """`Kernel` in runtime/kernel.h."""

    _fields_ = [
        ("element", Index),
        ("lanes", Index),
        *((way, ctypes.POINTER(CompiledPlan)) for way in ("flat", "rows", "packed", "columns")),
    ]


class CompiledLeaf(ctypes.Structure):
    """`Leaf` in runtime/kernel.h."""

    _fields_ = [
        *((f"pointer{i}", ctypes.c_void_p) for i in range(6)),
        *((n, Index) for n in ("count", "axes", "rows", "columns")),
    ]


# Two kinds of statistics, and none.
COMPILED = [
    setting
    for setting in USUAL
    if setting.optimizer in ("sm3", "fusedbun", "mup_sgd")
    and setting.label.split()[-1] in ("momentum", "float32", "int8")
]
SHAPED = {"rows": (900, 700), "columns": (8, 40_000), "packed": (7000, 5), "flat": (5000,)}


@pytest.mark.parametrize("way", SHAPED)
@pytest.mark.parametrize("setting", COMPILED, ids=by_name)
def test_the_sizes_are_those_of_the_compiled_kernel(setting, way):
    shape = SHAPED[way]
    chain = setting.chain(False).at(("w",), SimpleNamespace(shape=shape), "w")
    kernel = native.kernel(chain, len(shape), tuple(range(len(shape))), "float32")
    compiled = CompiledKernel.from_address(kernel.address)
    program = temporaries._program(chain, len(shape), "float32")
    has = {name: bool(getattr(compiled, name)) for name in SHAPED}
    assert (program.is_flat, program.has_packed, program.columns is not None) == (
        has["flat"],
        has["packed"],
        has["columns"],
    )
    way = "flat" if program.is_flat else way if has[way] else "rows"
    plan = getattr(compiled, way).contents
    sizes = program.columns if way == "columns" else program.rows
    assert sizes[:5] == (plan.vectors, plan.scalars, plan.partial_vectors, plan.partial_scalars, plan.kept)
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, shape[0])
    leaf = CompiledLeaf(rows=rows, columns=columns)
    buffer = ctypes.CFUNCTYPE(Index, ctypes.POINTER(CompiledLeaf))(plan.buffer)(leaf)
    register = compiled.lanes * compiled.element
    assert temporaries._room(program, rows, columns, compiled.element, register).buffer == buffer
    assert temporaries.room(chain, shape, "float32").buffer >= buffer


# ---- what a step takes

MEASURED = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(int(sys.argv[2]))
from test_memory_measured import measured
print(json.dumps(measured(*json.loads(sys.argv[3]))))
"""


def measured(names, dtypes, implementation):
    """What a step of each setting takes, and what is planned for it: [setting, dtype, measured, planned]."""
    threads, found = torch.get_num_threads(), []
    for setting in (s for s in USUAL if by_name(s) in names):
        for dtype in dtypes:
            rounding = dtype == "bfloat16"
            own = {"stochastic_rounding": rounding, "implementation": implementation}
            optimizer = made(setting, LARGE, dtype, **own)
            optimizer.step()
            optimizer.step()
            (planned, *_) = fusedbun.plan(LARGE, setting, dtype=dtype, threads=threads).estimates
            found.append((by_name(setting), dtype, peak_during(optimizer.step), planned.temporaries))
    return found


def of_a_process(threads, *arguments):
    root = os.path.dirname(__file__)
    command = [sys.executable, "-c", MEASURED, root, str(threads), json.dumps(arguments)]
    environment = {**os.environ, **RETURNING, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


EVERY = [by_name(setting) for setting in USUAL]


@pytest.mark.skipif(peak_during(lambda: None) is None, reason="the system does not say what a process holds")
@sweep(
    ("threads", "names"),
    [(1, ["sm3 momentum int8"]), (1, EVERY), (2, EVERY)],
    short=lambda threads, names: names is not EVERY,
    ids=lambda x: str(x) if isinstance(x, int) else "every" if x is EVERY else "few",
)
def test_a_step_takes_no_more_than_is_planned(threads, names):
    found = of_a_process(threads, names, ["float32", "bfloat16"], None)
    assert len(found) == 2 * len(names)
    assert not [one for one in found if one[2] > one[3] + SLACK]
    if threads == 1:  # several threads need not hold the most that they might at a time
        assert not [one for one in found if one[3] > 4 << 20 and one[2] < 0.9 * one[3]]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("setting", [s for s in USUAL if not s.is_torch_adamw], ids=by_name)
def test_the_definition_takes_no_more_than_is_planned(setting, dtype):
    if peak_during(lambda: None) is None:
        pytest.skip("the system does not say what a process holds")
    shape = (1000, 500)
    optimizer = made(setting, {"w": shape}, dtype, implementation="definition")
    optimizer.step()
    optimizer.step()
    chain = setting.chain(False).at(("w",), SimpleNamespace(shape=shape), "w")
    assert peak_during(optimizer.step) <= temporaries.definition(chain, shape, dtype) + 16 * SLACK


def test_what_no_kernel_steps_is_planned_as_the_definition():
    setting = next(s for s in USUAL if by_name(s) == "fusedbun momentum int8")
    chain = setting.chain(False).at(("w",), SimpleNamespace(shape=(9, 9)), "w")
    with pytest.raises(UnschedulableError):
        temporaries.room(chain, (9, 9), "float64")
    (planned, _) = fusedbun.plan({"w": (9, 9)}, setting, dtype="float64").estimates
    assert planned.temporaries == temporaries.definition(chain, (9, 9), "float64")
