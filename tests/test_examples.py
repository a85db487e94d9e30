"""The examples do what they say, as their users run them."""

import math
import os
import re
import runpy
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from sweeps import only, sweep

EXAMPLES = Path(__file__).parent.parent / "examples"
LINE = re.compile(r"(\w+) +test accuracy (\d+\.\d+)%   weights: (.+)")
STATED = re.compile(r"at least (\d+)%")
FOUND = re.compile(r"^test accuracy (\d+\.\d+)%$", re.MULTILINE)
IN_ADAMWS_PLACE = ("flax_linen", "flax_nnx", "hf_accelerate", "hf_trainer", "lightning_digits", "torch_digits")
# A network of this size is slower on two threads than on one, far slower where others use the cores too.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(*command, cwd=None):
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env={**os.environ, **ENVIRONMENT},
    )


def test_every_example_is_run():
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted(
        [*IN_ADAMWS_PLACE, "optax_wrappers", "ternary"]
    )


@sweep("framework", ["torch", "flax"], short=only("torch"))
def test_ternary_networks_come_near_their_float_twin(framework, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ternary.py", "--framework", framework])
    runpy.run_path(str(EXAMPLES / "ternary.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert err == ""
    found = {method: (float(percent), kinds) for method, percent, kinds in LINE.findall(out)}
    assert list(found) == ["float", "latent", "vote"]
    twin, _ = found.pop("float")
    for accuracy, kinds in found.values():  # seeds 0 to 4 gave 96.3% and more, 1.9 points below the twin at the most
        assert kinds == "-1 +0 +1"
        assert accuracy >= 90
        assert accuracy > twin - 5


@sweep(
    ("name", "optimizer"),
    [*product(IN_ADAMWS_PLACE, ("adamw", "fusedbunw")), ("optax_wrappers", None)],
    short=only(("torch_digits", "fusedbunw")),
)
def test_it_trains_to_the_accuracy_that_it_states(name, optimizer, tmp_path):
    """With either optimizer to the same one: they differ by less than the test images can tell apart."""
    path = EXAMPLES / f"{name}.py"
    (stated,) = STATED.findall(path.read_text())
    warnings = "default" if name == "lightning_digits" else "error"  # Lightning calls what torch has deprecated
    done = run("-W", warnings, path, *(("--optimizer", optimizer) if optimizer else ()), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (accuracy,) = FOUND.findall(done.stdout)
    assert float(accuracy) >= float(stated)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


@pytest.mark.long
@pytest.mark.parametrize("name", IN_ADAMWS_PLACE)
def test_in_adamws_place_fusedbunw_comes_to_the_same_accuracy(name, tmp_path):
    """To within two standard deviations of the difference of two such shares of 540 images."""
    path = EXAMPLES / f"{name}.py"
    usual, ours = (
        float(*FOUND.findall(run("-W", "ignore", path, *given, cwd=tmp_path).stdout)) / 100
        for given in ((), ("--optimizer", "fusedbunw"))
    )
    assert abs(usual - ours) <= 2 * math.sqrt(2 * usual * (1 - usual) / 540)


@pytest.mark.parametrize("name", [*IN_ADAMWS_PLACE, "optax_wrappers"])
def test_it_is_short_and_one_expression_of_it_is_about_the_optimizer(name):
    _, _, code = (EXAMPLES / f"{name}.py").read_text().partition('"""\n\n')
    lines = code.splitlines()
    assert len(lines) <= 45
    ours = [line for line in lines if "fusedbun" in line.lower()]
    assert [line for line in ours if line.startswith(("import ", "from "))] == ours[:1]
    assert len(ours) == 2
    assert ours[1].startswith("OPTIMIZERS = ") == (name in IN_ADAMWS_PLACE)
