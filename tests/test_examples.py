"""The examples do what they say, as their users run them."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from sweeps import only, sweep

EXAMPLES = Path(__file__).parent.parent / "examples"
LINE = re.compile(r"(\w+) +test accuracy (\d+\.\d+)%   weights: (.+)")
STATED = re.compile(r"at least (\d+)%")
FOUND = re.compile(r"^test accuracy (\d+\.\d+)%$", re.MULTILINE)
TRAINING = ("flax_linen", "flax_nnx", "hf_accelerate", "hf_trainer", "lightning_digits", "optax_wrappers")
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
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted([*TRAINING, "ternary"])


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


@sweep("name", TRAINING, short=only("hf_accelerate"))
def test_it_trains_to_the_accuracy_that_it_states(name, tmp_path):
    path = EXAMPLES / f"{name}.py"
    (stated,) = STATED.findall(path.read_text())
    warnings = "default" if name == "lightning_digits" else "error"  # Lightning calls what torch has deprecated
    done = run("-W", warnings, path, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (accuracy,) = FOUND.findall(done.stdout)
    assert float(accuracy) >= float(stated)  # three seeds gave 1.1 points more, and above
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


@pytest.mark.parametrize("name", TRAINING)
def test_it_is_short_and_one_line_of_it_is_about_the_optimizer(name):
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    assert len(lines) <= 40
    ours = [line for line in lines if "fusedbun" in line.lower()]
    assert [line for line in ours if line.startswith(("import ", "from "))] == ours[:1]
    assert len(ours) == 2
