"""The documents tell the truth: their code runs, and their numbers are those of the files that the commands wrote."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.tables import memory, results, speed
from fusedbun.recipes import RECIPES
from fusedbun.storage.codes import BLOCK
from fusedbun.tools.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.usefixtures("as_torchrun")
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n", 1)[0])
def test_every_block_of_code_runs(block):
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("document", ["README.md", *(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))])
def test_the_files_it_links_to_are_there(document):
    path = ROOT / document
    for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert link.startswith("https://") or (path.parent / link).exists(), link


@pytest.mark.parametrize("document", tables.DOCUMENTS)
def test_the_tables_are_the_benchmarks(document):
    text = (ROOT / document).read_text()
    assert text.count("<!-- table: ") == text.count("<!-- end -->") == len(tables.blocks(text))
    assert tables.updated(text) == text, "python -m benchmarks.tables writes the tables"


def test_every_table_is_in_a_document():
    named = {name for document in tables.DOCUMENTS for name in tables.blocks((ROOT / document).read_text())}
    assert named == set(tables.TABLES)


@pytest.mark.parametrize("document", ["docs/performance.md", "docs/memory.md", "docs/quality.md"])
def test_no_measurement_is_typed(document):
    text = re.sub(r"^```.*?^```", "", tables.typed((ROOT / document).read_text()), flags=re.MULTILINE | re.DOTALL)
    words = re.sub(r"`[^`\n]*=[^`\n]*`", "", text)  # settings stand in code
    assert not re.findall(r"\d+\.\d+|\d\s?%|\d\s(?:ms|ns|KiB|MiB|GiB|MB|GB|times)\b", words)


def test_the_bytes_of_codes_are_those_of_their_blocks():
    words = " ".join(README.split())
    assert f'`"int8"` ({1 + 1 / BLOCK:.2f} bytes a number) or `"int4"` ({0.5 + 1 / BLOCK:.2f})' in words


@pytest.mark.parametrize("name", [results.SPEED, results.SHAPES])
def test_the_commands_beside_the_tables_ask_for_what_was_measured(monkeypatch, name):
    given = []
    recording = replace(COMMANDS["bench"], run=lambda settings: given.append(settings) or 0)
    monkeypatch.setitem(COMMANDS, "bench", recording)
    python, m, module, *options = shlex.split(speed.command(name))
    assert (python, m, module) == ("python", "-m", "benchmarks.speed")
    assert main(["bench", *options]) == 0
    assert given[0].report() == results.load(name)["settings"]


def test_we_are_slower_where_the_documents_say_so():
    rows = [row.strip("| ").split(" | ") for row in speed.slower().splitlines()]
    said = {title: " ".join(row[2] for row in rows if row[0] == title) for title, *_ in rows}
    assert "int4" in said["GPT-2 small"]
    assert "JAX" in said["400 small tensors"]
    assert "int8" in said["a matrix of 3 columns"]
    assert "int8" in said["a matrix of 3 rows"]
    twice, once = (results.cases(results.SHAPES)["vocabulary", threads].runs for threads in (2, 1))
    for name in ("SM3", "Fusedbun"):
        assert twice[results.OURS, name]["median_ms"] > 0.9 * once[results.OURS, name]["median_ms"]
    tall = results.cases(results.SHAPES)["tall", 1].runs
    int4, full = (tall[results.OURS, f"Fusedbun{x}"] for x in (", bfloat16 rounded stochastically, int4", ""))
    assert int4["state_bytes_per_parameter"] > full["state_bytes_per_parameter"]


def test_an_interrupted_run_is_not_shown(tmp_path, monkeypatch):
    (tmp_path / "speed.json").write_text(json.dumps({"interrupted": True, "cases": []}))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match="came to its end"):
        results.cases.__wrapped__("speed.json")


def test_quality_in_fewer_bits_is_shown_when_it_has_been_measured_to_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert memory.low_precision() == ""
    protocol = {"steps": 1200, "width": 128, "layers": 2, "context": 64, "batch": 16, "seeds": [0, 1, 2]}
    runs = {"protocol": protocol, "runs": {"Fusedbun|float32|0.0002|0": 1.8}}
    (tmp_path / "low_precision.json").write_text(json.dumps(runs))
    assert memory.low_precision() == ""
    shared = {"optimizer": "Fusedbun", "lr": 2e-4, "deviation": 0.01}
    summary = [{**shared, "setting": "float32", "mean": 1.8}, {**shared, "setting": "momentum int4", "mean": 1.89}]
    (tmp_path / "low_precision.json").write_text(json.dumps({**runs, "summary": summary}))
    assert memory.low_precision().splitlines()[-2:] == [
        "| `Fusedbun` | float32 | 0.0002 | 1.8000 ± 0.0100 |  |",
        "|  | momentum int4 | 0.0002 | 1.8900 ± 0.0100 | +5.00% |",
    ]


def test_the_drift_is_the_demos():
    runs = json.loads((ROOT / "docs/demo/results.json").read_text())["weight_difference"]
    assert f"{runs['fusedbun']:.1e} with Fusedbun and by {runs['adamw']:.1e} with AdamW" in README


def test_the_table_of_the_family_is_the_commands(capsys):
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    rows = re.findall(r"^\| `(\w+)`[^|]*\| `\w+` \| ([\d.]+[^|]*) \|", README, re.MULTILINE)
    assert [name for name, _ in rows] == [r.torch_class for r in RECIPES.values() if "mup" not in r.defaults]
    for name, state in rows:
        assert re.search(rf"fusedbun\.{name} .* {re.escape(state)}$", listed, re.MULTILINE), name


def test_the_other_figures_are_the_benchmarks():
    widths = json.loads((ROOT / "benchmarks/results/mup_width.json").read_text())["results"]
    best = [f"{widths[name]['best_learning_rate_moves_by']:g}" for name in ("plain Adam", "u-muP")]
    least = [f"{widths[name]['least_learning_rate_moves_by']:g}" for name in ("plain Adam", "u-muP")]
    assert f"moves by a factor of {best[0]}, and u-muP's by {best[1]}" in README
    assert f"times the best moves by {least[0]} and by {least[1]}" in " ".join(README.split())
    runs = json.loads((ROOT / "benchmarks/results/sparse_embedding.json").read_text())["results"]
    ms = {run["optimizer"]: run["ms"] for run in runs if run["rows"] == 1_000_000 and run["touched"] in (1000, None)}
    assert f"touched rows takes {ms['SM3']:.1f} ms" in README
    assert f"it takes {ms['SM3, dense'] / 1000:.1f} s" in README
