"""The schedule: how many passes a chain takes, and in which order.

The family's programs and schedules lie as text in `golden/`. After a change that is meant to alter them,

    FUSEDBUN_WRITE_GOLDEN=1 python -m pytest tests/compiler/test_schedule.py

writes them anew, and `git diff` shows what the change does.
"""

import os
import re
from pathlib import Path

import pytest
from cases import CASES
from rules import rule, stateful

from fusedbun import Slot, recipes
from fusedbun.compiler import UnschedulableError, schedule, trace
from fusedbun.compiler.graph import Span

GOLDEN = Path(__file__).parent / "golden"
RECOMMENDED = {"centralize": True, "use_rms": True, "nesterov": True}
FAMILY = {
    "sm3": (recipes.sm3(), 2),
    "sm3_momentum": (recipes.sm3(momentum=0.9, beta=0.9), 2),
    "fusedbun_recommended": (recipes.fusedbun(**RECOMMENDED), 2),
    "fusedbun_recommended_convolution": (recipes.fusedbun(**RECOMMENDED), 4),
    "fusedbun_lagged": (recipes.fusedbun(**RECOMMENDED, lagged=True), 2),
    "fusedbunw": (recipes.fusedbunw(), 2),
    "fusedbun_clipped": (recipes.fusedbun(**RECOMMENDED, clip_rms=0.5), 2),
    "decoupled_lionw": (recipes.decoupled_lionw(weight_decay=1e-4, initial_lr=1e-4), 2),
    "mup_adamw": (recipes.mup_adamw(mup=lambda path, param: "weight", weight_decay=0.1, initial_lr=0.1), 2),
    "scaled_optum": (recipes.scaled_optum(weight_decay=0.1), 2),
    "ternary_vote": (recipes.ternary_vote(threshold=2), 2),
}
PASSES = {
    "sm3": 1,
    "sm3_momentum": 1,
    "fusedbun_recommended": 2,
    "fusedbun_recommended_convolution": 2,
    "fusedbun_lagged": 1,
    "fusedbunw": 1,
    "fusedbun_clipped": 3,
    "decoupled_lionw": 1,
    "mup_adamw": 1,
    "scaled_optum": 1,
    "ternary_vote": 1,
}


class Shaped:
    """A parameter to the eyes of a rule among the hyper-parameters."""

    def __init__(self, ndim):
        self.shape, self.ndim = (8,) * ndim, ndim


def program(name):
    chain, ndim = FAMILY[name]
    return trace(chain.at(("weight",), Shaped(ndim)), ndim)


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_is_scheduled_as_written_down(name):
    traced = program(name)
    text = f"{traced}\n\n{schedule(traced)}\n"
    path = GOLDEN / f"{name}.txt"
    if "FUSEDBUN_WRITE_GOLDEN" in os.environ:
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", FAMILY)
def test_passes_over_memory(name):
    assert len(schedule(program(name)).passes) == PASSES[name]


@pytest.mark.parametrize("tiles", ["rows", "columns"])
@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_value_is_ready_before_it_is_used(case, ndim, tiles):
    scheduled = schedule(trace(case.chain.at((), Shaped(ndim)), ndim), tiles)
    last = len(scheduled.passes) - 1
    for t, work in enumerate(scheduled.passes):
        made = set()
        for sweep in work.sweeps:
            # a division or a root is not computed again, but everything else a sweep computes for itself
            in_sweep = {v for v in work.buffer if v in made}
            for v in sweep.full:
                assert all(a in in_sweep for a in v.args if a.span == Span.FULL) or v in work.buffer
                in_sweep.add(v)
            assert {v.args[0] for v in sweep.reductions} <= in_sweep
            assert {v for _, v in sweep.stores} <= in_sweep
            made |= in_sweep
            assert t == last or not sweep.stores
        assert t == last or not work.stores
    stored = [name for sweep in scheduled.passes[-1].sweeps for name, _ in sweep.stores]
    stored += [name for name, _ in (*scheduled.passes[-1].stores, *scheduled.stores)]
    assert sorted(stored) == sorted(scheduled.program.outputs)


def test_what_depends_on_no_other_element_is_known():
    elementwise = {name for name in FAMILY if schedule(program(name)).is_elementwise}
    assert elementwise == {"decoupled_lionw", "mup_adamw", "scaled_optum", "ternary_vote"}


def test_blocks_of_columns_swap_the_roles():
    def sweeps(tiles):
        scheduled = schedule(trace(rule(lambda xp, u: u - xp.mean(u, axis=(0,), keepdims=True)), 2), tiles)
        return [len(work.sweeps) for work in scheduled.passes]

    assert sweeps("rows") == [1, 1]
    assert sweeps("columns") == [2]


def test_blocks_of_columns_do_not_suit_reductions_along_some_of_the_columns():
    traced = trace(recipes.sm3(), 3)
    schedule(traced)
    with pytest.raises(UnschedulableError, match="tiles of columns do not suit reductions along some of the columns"):
        schedule(traced, "columns")


def test_a_slot_is_read_whole_before_its_rows_are_written():
    """The sum over `row` waits for `total`, and so must the pass that writes `row`."""

    def update(xp, u, state):
        total = xp.sum(u, axis=(0, 1), keepdims=True)
        row = state["row"] + xp.sum(u, axis=(1,), keepdims=True)
        return {"row": row, "one": xp.sum(state["row"] * total, axis=(0, 1), keepdims=True)}

    scheduled = schedule(trace(stateful({"row": Slot((0,)), "one": Slot(())}, update), 2))
    assert len(scheduled.passes) == 2
    assert scheduled.program.outputs["rule.one"] in scheduled.between[1]
    assert [name for name, _ in scheduled.passes[1].stores] == ["rule.row"]


def test_the_document_shows_what_is_printed():
    document = (Path(__file__).parents[2] / "docs" / "compiler.md").read_text()
    program = trace(recipes.sm3(), 2)
    printed = re.findall(r"```text\n(.*?)\n```", document, re.DOTALL)
    assert printed == [str(program), str(schedule(program))]
