"""The tables of `peers.py` and `peers_optax.py`: what they name is there, and no test of the others is left out."""

import re
from pathlib import Path

import optax
import pytest
import torch
from peers import PYTORCH_OPTIMIZER, TORCH
from peers_optax import OPTAX

HERE = Path(__file__).parent
OF_OPTAX = {
    f"{file}::{name}": value
    for file, rows in OPTAX.items()
    for name, value in (rows.items() if isinstance(rows, dict) else [("*", rows)])
}
TABLES = {"torch": TORCH, "pytorch_optimizer": PYTORCH_OPTIMIZER, "optax": OF_OPTAX}


def names_in(path):
    return re.findall(r"^\s*def (test_\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("peer", TABLES)
def test_what_holds_a_row_is_there(peer):
    """Any other value is a reason, in words."""
    missing = []
    for row, value in TABLES[peer].items():
        file, is_held, name = value.partition("::")
        if (is_held and name not in names_in(HERE / file)) or not (is_held or " " in value):
            missing.append((row, value))
    assert missing == []


def test_every_test_of_torchs_that_its_records_name_has_a_row():
    """Those that a record decorates; the suite itself does not come with torch."""
    records = Path(torch.__file__).parent / "testing" / "_internal" / "common_optimizers.py"
    named = set(re.findall(r'"(test_\w+)"', records.read_text(encoding="utf-8")))
    rows = {row.rpartition(".")[2] for row in TORCH}
    assert named - rows == set()


def test_every_test_of_optaxs_has_a_row():
    root = Path(optax.__file__).parent
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*_test.py")}
    assert set(files) == set(OPTAX)
    for name, path in files.items():
        rows = OPTAX[name]
        if isinstance(rows, dict):
            assert set(names_in(path)) == set(rows), name
