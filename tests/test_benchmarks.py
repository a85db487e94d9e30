"""The benchmarks run, in small, and the files that they wrote are those of their protocols."""

import json
import math

import pytest

from benchmarks import mup_width, sparse_embedding


@pytest.mark.parametrize("method", mup_width.LEARNING_RATES)
def test_mup_width_trains(monkeypatch, method):
    monkeypatch.setattr(mup_width, "STEPS", 40)
    rate = mup_width.LEARNING_RATES[method][-3]
    assert mup_width.validation_loss(mup_width.Trial(method, 32, rate, seed=0)) < 1  # before training it is above 2.3


def test_mup_width_counts_a_loss_that_is_not_finite_as_infinite(monkeypatch):
    monkeypatch.setattr(mup_width, "STEPS", 3)
    assert mup_width.validation_loss(mup_width.Trial("plain Adam", 8, 1e30, seed=0)) == math.inf


def test_mup_width_finds_the_best_learning_rates():
    losses = {
        mup_width.Trial(method, width, rate, seed): math.inf if rate == rates[-1] else 1 + abs(rate - rates[k])
        for method, rates in mup_width.LEARNING_RATES.items()
        for k, width in enumerate(mup_width.WIDTHS)
        for rate in rates
        for seed in mup_width.SEEDS
    }
    results = {method: mup_width._summary(method, losses) for method in mup_width.LEARNING_RATES}
    for method, result in results.items():
        rates = mup_width.LEARNING_RATES[method]
        assert [row["best_learning_rate"] for row in result["widths"]] == list(rates[: len(mup_width.WIDTHS)])
        assert [row["inside_grid"] for row in result["widths"]] == [False, True, True, True]
        assert (result["best_learning_rate_moves_by"], result["least_learning_rate_moves_by"]) == (8, 1)
        assert result["widths"][0]["losses"][-1] is None
    assert mup_width.draw(results).startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "numbers"), [("SM3", 500), ("SM3, dense", 500 + 64), ("SparseAdam", 2 * 500 * 64)])
def test_sparse_embedding_measures_steps_and_counts_the_state(monkeypatch, name, numbers):
    monkeypatch.setattr(sparse_embedding, "STEPS", {name: 3})
    result = sparse_embedding._measure(name, rows=500, touched=20)
    assert result["ms"] > 0
    assert result["state_bytes"] == 4 * numbers


@pytest.mark.parametrize("benchmark", [mup_width, sparse_embedding], ids=lambda module: module.__name__)
def test_the_results_were_written_by_this_protocol(benchmark):
    protocol = json.loads(benchmark.RESULTS.read_text())["protocol"]
    for name, value in protocol.items():
        if hasattr(benchmark, name.upper()):
            ours = getattr(benchmark, name.upper())
            assert value == (ours if isinstance(ours, (int, float, str, dict)) else list(ours)), name


@pytest.mark.long
def test_memory_of_training(tmp_path):
    from benchmarks.memory.__main__ import add_activations, draw, measure, show
    from benchmarks.memory.training import BARE

    rows = [measure("none", contender, []) for contender in (BARE, "SM3")]
    assert [row["status"] for row in rows] == ["measured", "measured"]
    assert rows[0]["parameters"] > 10_000
    add_activations(rows)
    missing = {"model": "none", "contender": "torch-SM3", "status": "not installed"}
    show([*rows, missing])
    draw([*rows, missing], tmp_path / "memory.png")
    assert (tmp_path / "memory.png").stat().st_size > 1000
