"""The C++ that is printed: as written down, and of no optimizer in particular; what has none is refused with a reason.

The code of two optimizers lies as text in `golden/`, to be read. After a change that is meant to alter it,

    FUSEDBUN_WRITE_GOLDEN=1 python -m pytest tests/compiler/test_cpp.py

writes it anew, and `git diff` shows what the change does.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from rules import rule, stateful

import fusedbun
from fusedbun import Slot, chain, recipes
from fusedbun.compiler import UnschedulableError, trace
from fusedbun.compiler.cpp import native
from fusedbun.compiler.cpp.module import TYPES, emit
from fusedbun.hyper import NonNegative
from fusedbun.transforms import Decay, Momentum, RMSScale, ScaleByAdam, ScaleByLion, SM3Accumulate

GOLDEN = Path(__file__).parent / "golden"
SOURCES = Path(fusedbun.__file__).parent / "compiler"
WRITTEN = {
    "sm3": (recipes.sm3(), "float32"),
    "decoupled_lionw": (recipes.decoupled_lionw(weight_decay=1e-4, initial_lr=1e-4), "bfloat16"),
}
# `family` lists what is compiled beforehand, and is no part of how a kernel comes to be.
MODULES = sorted(
    p
    for p in (*SOURCES.glob("*.py"), *SOURCES.glob("cpp/*.py"), *(SOURCES / "cpp" / "runtime").iterdir())
    if p.is_file() and p.stem != "family"
)


def text_of(name):
    transforms, dtype = WRITTEN[name]
    return emit(trace(transforms, 2, dtype=dtype))


@pytest.mark.parametrize("name", WRITTEN)
def test_the_code_is_as_written_down(name):
    path = GOLDEN / f"{name}_{WRITTEN[name][1]}.cpp"
    if "FUSEDBUN_WRITE_GOLDEN" in os.environ:
        path.write_text(text_of(name))
    assert text_of(name) == path.read_text()


PRINT = """
import sys
sys.path[:0] = sys.argv[2:]
from test_cpp import text_of
print(text_of(sys.argv[1]), end="")
"""


@pytest.mark.parametrize("seed", ["0", "1"])
def test_the_code_is_the_same_in_every_process(seed):
    """Or a cache by its content would hold nothing."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    command = [sys.executable, "-c", PRINT, "sm3", *paths]
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    assert subprocess.check_output(command, env=environment, text=True) == text_of("sm3")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_what_makes_kernels_knows_no_optimizer(path):
    names = {*recipes.RECIPES, *(recipe.torch_class for recipe in recipes.RECIPES.values())}
    names |= {kind.__name__ for kind in vars(fusedbun.transforms).values() if isinstance(kind, type)}
    names |= {"sm3", "lion", "adam", "amsgrad", "momentum", "nesterov", "ternary", "optum", "u-?mup"}
    allowed = {"fusedbun", "sign", "vote", "decay"}  # the package, and words
    found = re.findall(
        rf"(?i)\b({'|'.join(sorted(name for name in names if name.lower() not in allowed))})\b", path.read_text()
    )
    assert found == []


def test_code_depends_on_the_mathematics_and_not_on_who_asks_for_it():
    class Other(SM3Accumulate):
        name: ClassVar[str] = "the_same_again"  # as long, or the columns of the comments would differ

    def code(accumulate):
        return emit(trace(chain(accumulate, RMSScale()), 2))

    assert code(Other(0.9)).replace("the_same_again.", "sm3_accumulate.") == code(SM3Accumulate(0.9))


def test_numbers_are_no_part_of_the_code():
    def code(beta, decay):
        return emit(trace(chain(Momentum(beta), Decay(decay)), 2))

    assert code(0.9, 0.1) == code(0.5, 3.0)
    assert code(0.9, 0.1) != code(0.9, 0.0)


def ways(transforms, ndim, order=None):
    """Which ways of going over memory there are."""
    (line,) = re.findall(r"const Kernel kernel = {(.*)};", emit(trace(transforms, ndim, order, dtype="float32")))
    return {name for name in ("flat", "rows", "packed", "columns") if f"&{name}::" in line or f"::{name}_" in line}


