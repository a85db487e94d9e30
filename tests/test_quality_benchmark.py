"""The quality benchmark runs, in small: every contender trains, runs are kept, and the protocol is kept to."""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks import fetch
from benchmarks.quality import contenders, data, document, in_torch, protocol, report
from benchmarks.quality.contenders import Contender
from benchmarks.quality.published import FirstFusedbun
from benchmarks.quality.workloads import WORKLOADS, Workload

DIGITS = in_torch.images(data.digits, in_torch.convolutional, 64, 20)


def nothing(*_):
    """Nothing is reported."""


def study(tmp_path, monkeypatch, run, **settings):
    monkeypatch.setattr(protocol, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    who = tuple(
        Contender(title, 0.01, None, ours) for title, ours in (("Fusedbun, recommended", True), ("AdamW", False))
    )
    given = {"contenders": who, "seeds": (1, 2), **settings}
    about = given.pop("about", "a network")
    workload = Workload("digits", "digits", about, 64, 20, "constant", run, **given)
    return protocol.Study(workload, nothing)


def pretended(contender, lr, seed, part, advance):
    """A loss with its least at a learning rate of 0.08 for AdamW, and of 0.01 for the other."""
    loss = 1 + math.log2(lr / (0.08 if contender.title == "AdamW" else 0.01)) ** 2 + 0.01 * seed
    curve = {"curve": [[10, 2 * loss], [20, loss]]} if part == "test" else {}
    return {"loss": loss, "accuracy": 0.5, **curve, "seconds": 2.0, "state_bytes": 8, "parameters": 2}


@pytest.mark.parametrize(
    "contender", [*contenders.IN_TORCH[:1], *contenders.IN_TORCH[-1:], contenders.VARIANTS[3]], ids=lambda x: x.title
)
def test_a_contender_trains(contender):
    torch.set_num_threads(1)
    found = in_torch.run(replace(DIGITS, steps=40), contender, contender.rate, 1, "test", nothing)
    assert found["loss"] < 1  # before training it is above 2.3
    assert [step for step, _ in found["curve"]] == list(range(2, 41, 2))
    assert found["curve"][-1][1] == found["loss"]


ALL_IN_TORCH = (*contenders.IN_TORCH, *contenders.SPARSE, *contenders.VARIANTS, *contenders.AS_REPORTED)


@pytest.mark.parametrize("contender", ALL_IN_TORCH, ids=lambda x: x.title)
def test_every_contender_steps(contender):
    layer = torch.nn.Embedding(4, 3, sparse=True) if contender.sparse else torch.nn.Linear(3, 4)
    optimizer = contender.make(list(layer.named_parameters()), 0.1)
    before = layer.weight.detach().clone()
    layer(torch.tensor([1]) if contender.sparse else torch.tensor([[1.0, 2.0, 4.0]])).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, layer.weight)
    assert torch.isfinite(layer.weight).all()


def test_jax_trains_from_the_same_weights_and_batches():
    pytest.importorskip("flax")
    from benchmarks.quality import in_jax

    ours = next(x for x in contenders.IN_JAX if x.title == contenders.SM3)
    there = next(x for x in contenders.IN_TORCH if x.title == contenders.SM3)
    found = in_jax.run(in_jax.TASKS["digits_jax"](64, 20), ours, 0.1, 1, "test", nothing)
    assert found["loss"] == pytest.approx(in_torch.run(DIGITS, there, 0.1, 1, "test", nothing)["loss"], rel=1e-3)


def test_learning_rates_are_added_beyond_an_edge_and_only_there(tmp_path, monkeypatch):
    results = study(tmp_path, monkeypatch, pretended).complete()["results"]
    tried = {title: [rate for rate, _ in found["tried"]] for title, found in results.items()}
    assert tried["Fusedbun, recommended"] == pytest.approx([0.0025, 0.005, 0.01, 0.02, 0.04])
    assert tried["AdamW"] == pytest.approx([0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16])
    assert results["AdamW"]["learning_rate"] == pytest.approx(0.08)
    assert results["AdamW"]["inside_grid"]
    assert results["AdamW"]["losses"] == pytest.approx([1.01, 1.02])


def test_a_run_that_is_done_is_not_made_again(tmp_path, monkeypatch):
    made = []

    def run(*args):
        made.append(args)
        return pretended(*args)

    study(tmp_path, monkeypatch, run).complete()
    count = len(made)
    study(tmp_path, monkeypatch, run).complete()
    assert len(made) == count
    study(tmp_path, monkeypatch, run, seeds=(1, 2, 3)).complete()
    assert len(made) == count + 2  # a seed more for each
    study(tmp_path, monkeypatch, run, about="another network", rates=(0.01,)).complete()
    assert len(made) == count + 2 + 2 * (1 + 2)  # none is kept


