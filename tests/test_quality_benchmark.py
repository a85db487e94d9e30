"""The quality benchmark runs, in small: every contender trains, runs are kept, and the protocol is kept to."""

import math
from dataclasses import replace
from functools import partial
from itertools import chain

import numpy as np
import pytest
import torch
from sweeps import only, sweep

import fusedbun
from benchmarks import fetch
from benchmarks.quality import contenders, data, document, in_place, in_torch, protocol, report
from benchmarks.quality.altered import MOMENT, Cautious, RoundedMomentum
from benchmarks.quality.contenders import Contender
from benchmarks.quality.making import Make
from benchmarks.quality.published import FirstFusedbun
from benchmarks.quality.workloads import Workload

DIGITS = in_torch.images(data.digits, in_torch.convolutional, 64, 20)


def nothing(*_):
    """Nothing is reported."""


def study(tmp_path, monkeypatch, run, **settings):
    monkeypatch.setattr(protocol, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    who = tuple(
        Contender(title, 0.01, Make(title, None), ours)
        for title, ours in (("Fusedbun, recommended", True), ("AdamW", False))
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


@pytest.mark.parametrize("contender", [*contenders.IN_TORCH[:1], *contenders.IN_TORCH[-1:]], ids=lambda x: x.title)
def test_a_contender_trains(contender):
    torch.set_num_threads(1)
    found = in_torch.run(replace(DIGITS, steps=40), contender, contender.rate, 1, "test", nothing)
    assert found["loss"] < 1  # before training it is above 2.3
    assert [step for step, _ in found["curve"]] == list(range(2, 41, 2))
    assert found["curve"][-1][1] == found["loss"]


KINDS = (*(contenders.IN_TORCH, contenders.SPARSE, contenders.VARIANTS, contenders.AS_REPORTED, contenders.IN_PLACE),)


@sweep("contender", chain(*KINDS), short=only(*(kind[n] for kind in KINDS for n in (0, -1))), ids=lambda x: x.title)
def test_every_contender_steps(contender):
    layer = torch.nn.Embedding(4, 3, sparse=True) if contender.sparse else torch.nn.Linear(3, 4)
    layer = layer.to(getattr(torch, contender.dtype))
    optimizer = contender.make(list(layer.named_parameters()), 0.1)
    before = layer.weight.detach().clone()
    x = torch.tensor([1]) if contender.sparse else torch.tensor([[1.0, 2.0, 4.0]], dtype=layer.weight.dtype)
    layer(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, layer.weight)
    assert torch.isfinite(layer.weight).all()


class Fixed:
    """Takes the same update from a parameter in every step."""

    def __init__(self, param, update):
        self.param_groups, self.state, self.update = [{"params": [param]}], {}, update

    def step(self):
        self.param_groups[0]["params"][0].sub_(self.update)


def test_a_cautious_step_leaves_out_what_the_gradient_is_against_and_makes_up_for_it():
    param = torch.nn.Parameter(torch.zeros(4))
    param.grad = torch.tensor([1.0, -1.0, 2.0, 3.0])
    Cautious(Fixed(param, torch.tensor([1.0, 1.0, -2.0, 3.0]))).step()
    assert param.tolist() == [-2.0, 0.0, 0.0, -6.0]


@pytest.mark.parametrize("bits", [3, 4])
def test_a_matrix_keeps_its_momentum_in_so_many_bits_and_a_bias_in_all(bits):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 3) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    usual, rounded = (fusedbun.Fusedbun(layer.parameters(), lr=0.01) for layer in layers)
    rounded = RoundedMomentum(rounded, bits)
    for layer, optimizer in zip(layers, (usual, rounded), strict=True):
        layer(torch.ones(2, 64).cumsum(1)).square().sum().backward()
        optimizer.step()
    assert torch.equal(rounded.state[layers[1].bias][MOMENT], usual.state[layers[0].bias][MOMENT])
    exact, kept = (
        x.reshape(3, 2, 32) for x in (usual.state[layers[0].weight][MOMENT], rounded.state[layers[1].weight][MOMENT])
    )
    step = 2.0 ** (exact.abs().amax(-1, keepdim=True).log2().floor() + 2 - bits)
    codes = kept / step
    assert torch.equal(codes, codes.round())
    assert codes.abs().max() == 2 ** (bits - 1) - 1
    assert not torch.equal(kept, exact)
    assert ((kept - exact).abs() <= step).all()


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
    changed = Contender("AdamW", 0.01, Make("other settings", None), ours=False)
    study(tmp_path, monkeypatch, run, contenders=(changed,), rates=(0.08,)).complete()
    assert len(made) == count + 2 + 1 + 2  # those of other settings are not kept
    study(tmp_path, monkeypatch, run, about="another network", rates=(0.01,)).complete()
    assert len(made) == count + 5 + 2 * (1 + 2)  # none is kept


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


def test_in_place_everybody_has_adamws_learning_rate_and_shares_of_it(tmp_path, monkeypatch):
    study(tmp_path, monkeypatch, pretended).complete()
    workload = study(tmp_path, monkeypatch, pretended).workload
    in_its_place = replace(workload, name="digits_in_place", tuning_seeds=(), shares=(0.5, 1.0), beside="digits")
    results = protocol.Study(in_its_place, nothing).complete()["results"]
    assert [of["learning_rate"] for of in results.values()] == [pytest.approx(0.08)] * 2
    assert results["AdamW"]["at"]["1"]["losses"] == pytest.approx([1.01, 1.02])
    assert results["AdamW"]["at"]["0.5"]["losses"] == pytest.approx([2.01, 2.02])
    assert results["Fusedbun, recommended"]["at"]["1"]["losses"] == pytest.approx([10.01, 10.02])
    change, error = in_place.against(*(results[x]["at"]["1"] for x in ("Fusedbun, recommended", "AdamW")))
    assert (change, error) == (pytest.approx(9 / 1.015), pytest.approx(0, abs=1e-12))
    diverged = {"loss": None, "losses": [None, 1.0]}
    assert in_place.against(diverged, results["AdamW"]["at"]["1"]) is None


def test_a_network_in_bfloat16_is_trained_in_it_and_judged_in_float32():
    contender = next(x for x in contenders.IN_PLACE if x.dtype == "bfloat16")
    found = in_torch.run(replace(DIGITS, steps=40), contender, 0.008, 1, "test", nothing)
    assert found["loss"] < 1
    assert found["validation_loss"] < 1


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


def test_the_first_public_rule_as_described_keeps_the_second_moment_where_the_momentum_is_masked():
    p = torch.zeros(2, 4, requires_grad=True)
    optimizer = FirstFusedbun([p], 0.1, Lambda=0.01)
    first = torch.tensor([[1.0, -1.0, 0.5, -0.5]]).expand(2, 4)
    p.grad = first.clone()
    optimizer.step()
    torch.testing.assert_close(p.detach(), -0.1 * first / (0.2 * first * first).sqrt())
    before, masked = p.detach().clone(), first.abs() == 0.5
    p.grad = torch.where(masked, -0.9 * first, first)  # there the momentum becomes zero
    optimizer.step()
    m = 1.9 * first
    v = 0.8 * 0.2 * first * first + 0.2 * m * m
    stepped = (1 - 0.1 * 0.01) * before - 0.1 * m / v.sqrt()
    torch.testing.assert_close(p.detach(), torch.where(masked, (1 - 0.1 * 0.01) * before, stepped))
    torch.testing.assert_close(optimizer.state[p]["v"], torch.where(masked, 0.2 * first * first, v))


def test_the_first_public_rule_before_the_mask():
    p = torch.zeros(2, 4, requires_grad=True)
    optimizer, m, v = FirstFusedbun([p], 0.1, "before the mask"), torch.zeros(2, 4), torch.zeros(4)
    wanted = torch.zeros(2, 4)
    for t, grad in enumerate(torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)), 1):
        p.grad = grad.clone()
        optimizer.step()
        g, b = grad - grad.mean(1, keepdim=True), 1 - t**-0.8
        v = b * v + (1 - b) * (g * g).mean(0)
        m = 0.9 * m + 0.1 * g / (v.sqrt() + 1e-8)
        wanted = wanted - 0.1 * m
    torch.testing.assert_close(p.detach(), wanted)


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


def test_learns_ratings_with_sparse_gradients(monkeypatch):
    rng = np.random.default_rng(0)
    points = data.Ratings(rng.integers(0, 5, 256), rng.integers(0, 4, 256), rng.integers(1, 6, 256).astype(np.float32))
    monkeypatch.setattr(data, "ratings", lambda: dict.fromkeys(data.PARTS, points))
    task = in_torch.ratings(width=2, size=64, steps=20)
    for contender in contenders.SPARSE[:2]:
        assert partial(in_torch.run, task)(contender, contender.rate, 0, "validation", nothing)["loss"] > 0
