"""The table of behaviour is what the uses do, and every cell in which AdamW is ahead has its reason."""

import json

import pytest
from sweeps import sweep

from benchmarks.behaviour.running import CONTENDERS, PARTS, USES, row
from benchmarks.behaviour.uses import EVERYONE, Contender, Part, cell, faults, takes
from benchmarks.tables import behaviour
from benchmarks.tables.results import RESULTS

ROWS = {(one["framework"], one["use"]): one for one in json.loads((RESULTS / "behaviour.json").read_text())["rows"]}
FEW = {
    ("torch", "`step(closure)`"),
    ("torch", "`foreach=True`"),
    ("torch", "sparse gradients (`nn.Embedding(sparse=True)`)"),
    ("torch", "`DistributedDataParallel`"),
    ("jax", "`optax.tree_map_params`"),
    ("jax", "complex parameters"),
}


def test_the_table_has_every_use():
    assert len(USES) == sum(len(part.uses) for parts in PARTS.values() for part in parts), "titles are keys"
    assert list(ROWS) == list(USES), "python -m benchmarks.behaviour runs them"
    for framework in PARTS:
        assert sum(key[0] == framework for key in USES) >= 40


@sweep(("framework", "title"), USES, short=lambda *key: key in FEW)
def test_a_row_is_what_its_use_does(framework, title):
    assert row(framework, title) == ROWS[framework, title], "python -m benchmarks.behaviour runs it"


@pytest.mark.parametrize(("framework", "title"), USES)
def test_where_adamw_is_ahead_the_reason_is_written(framework, title):
    assert not faults(USES[framework, title][1], ROWS[framework, title]["cells"], CONTENDERS[framework][0].name)


# What cells and faults say, of uses that are made up

ADAMW, OURS = (
    Contender("AdamW", lambda *, lr: lr, {"lr": 0.1}, ours=False),
    Contender("Ours", lambda *, lr, bits: lr, {"lr": 0.1}),
)


def use_of(function, **settings):
    part = Part("made up")
    part.use("a use", **settings)(function)
    return part.uses[0]


def refuses(contender):
    """It is refused."""
    if contender.name == "Ours":
        raise ValueError("\nnot for me at 0x7f12ab\nand more")


def asserts(contender):
    """It asserts."""
    assert contender.name != "Ours", "one and one are three"


def test_a_cell_says_what_became_of_it():
    assert [cell(use_of(refuses), x) for x in (ADAMW, OURS)] == ["works", "refused: ValueError: not for me at 0x…"]
    assert cell(use_of(asserts), OURS) == "wrong: one and one are three"
    assert cell(use_of(refuses, applies=takes("bits")), ADAMW) == "not applicable"
    assert use_of(refuses).works_if == "It is refused."


def test_a_reason_that_is_missing_or_needless_is_a_fault():
    works, fails = {"AdamW": "works", "Ours": "works"}, {"AdamW": "works", "Ours": "refused: ValueError: no"}
    both = {"AdamW": "refused: ValueError: no", "Ours": "refused: ValueError: no"}
    plain, explained = use_of(refuses), [use_of(refuses, reasons={name: "so"}) for name in ("Ours", EVERYONE)]
    assert [faults(plain, cells, "AdamW") for cells in (works, both)] == [[], []]
    (missing,) = faults(plain, fails, "AdamW")
    assert "works with AdamW but not with Ours" in missing
    for use in explained:
        assert not faults(use, fails, "AdamW")
        (needless,) = faults(use, works, "AdamW")
        assert "needless" in needless


def test_the_table_shows_a_message_once(monkeypatch):
    shown = {
        "framework": "torch",
        "part": "Subject",
        "use": "a use",
        "works_if": "It does.",
        "cells": {
            "AdamW": "works",
            "One": "refused: ValueError: One cannot",
            "Two": "refused: ValueError: Two cannot",
            "Three": "not applicable",
            "Four": "wrong: off",
        },
        "reasons": {"One": "So it is.", "Two": "So it is."},
    }
    monkeypatch.setattr(behaviour, "load", lambda name: {"rows": [shown]})
    text = behaviour.behaviour_of("torch")
    assert "| a use: it does. | ✓ | (1) | (1) | – | (2) |" in text
    assert "1. ``ValueError: … cannot`` – So it is.\n2. It does not hold: ``off``" in text
