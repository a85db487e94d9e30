"""The README tells the truth: its code runs, and its numbers are those of the files that the commands wrote."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n", 1)[0])
def test_every_block_of_code_runs(block):
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_the_files_it_links_to_are_there():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link


@pytest.mark.parametrize(("name", "title"), [("fusedbun", "Fusedbun"), ("adamw", "AdamW")])
def test_the_quality_table_is_the_benchmarks(name, title):
    result = json.loads((ROOT / "benchmarks/results/digits.json").read_text())["results"][name]
    row = (
        f"| {title} | {result['learning_rate']:g} | {result['test_accuracy_mean']:.2%} "
        f"± {result['test_accuracy_deviation']:.2%} | {result['test_loss_mean']:.3f} |"
    )
    assert row in README


def test_the_drift_is_the_demos():
    runs = json.loads((ROOT / "docs/demo/results.json").read_text())["weight_difference"]
    assert f"{runs['fusedbun']:.1e} with Fusedbun and by {runs['adamw']:.1e} with AdamW" in README


def test_the_table_of_the_family_is_the_commands(capsys):
    from fusedbun.cli import main

    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    rows = re.findall(r"^\| `(\w+)`[^|]*\| `\w+` \| ([\d.]+[^|]*) \|", README, re.MULTILINE)
    assert len(rows) == 5
    for name, state in rows:
        assert re.search(rf"fusedbun\.{name} .* {re.escape(state)}$", listed, re.MULTILINE), name


def test_the_other_figures_are_the_benchmarks():
    widths = json.loads((ROOT / "benchmarks/results/mup_width.json").read_text())["results"]
    best = [f"{widths[name]['best_learning_rate_moves_by']:g}" for name in ("plain Adam", "u-muP")]
    least = [f"{widths[name]['least_learning_rate_moves_by']:g}" for name in ("plain Adam", "u-muP")]
    assert f"moves by a factor of {best[0]}, and u-muP's by {best[1]}" in README
    assert f"the best loss moves by {least[0]} and by {least[1]}" in " ".join(README.split())
    runs = json.loads((ROOT / "benchmarks/results/sparse_embedding.json").read_text())["results"]
    ms = {run["optimizer"]: run["ms"] for run in runs if run["rows"] == 1_000_000 and run["touched"] in (1000, None)}
    assert f"touched rows takes {ms['SM3']:.1f} ms" in README
    assert f"it takes {ms['SM3, dense'] / 1000:.1f} s" in README