def test_there_is_every_way_that_suits_the_chain():
    assert ways(chain(ScaleByAdam()), 2) == ways(chain(ScaleByLion()), 4) == {"flat"}
    assert ways(recipes.sm3(), 1) == {"flat"}
    assert ways(recipes.sm3(), 2) == {"rows", "packed", "columns"}
    assert ways(recipes.sm3(), 4) == {"rows", "packed"}


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), 0.1, 1e-40, -3.0, 1e300])
def test_numbers_of_a_rule_are_written_to_the_last_bit(number):
    text = emit(trace(rule(lambda xp, u: xp.minimum(u, number)), 1, dtype="float64"))
    written = f"T({'-' if number < 0 else ''}INFINITY)" if abs(number) == float("inf") else f"T({number!r})"
    assert written in text


@dataclass(frozen=True)
class Listed(Decay):
    name: ClassVar[str] = "listed"
    choices: object = ()
    weight_decay: NonNegative = 0.5


BEHIND = stateful({"behind": Slot((1, 2))}, lambda xp, u, state: {"behind": xp.max(u, axis=(0,), keepdims=True)})


@pytest.mark.parametrize(
    ("transforms", "ndim", "order", "dtype", "reason"),
    [
        (
            rule(lambda xp, u: xp.arctan(u)),
            2,
            (0, 1),
            "float32",
            "^a rule uses xp.arctan, which the compiler does not know$",
        ),
        (
            rule(lambda xp, u: u - xp.sum(u, axis=(2,), keepdims=True)),
            3,
            (1, 0, 2),
            "float32",
            r"^a rule takes the sum over some, but not all, of the axes \[0, 2\], which follow the slowest in memory$",
        ),
        (
            BEHIND,
            3,
            (0, 2, 1),
            "float32",
            r"^the state rule.behind has the axes \[1, 2\], but in memory they follow as \[2, 1\]$",
        ),
        (
            recipes.sm3(),
            2,
            (0, 1),
            "int32",
            "^there are kernels for float32, float64, bfloat16, float16, but not for int32$",
        ),
        (
            chain(Listed(choices=[1])),
            2,
            (0, 1),
            "float32",
            "^a hyper-parameter that chooses code must be hashable: unhashable type: 'list'$",
        ),
    ],
    ids=["function", "sum", "order", "dtype", "hash"],
)
def test_what_has_no_kernel_is_refused_with_a_reason(transforms, ndim, order, dtype, reason):
    for _ in range(2):  # the second time from memory
        with pytest.raises(native.KernelError, match=reason):
            native.kernel(transforms, ndim, order, dtype)


def test_the_order_of_axes_is_refused_before_anything_is_compiled():
    with pytest.raises(UnschedulableError, match="but in memory they follow as"):
        emit(trace(BEHIND, 3, (0, 2, 1), dtype="float32"))
    for dtype in TYPES:
        emit(trace(BEHIND, 3, (0, 1, 2), dtype=dtype))


@pytest.mark.parametrize(
    ("array", "order"),
    [
        (np.zeros(()), ()),
        (np.zeros(5), (0,)),
        (np.zeros((4, 5)), (0, 1)),
        (np.zeros((4, 5)).T, (1, 0)),
        (np.zeros((4, 1)).T, (0, 1)),  # of axes that have one index, any order is right
        (np.zeros((6, 5))[::2, 1:3], (0, 1)),
        (np.zeros((2, 3, 4, 5)).transpose(0, 3, 1, 2), (0, 2, 3, 1)),
        (np.broadcast_to(np.zeros(5), (4, 5)), (1, 0)),
    ],
    ids=["scalar", "vector", "matrix", "transposed", "one row", "part", "channels last", "expanded"],
)
def test_the_order_of_axes_in_memory(array, order):
    assert native.memory_order(array.shape, array.strides) == order
