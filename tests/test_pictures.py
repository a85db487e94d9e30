"""The pictures of behaviour are drawn from the optimizers as they are, and show what is written beside them."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from sweeps import only, sweep

from benchmarks.pictures import covers, trajectories
from benchmarks.pictures.__main__ import FOLDER
from fusedbun.recipes import RECIPES

SURFACES = (trajectories.ROSENBROCK, trajectories.RASTRIGIN)
BY_TITLE = {contender.title: contender for contender in trajectories.CONTENDERS}


@pytest.fixture
def short(monkeypatch):
    """Few steps and few learning rates."""
    monkeypatch.setattr(trajectories, "STEPS", 20)
    few = [replace(c, values=c.values[::12]) for c in trajectories.CONTENDERS]
    monkeypatch.setattr(trajectories, "CONTENDERS", tuple(few))


@pytest.mark.parametrize("surface", SURFACES, ids=lambda surface: surface.name)
def test_gradients_and_minima_are_those_of_the_functions(surface):
    assert surface.value(*surface.minimum) == 0
    assert surface.gradient(*surface.minimum) == pytest.approx((0, 0), abs=1e-12)
    for x, y in ((0.3, -0.7), surface.start):
        by_x, by_y = (
            (surface.value(x + dx, y + dy) - surface.value(x - dx, y - dy)) / 2e-6 for dx, dy in ((1e-6, 0), (0, 1e-6))
        )
        assert surface.gradient(x, y) == pytest.approx((by_x, by_y), rel=1e-5)


def test_every_optimizer_of_the_family_is_drawn():
    drawn = " ".join(BY_TITLE)
    assert all(recipe.torch_class in drawn for recipe in RECIPES.values())


@pytest.mark.parametrize(
    ("ours", "other"),
    [("MupAdam, MupAdamW", "AdamW (torch)"), ("DecoupledLionW", "Lion (lion-pytorch)")],
)
def test_without_decay_they_take_the_path_of_those_they_derive_from(short, ours, other):
    paths = [trajectories.walk(trajectories.ROSENBROCK, BY_TITLE[title], 2.0**-6) for title in (ours, other)]
    assert len(paths[0]) == trajectories.STEPS + 1
    np.testing.assert_allclose(*paths, rtol=1e-9)


def test_a_path_that_leaves_the_window_is_not_chosen(short):
    surface, sgd = trajectories.ROSENBROCK, BY_TITLE["SGD (torch)"]
    points = trajectories.walk(surface, sgd, 1.0)
    assert len(points) <= trajectories.STEPS
    assert trajectories.score(surface, points) == math.inf
    path = trajectories.search(surface, replace(sgd, values=(1e-4, 1.0)))
    assert path.chosen == 1e-4
    assert len(path.points) == trajectories.STEPS + 1


@sweep("surface", SURFACES, short=only(trajectories.ROSENBROCK), ids=lambda surface: surface.name)
def test_trajectories_are_drawn(short, surface):
    assert Image.open(io.BytesIO(trajectories.draw(surface))).format == "PNG"


@pytest.fixture(scope="module")
def made_up():
    return covers.made_up()


def test_stand_ins_are_what_they_are_said_to_be(made_up):
    total, cover, mean, product, smallest = covers.ways(made_up.values)
    squares = made_up.values**2
    np.testing.assert_allclose(total.moments[-1], squares.sum(0))
    weights = (1 - covers.BETA) * covers.BETA ** np.arange(len(squares))[::-1]
    np.testing.assert_allclose(mean.moments[-1], np.tensordot(weights, squares, 1))
    assert (cover.moments >= total.moments * (1 - 1e-12)).all()  # SM3 bounds every element
    for way, combine in ((product, lambda r, c: r * c / r.mean()), (smallest, np.minimum)):
        rows, columns = way.accumulators[-1]
        np.testing.assert_allclose(rows[:, 0], mean.moments[-1].mean(1))
        np.testing.assert_allclose(columns[0], mean.moments[-1].mean(0))
        np.testing.assert_allclose(way.moments[-1], combine(rows, columns))
    assert cover.error(1) == pytest.approx(0)
    assert product.error(covers.STEPS) < smallest.error(covers.STEPS) < cover.error(covers.STEPS)


def test_covers_are_drawn(monkeypatch, made_up):
    monkeypatch.setattr(covers, "SHOWN", (1, 2))
    monkeypatch.setattr(covers, "FRAMES", (1, 2, 3))
    digits = covers.of_digits()
    assert digits.values.shape == (covers.STEPS, covers.ROWS, covers.COLUMNS)
    assert Image.open(io.BytesIO(covers.draw(made_up))).format == "PNG"
    assert Image.open(io.BytesIO(covers.animate(digits))).n_frames == 3


def test_the_pictures_are_there_and_small():
    pictures = {path.name: path for path in FOLDER.iterdir() if path.suffix in (".png", ".gif")}
    text = (FOLDER.parent / "what-it-looks-like.md").read_text()
    assert set(pictures) == {
        "rosenbrock.png",
        "rastrigin.png",
        "covers_made_up.png",
        "covers_digits.png",
        "covers_digits.gif",
    }
    for name, path in pictures.items():
        assert f"(pictures/{name})" in text
        assert path.stat().st_size < 1.5e6
    with Image.open(pictures["covers_digits.gif"]) as picture:
        assert picture.n_frames == len(covers.FRAMES)
