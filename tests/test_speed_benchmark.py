"""`fusedbun bench`: what it makes of the times, the order of the steps, and the command as its users call it."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from fusedbun.tools.bench import limits, measure
from fusedbun.tools.bench.contenders import LIMIT, OPTAX, TORCH, Arena, Contender, held_bytes
from fusedbun.tools.bench.measure import Effort, Measurement, Session, draw_turns
from fusedbun.tools.bench.results import Case, Results, draw, quotient
from fusedbun.tools.bench.settings import Settings
from fusedbun.tools.bench.shapes import GROUPS, NAMES, Workload, workloads
from fusedbun.tools.cli import main

PNG = b"\x89PNG\r\n"
TINY = Workload("tiny", "two tensors", ((3, 5), (7,)))


class Silent:
    """Nobody is told how far the measuring is."""

    def expect(self, steps):
        pass

    def proceed(self, doing):
        pass


class Fake:
    """Steps that say who stepped, and that may fail or be interrupted."""

    def __init__(self, name, log, fails_at=math.inf, error=KeyboardInterrupt):
        self.name, self.log, self.fails_at, self.error = name, log, fails_at, error

    def prepare(self):
        pass

    def step(self):
        self.log.append(self.name)
        if self.log.count(self.name) == self.fails_at:
            raise self.error("first line\nsecond line")

    def state_bytes(self):
        return 4 * TINY.parameters

    def temporaries(self):
        return None


def fake(name, log, path=TORCH, **how):
    return Contender(path, name, lambda arena: Fake(name, log, **how))


def session(contenders, anchors=1, rounds=4, **effort):
    arena = Arena.of(TINY.shapes, threads=1)
    return Session(arena, contenders[:anchors], contenders[anchors:], Effort(rounds, 10, **effort), Silent())


def a_case():
    """Three contenders with times whose medians and quotients can be worked out by hand."""
    reference = Measurement(Contender(TORCH, "reference", Fake), measure.MEASURED, state_bytes=8 * 22)
    reference.seconds = {0: 1.0, 1: 2.0, 2: 4.0}
    limit = Measurement(Contender(LIMIT, "bare", Fake), measure.MEASURED, state_bytes=0)
    limit.seconds = {0: 0.5, 1: 0.5, 2: 0.5}
    slow = Measurement(Contender(OPTAX, "slow", Fake, rereads=1), measure.MEASURED, state_bytes=0, temporaries=2**20)
    slow.seconds = {0: 3.0, 2: 4.0}
    absent = Measurement(Contender(OPTAX, "absent", Fake), measure.NOT_INSTALLED, "pip install absent")
    return Case(TINY, 1, [reference, limit, slow, absent])


def test_medians_and_quotients():
    case = a_case()
    reference, limit, slow, absent = case.measurements
    assert TINY.parameters == 22
    assert (case.median(reference), case.median(slow), case.median(absent)) == (2, 3.5, None)
    assert (case.spread(reference), case.spread(slow), case.spread(absent)) == (1.5, 0.5, None)
    assert case.ratio(reference) == 1
    assert case.ratio(slow) == (3 / 1 + 4 / 4) / 2  # and not 3.5 / 2
    assert case.ratio(absent) is None
    assert (case.traffic(limit), case.traffic(slow), case.traffic(reference)) == (12, 16, 28)
    assert case.bandwidth(slow) == 16 * 22 / 3.5
    assert case.share(limit) == 1
    assert case.share(slow) == pytest.approx(16 / 12 / ((3 / 0.5 + 4 / 0.5) / 2))


def test_the_share_is_of_the_limit_whose_bytes_are_nearest():
    case = a_case()
    wide = Measurement(Contender(LIMIT, "wide", Fake), measure.MEASURED, state_bytes=8 * 22)
    wide.seconds = {0: 0.5, 1: 1.0, 2: 2.0}
    case.measurements.append(wide)
    assert case.share(case.reference) == 0.5


def test_a_quotient_needs_a_round_that_both_have():
    assert quotient({0: 1.0}, {1: 1.0}) is None
    assert quotient({0: 1.0, 1: 9.0}, {0: 2.0, 2: 1.0}) == 0.5


def test_everyone_steps_once_in_every_round_in_an_order_drawn_anew():
    turns = list(draw_turns(dict.fromkeys(range(6), 20), 20))
    assert all(sorted(turn) == list(range(6)) for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 10
    assert turns == list(draw_turns(dict.fromkeys(range(6), 20), 20))


def test_the_slow_take_part_in_fewer_rounds_spread_evenly():
    turns = list(draw_turns({0: 12, 1: 3, 2: 4}, 12))
    assert Counter(one for turn in turns for one in turn) == {0: 12, 1: 3, 2: 4}
    assert [k for k, turn in enumerate(turns) if 1 in turn] == [3, 7, 11]
    assert Effort(20, 10).rounds_of(1e-3) == 20
    assert Effort(20, 10).rounds_of(1.0) == 10
    assert Effort(20, 10).rounds_of(60.0) == measure.LEAST_ROUNDS


def test_steps_are_interleaved():
    log = []
    session([fake(name, log) for name in "abc"]).run()
    rounds = log[-12:]
    assert all(sorted(rounds[k : k + 3]) == ["a", "b", "c"] for k in range(0, 12, 3))


def test_what_does_not_fit_in_memory_is_measured_in_batches_with_the_anchors():
    log = []
    measured = session([fake(name, log) for name in "abc"], rounds=3, memory=0)
    measured.run()
    a, b, c = (list(one.seconds) for one in measured.measurements)
    assert (a, b, c) == ([0, 1, 2, 3, 4, 5], [0, 1, 2], [3, 4, 5])


def test_a_missing_package_and_a_fault_are_reported_and_the_rest_is_measured():
    log = []
    missing = Contender(TORCH, "missing", Fake, module="no_such_module", package="no-such-package")
    faulty = fake("faulty", log, fails_at=1, error=ValueError)
    tired = fake("tired", log, fails_at=6, error=RuntimeError)
    measured = session([fake("a", log), missing, faulty, tired])
    measured.run()
    a, missing, faulty, tired = measured.measurements
    assert (a.status, len(a.seconds)) == (measure.MEASURED, 4)
    assert (missing.status, missing.reason) == ("not installed", "pip install no-such-package")
    assert (faulty.status, faulty.reason, faulty.seconds) == ("failed", "ValueError: first line", {})
    assert (tired.status, len(tired.seconds)) == ("failed", 1)


def strictly(text):
    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def test_results_are_valid_json_after_an_interrupt():
    log = []
    measured = session([fake("a", log), fake("b", log, fails_at=7)])
    with pytest.raises(KeyboardInterrupt):
        measured.run()
    results = Results({"rounds": 4}, {"cpu": "a CPU"}, [Case(TINY, 1, measured.measurements)], interrupted=True)
    written = strictly(json.dumps(results.report(), allow_nan=False))
    a, b = written["cases"][0]["contenders"]
    assert written["interrupted"]
    assert (b["status"], len(b["ms"])) == ("measured", 2)
    assert len(a["ms"]) >= 2
    assert draw(results).startswith(PNG)


def test_workloads():
    sizes = {w.name: (len(w.shapes), w.parameters) for w in workloads(["all"])}
    assert sizes["gpt2"] == (148, 124_439_808)
    assert sizes["resnet50"] == (161, 25_557_032)
    assert sizes["small"] == (400, 200 * (64 * 64 + 64))
    assert [n for name, (_, n) in sizes.items() if name.startswith("linear")] == [10**k for k in range(5, 9)]
    for workload in workloads(["odd"], elements=2_000_000):
        assert workload.parameters == pytest.approx(2_000_000, rel=0.05)
    assert set(GROUPS["all"]) == set(NAMES)
    assert workloads(["linear"], largest=10**9)[-1].parameters == 10**9


def test_bytes_in_nested_state_are_counted_once():
    array = Arena.of(((10,),), 1).params[0]
    assert held_bytes({0: {"a": array, "again": [array], "step": 3}}) == 40


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", [name for name, _, _ in limits._LOOPS])
def test_the_limit_s_loops_touch_every_element_once(name, threads):
    try:
        limits.library()
    except limits.NoCompilerError as error:
        pytest.skip(str(error))
    (contender,) = (one for one in limits.limits() if one.name == name)
    shapes = ((1001, 137), (5,), (3, 70_001)) if threads == 2 else TINY.shapes
    arena = Arena.of(shapes, threads)
    for p, g in zip(arena.params, arena.grads, strict=True):
        p[...], g[...] = 0, 1
    loop = contender.make(arena)
    loop.step()
    expected = -1e-6
    assert all(p.min() == p.max() == pytest.approx(expected, rel=1e-5) for p in arena.params)
    assert loop.state_bytes() == 4 * sum(p.size for p in arena.params) * {"p += s*g": 0, "Adam": 2}.get(name, 1)


def test_no_compiler_is_said_in_one_line(monkeypatch):
    limits.library.cache_clear()
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(limits.NoCompilerError, match=r"no C compiler: 'no-such-compiler' was not found; install one"):
        limits.library()


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'error: no luck' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    limits.library.cache_clear()
    with pytest.raises(limits.NoCompilerError, match="failed: error: no luck"):
        limits.library()
    assert list((tmp_path / "fusedbun").iterdir()) == []


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "--help"])
    out, err = capsys.readouterr()
    assert err == ""
    assert "\nexamples:\n  fusedbun bench" in out
    assert max(map(len, out.splitlines())) <= 88
    for option in Settings.__dataclass_fields__:
        assert f"--{option}" in out
    for name in NAMES:
        assert name in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workload", "gpt3"], "argument --workload: invalid choice: 'gpt3'"),
        (["--threads", "0"], "argument --threads: must be a whole number of at least 1, but it is '0'"),
        (["--threads", "100000"], "argument --threads: must be at most"),
        (["--only", "(SM3"], "argument --only: must be a regular expression, but '(SM3' is none"),
        (["--only", "AdamZ", "--framework", "torch"], "argument --only: no contender's path and name match 'AdamZ'"),
        (["--rounds", "many"], "argument --rounds: must be a whole number of at least 1, but it is 'many'"),
        (["--workload", "linear", "--largest", str(10**13)], "argument --workload: linear 1e13 needs"),
    ],
)
def test_mistakes_get_one_line(capsys, tmp_path, arguments, said):
    try:
        code = main(["bench", "--output", str(tmp_path / "out"), *arguments])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("fusedbun bench: error: ")
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_output_that_is_a_file(capsys, tmp_path):
    file = tmp_path / "notes"
    file.write_text("mine")
    assert main(["bench", "--framework", "torch", "--output", str(file)]) == 2
    assert f"fusedbun bench: error: argument --output: cannot write in '{file}'" in capsys.readouterr().err


# One process of its own: to measure on other threads JAX is started anew, which other tests' arrays would not survive.
COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
import fusedbun.tools.bench.shapes as shapes
shapes._SHAPED["small"] = ("four tiny tensors", lambda n: ((8, 8), (8,), (4, 3, 3, 3), (2, 2)))
from fusedbun.tools.cli import main
sys.exit(main(["bench", "--workload", "small", *sys.argv[1:]]))
"""