def test_a_loss_that_is_not_finite_is_never_the_best(tmp_path, monkeypatch):
    def run(contender, lr, *rest):
        found = pretended(contender, lr, *rest)
        return {**found, "loss": None} if lr > 0.01 else found

    results = study(tmp_path, monkeypatch, run).complete()["results"]
    assert results["AdamW"]["learning_rate"] == pytest.approx(0.01)
    assert results["AdamW"]["tried"][-1][1] is None


def test_the_tables_and_the_picture_are_made_of_a_file(tmp_path, monkeypatch):
    study(tmp_path, monkeypatch, pretended).complete()
    assert report.draw().startswith(b"\x89PNG")
    assert report.show("digits").row_count == 2
    best, last = report.rows("digits")
    assert best.steps_to_adamw == last.steps_to_adamw == 20
    assert best.seconds_to_adamw == pytest.approx(2)
    assert document.found() == ["digits"]
    assert "| **Fusedbun, recommended** | (+0.0%) |" in document.in_short()
    assert "| **Fusedbun, recommended** | 0.125 | 0.13 |" in document.rates()
    for part in ("who", "whole", "measured"):
        assert getattr(document, part)()
    assert document.as_reported() == document.settings() == ""


def test_the_first_public_rule_is_a_sign_of_momentum_for_a_matrix_as_it_was_written():
    grads = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    steps = {}
    for rule in ("described", "written", "before the mask"):
        p = torch.zeros(2, 4, requires_grad=True)
        optimizer = FirstFusedbun([p], 1.0, rule, Lambda=0.0)
        for grad in grads:
            before = p.detach().clone()
            p.grad = grad.clone()
            optimizer.step()
        steps[rule] = before - p.detach()
    m = torch.zeros(2, 4)
    for grad in grads:
        m = 0.9 * m + grad - grad.mean(1, keepdim=True)
    torch.testing.assert_close(steps["written"], m.sign() / math.sqrt(0.2), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(steps["described"], steps["written"])
    assert not torch.allclose(steps["before the mask"], steps["written"])
    with pytest.raises(ValueError, match="rule must be"):
        FirstFusedbun([p], 1.0, "else")


def test_data_that_cannot_be_had_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(fetch.MissingError, match=r"no such program; put x\.tgz into .* by other means"):
        fetch.archive(fetch.Source("x.tgz", "0", ("no-such-program-at-all",)))
    with pytest.raises(fetch.MissingError, match="another version"):
        fetch.archive(fetch.Source("x.tgz", "0", ("true",)))
    (tmp_path / "fusedbun/data/x.tgz").write_bytes(b"else")
    with pytest.raises(fetch.MissingError, match="is not the archive that was published"):
        fetch.archive(fetch.Source("x.tgz", "0", ("true",)))


def test_no_image_is_in_two_parts():
    parts = data.digits()
    assert sum(len(x.labels) for x in parts.values()) == 1797
    assert {name: len(x.labels) for name, x in parts.items()} == {"train": 898, "validation": 270, "test": 629}


def test_schedules():
    assert [in_torch.linear(k, 100) for k in (0, 9, 50, 75)] == pytest.approx([0.1, 1, 1, 0.5])
    assert [in_torch.cosine(k, 100) for k in (0, 9, 10, 55)] == pytest.approx([0.1, 1, 1, 0.5])
    assert np.isclose(in_torch.cosine(99, 100), 0, atol=1e-3)


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_results_were_written_by_this_protocol(name):
    file = json.loads((protocol.RESULTS / f"quality_{name}.json").read_text())
    said = json.loads(json.dumps({**WORKLOADS[name].protocol, **WORKLOADS[name].choices}))
    assert {key: file["protocol"][key] for key in said} == said
    assert list(file["results"]) == [x.title for x in WORKLOADS[name].contenders]
    assert {key.split("|")[0] for key in file["runs"]} == file["results"].keys()


@pytest.fixture(scope="module")
def found():
    """The rows of every workload, by name."""
    return {name: {row.title: row for row in report.rows(name)} for name in (*document.DRAWN, *document.ABLATIONS)}


@pytest.fixture(scope="module")
def loss(found):
    """Their test losses, without those that diverge."""
    return {name: {x: row.of["loss"] for x, row in of.items() if row.is_stable} for name, of in found.items()}


FUSEDBUN, SM3, LION = contenders.FUSEDBUN, contenders.SM3, "DecoupledLionW"


@pytest.mark.parametrize(
    ("who", "behind"),
    [
        (contenders.OF_MEANS, {"fashion", document.LONGER}),
        (contenders.WITHOUT_MOMENTUM, {"digits_jax", "insteval", document.LONGER}),
    ],
)
def test_where_a_vector_per_axis_is_behind_adamw(found, who, behind):
    here = {name: found[name][who] for name in document.DRAWN}
    assert {name for name, row in here.items() if document._behind(row, row.adamw) > 0} == behind
    assert max(row.of["state_bytes_per_parameter"] for row in here.values()) < 0.5


def test_what_the_longer_runs_on_text_say(loss):
    text = loss[document.LONGER]
    assert max(text[x] for x in (FUSEDBUN, contenders.INT4, "Fusedbun, lagged")) < text["AdamW"]
    assert text["AdamW"] < text["Adafactor"] < text[contenders.WITHOUT_MOMENTUM] < text[contenders.OF_MEANS]
    product, minimum = (text[f"SM3, mean and {x}, beta 0.95"] for x in ("product", "minimum"))
    assert text["AdamW"] < product < minimum < min(text["SM3"], text[SM3])


def test_which_one_is_advised_for_what(found, loss):
    text, ratings = loss["shakespeare"], loss["insteval"]
    assert max(text[FUSEDBUN], text["Fusedbun, lagged"]) < text["AdamW"]
    assert text[contenders.INT4] < text["AdamW"]
    assert ratings["Fusedbun, default"] < ratings["SM3, sparse gradients"]
    assert loss["mails"][contenders.WITHOUT_MOMENTUM] < loss["mails"]["AdamW"]
    assert ratings["SM3, sparse gradients"] < min(ratings["SparseAdam, sparse gradients"], ratings["AdamW"])
    assert loss["insteval_ablation"]["Fusedbun without centralize"] < ratings["AdamW"] < ratings[FUSEDBUN]
    assert loss["digits"]["AdamW"] < loss["digits"][FUSEDBUN]
    assert loss["fashion"][FUSEDBUN] < loss["fashion"]["AdamW"]
    for name in document.DRAWN:
        assert loss[name]["SM3"] < loss[name][SM3]
    for name in ("digits_jax", "mnist_jax"):
        assert not found[name]["Fusedbun, lagged"].is_stable
        assert found[name]["Fusedbun, lagged, clip_rms=1"].is_stable


def test_what_is_said_of_signs(loss):
    from_scratch = [of for name, of in loss.items() if LION in of and name != "mails"]
    for of in from_scratch:
        assert of["AdamW"] < of["ScaledOptum"] < of[LION]
        assert list(of).index(LION) >= len(of) - 4
    assert loss["mails"][LION] < loss["mails"]["AdamW"]


def test_what_is_said_of_settings(loss):
    changes = {name: {x: of[x] / of[FUSEDBUN] - 1 for x in of} for name, of in loss.items() if FUSEDBUN in of}
    digits, fashion, text, ratings = (
        changes[f"{x}_ablation"] for x in ("digits", "fashion", "shakespeare", "insteval")
    )
    for of in (digits, fashion, text):
        assert of["Fusedbun without nesterov"] > 0
    for of in (digits, fashion, text, ratings):
        assert of["Fusedbun, full second moment"] > -0.011
        assert max(of[contenders.INT4], of["Fusedbun, momentum in 3 bits"]) < 0.01
    assert ratings["Fusedbun without centralize"] < -0.02
    assert text["Fusedbun, beta_decay=0.999"] > 0.01
    assert digits["Fusedbun without momentum"] < 0
    assert loss["digits_ablation"]["Fusedbun without momentum or centralize"] == min(loss["digits_ablation"].values())
    assert digits["Fusedbun, cautious"] > 0.5
    assert max(fashion["Fusedbun, cautious"], ratings["Fusedbun, cautious"]) < 0
    assert ratings["Fusedbun, combine minimum"] < 0 < digits["Fusedbun, combine minimum"]


@pytest.mark.parametrize("title", ["SM3, mean and minimum, beta 0.95", "SM3, mean and product, beta 0.95"])
def test_means_bring_sm3_level_with_adamw(loss, title):
    for name in ("digits", "fashion", "shakespeare"):
        here = loss[f"{name}_ablation"]
        assert here[title] < 1.01 * here["AdamW"] < 1.01 * here[SM3], name


def test_learns_ratings_with_sparse_gradients(monkeypatch):
    rng = np.random.default_rng(0)
    points = data.Ratings(rng.integers(0, 5, 256), rng.integers(0, 4, 256), rng.integers(1, 6, 256).astype(np.float32))
    monkeypatch.setattr(data, "ratings", lambda: dict.fromkeys(data.PARTS, points))
    task = in_torch.ratings(width=2, size=64, steps=20)
    for contender in contenders.SPARSE[:2]:
        assert partial(in_torch.run, task)(contender, contender.rate, 0, "validation", nothing)["loss"] > 0
