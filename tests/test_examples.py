"""The examples do what they say, as their users run them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
LINE = re.compile(r"(\w+) +test accuracy (\d+\.\d+)%   weights: (.+)")


@pytest.mark.parametrize("framework", ["torch", "flax"])
def test_ternary_networks_come_near_their_float_twin(framework):
    command = [sys.executable, "-W", "error", EXAMPLES / "ternary.py", "--framework", framework]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    found = {method: (float(percent), kinds) for method, percent, kinds in LINE.findall(done.stdout)}
    assert list(found) == ["float", "latent", "vote"]
    twin, _ = found.pop("float")
    for accuracy, kinds in found.values():  # seeds 0 to 4 gave 96.3% and more, 1.9 points below the twin at the most
        assert kinds == "-1 +0 +1"
        assert accuracy >= 90
        assert accuracy > twin - 5