def start(*arguments):
    command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    environment = {**os.environ, "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_a_tiny_run(tmp_path):
    only = "^fusedbun (SM3|Fusedbun)$|torch SGD|lion-pytorch|^fusedbun_jax sm3$|optax sgd"
    process = start("--only", only, "--rounds", 3, "--budget", 1, "--output", tmp_path / "new")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    written = strictly((tmp_path / "new/speed.json").read_text())
    (case,) = written["cases"]
    found = {(one["path"], one["name"]): one for one in case["contenders"]}

    assert not written["interrupted"]
    assert written["machine"]["versions"]["torch"]
    assert written["machine"]["cpu"]
    assert (case["workload"], case["tensors"], case["reference"]) == ("small", 4, "torch AdamW, fused")
    assert {path for path, _ in found} >= {"limit", "fusedbun", "torch", "fusedbun_jax", "optax", "packages for torch"}
    assert found["torch", "AdamW, fused"]["ratio_to_reference"] == 1
    assert found["fusedbun", "Fusedbun"]["bytes_per_parameter"] > 24
    assert found["optax", "sgd"]["bytes_per_parameter"] == 12
    for one in found.values():
        if one["path"] != "limit" or one["status"] == "measured":
            assert one["status"] == "measured", one
            assert (one["rounds"], len(one["ms"])) == ([0, 1, 2], 3)
            assert one["median_ms"] > 0
            assert one["name"] in out
    assert (tmp_path / "new/speed.png").read_bytes().startswith(PNG)
    assert str(tmp_path / "new/speed.json") in out
    assert err.startswith("measuring four tiny tensors")
    assert "  round 1 of 3" in err


@pytest.mark.long
def test_ctrl_c_keeps_what_was_measured(tmp_path):
    process = start("--framework", "torch", "--only", "SGD", "--rounds", 10**7, "--budget", 10**6, "--output", tmp_path)
    while "round 1 of" not in process.stderr.readline():
        pass
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 130
    written = strictly((tmp_path / "speed.json").read_text())
    assert written["interrupted"]
    assert written["cases"][0]["contenders"][0]["ms"]
    assert "interrupted" in out
