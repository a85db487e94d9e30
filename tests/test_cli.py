"""The command `fusedbun`, as its users call it."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from sweeps import long, only, sweep

import fusedbun
from fusedbun.recipes import RECIPES
from fusedbun.tools.cli import main, parser
from fusedbun.tools.cli.listing import SHAPE
from fusedbun.tools.shared.files import write_atomically
from fusedbun.tools.train.network import digits
from fusedbun.tools.train.optimizers import OPTIMIZERS

PNG = b"\x89PNG\r\n"


COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
absent, arguments = sys.argv[1].split(), sys.argv[2:]
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from fusedbun.tools.cli import main
sys.exit(main(arguments))
"""


def start(*arguments, absent=""):
    """Starts the command as a process of its own, without colours, where some libraries are not installed."""
    command = [sys.executable, "-c", COMMAND, absent, *map(str, arguments)]
    environment = {**os.environ, "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def run_command(*arguments, absent):
    """Runs the command where libraries are not installed; returns the exit code, stdout and stderr."""
    process = start(*arguments, absent=absent)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def refused(capsys, *arguments):
    """Runs the command with options that it refuses; returns its one line on stderr."""
    try:
        code = main(["train", *map(str, arguments)])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith(("fusedbun train: error: ", "fusedbun: error: "))
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("arguments", [[], ["--help"], ["train", "--help"], ["list", "--help"]])
def test_help(capsys, arguments):
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert "\nexamples:\n  fusedbun " in out
    assert max(map(len, out.splitlines())) <= 88


def test_help_names_every_default(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    help_text = " ".join(capsys.readouterr().out.split())
    settings = vars(parser().parse_args(["train"]))
    for option in ("framework", "optimizer", "compare", "epochs", "batch_size", "seed", "dtype", "output"):
        assert f"--{option.replace('_', '-')}" in help_text
        value = settings[option]
        assert f"(default: {' '.join(value) if isinstance(value, list) else value}" in help_text


def test_help_names_every_optimizer_and_its_learning_rate(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    for name, entry in OPTIMIZERS.items():
        assert re.search(rf"^  {name} +{entry.learning_rate:g}( |$)", out, re.MULTILINE)


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"fusedbun {fusedbun.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"], ["list"], ["list", "--json"]])
def test_help_and_list_need_numpy_only(arguments):
    code, out, err = run_command(*arguments, absent="torch jax optax flax sklearn rich matplotlib")
    assert (code, err) == (0, "")
    assert out.startswith(("usage: fusedbun", "fusedbun ", "torch class", "{"))


def listed(capsys):
    assert main(["list", "--json"]) == 0
    return {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["optimizers"]}


def test_list_has_every_optimizer_as_it_can_be_imported(capsys):
    entries = listed(capsys)
    assert list(entries) == list(RECIPES)
    for name, entry in entries.items():
        module, _, torch_class = entry["torch_class"].rpartition(".")
        assert getattr(import_module(module), torch_class).__name__ == RECIPES[name].torch_class
        module, _, factory = entry["optax_factory"].rpartition(".")
        assert getattr(import_module(module), factory).__name__ == name


def test_list_gives_the_defaults_and_the_source(capsys):
    entries = listed(capsys)
    numbers = {"momentum": 0.0, "beta": 0.0, "eps": 1e-30}
    assert entries["sm3"]["defaults"] == {**numbers, "statistic": "max", "momentum_dtype": None}
    assert (entries["sm3"]["lr"], entries["fusedbun"]["lr"]) == (0.1, None)
    assert entries["sm3"]["source"] == "Anil, Gupta, Koren, Singer 2019 (arXiv 1901.11150)."
    assert entries["ternary_vote"]["lr_is_fixed"]
    assert "initial_lr" not in entries["decoupled_lionw"]["defaults"]


@pytest.mark.parametrize("name", RECIPES)
def test_list_counts_the_bytes_that_torch_holds(capsys, name):
    for case in listed(capsys)[name]["state_bytes_per_parameter"]:
        param = torch.nn.Parameter(torch.zeros(SHAPE))
        given = {"mup": {"w": "weight"}} if "mup" in RECIPES[name].defaults else {}
        rate = {} if RECIPES[name].fixed_lr else {"lr": 0.1}
        optimizer = getattr(fusedbun, RECIPES[name].torch_class)([("w", param)], **rate, **case["settings"], **given)
        param.grad = torch.ones(SHAPE)
        optimizer.step()
        held = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
        assert case["bytes"] * param.numel() == held


def test_list_as_a_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert "bytes of state a parameter" in out
    assert re.search(r"^fusedbun.SM3 +fusedbun_jax.sm3 +0.01 \(4.01 with momentum=0.9\)$", out, re.MULTILINE)
    assert re.search(r"^fusedbun.TernaryVote +fusedbun_jax.ternary_vote +1.00$", out, re.MULTILINE)
    assert "defaults: lr required, eps=1e-08, beta_decay=0.8" in out
    assert "source:   Chen et al. 2023 (arXiv 2302.06675)." in out


def test_list_to_a_reader_that_goes_away():
    process = start("list")
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=60), err) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lr", "-1"], "argument --lr: must be a number in (0, inf), but it is '-1'"),
        (["--lr", "0"], "argument --lr: must be a number in (0, inf)"),
        (["--lr", "nan"], "argument --lr: must be a number in (0, inf)"),
        (["--lr", "inf"], "argument --lr: must be a number in (0, inf)"),
        (["--lr", "fast"], "argument --lr: must be a number in (0, inf), but it is 'fast'"),
        (["--epochs", "0"], "argument --epochs: must be a whole number of at least 1, but it is '0'"),
        (["--epochs", "1.5"], "argument --epochs: must be a whole number of at least 1"),
        (["--batch-size", "-3"], "argument --batch-size: must be a whole number of at least 1"),
        (["--batch-size", "100000"], "argument --batch-size: must be at most 1258, the number of training images"),
        (["--seed", "-1"], "argument --seed: must be a whole number of at least 0"),
        (["--framework", "numpy"], "argument --framework: invalid choice: 'numpy'"),
        (["--optimizer", "sgd"], "argument --optimizer: invalid choice: 'sgd'"),
        (["--optimizer", "ternary_vote"], "argument --optimizer: ternary_vote steps weights of -1, 0 and +1"),
        (["--compare", "ternary_vote"], "examples/ternary.py in fusedbun's repository trains a network"),
        (["--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
        (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
        (["--lr"], "argument --lr: expected one argument"),
    ],
)
def test_bad_options_get_one_line(capsys, arguments, said):
    assert said in refused(capsys, *arguments)


def test_unknown_command_gets_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["trian"])
    err = capsys.readouterr().err
    assert "invalid choice: 'trian'" in err
    assert err.count("\n") == 1


def test_output_that_is_a_file(capsys, tmp_path):
    file = tmp_path / "notes"
    file.write_text("mine")
    assert f"argument --output: cannot write in '{file}'" in refused(capsys, "--output", file)
    assert "Not a directory" in refused(capsys, "--output", file / "below")
    assert file.read_text() == "mine"


@sweep("framework", ["torch", "flax", "both"], short=only("both"))
def test_a_short_run(capsys, tmp_path, framework):
    output = tmp_path / "new" / "out"
    assert main(["train", "--framework", framework, "--epochs", "3", "--output", str(output)]) == 0
    out, _ = capsys.readouterr()
    written = json.loads((output / "results.json").read_text())
    frameworks = ["torch", "flax"] if framework == "both" else [framework]

    assert not written["interrupted"]
    assert written["settings"]["epochs"] == 3
    assert written["versions"]["numpy"]
    runs = written["runs"]
    named = [(run["optimizer"], run["framework"]) for run in runs]
    assert named == [(optimizer, where) for optimizer in ("fusedbunw", "adamw", "fusedbun") for where in frameworks]
    for run in runs:
        assert run["finished"]
        assert 0.7 < run["test_accuracy"] < 1
        assert run["curves"]["train"]["loss"][0] > run["curves"]["train"]["loss"][-1]
        assert run["curves"]["test"]["step"] == [19, 38, 57]
        assert run["curves"]["test"]["accuracy"][-1] == run["test_accuracy"]
        assert run["ms_per_step"] > 0
        assert f"{run['test_accuracy']:.2%}" in out
        assert f"{run['state_bytes']:,}" in out
    size = {run["optimizer"]: run["state_bytes"] for run in runs}
    assert size["adamw"] / size["fusedbun"] > 1.95
    assert size["adamw"] / size["fusedbunw"] > 7
    assert set(written["weight_difference"]) == (size.keys() if framework == "both" else set())
    assert ("differ by" in out) == (framework == "both")
    files = sorted(path.name for path in (output).iterdir())
    assert files == ["curves.png", "results.json"]
    assert (output / "curves.png").read_bytes().startswith(PNG)
    assert str(output / "results.json") in out


@long
def test_float64_in_both_trains_to_the_same_weights(capsys, tmp_path):
    main(["train", "--dtype", "float64", "--epochs", "1", "--output", str(tmp_path)])
    written = json.loads((tmp_path / "results.json").read_text())
    assert all(difference < 1e-9 for difference in written["weight_difference"].values())
    assert "float64" in capsys.readouterr().out


@sweep("name", OPTIMIZERS, short=only("fusedbun", "mup_adamw", "adamw"))
def test_every_optimizer_trains(tmp_path, name):
    arguments = ["--framework", "torch", "--optimizer", name, "--no-compare", "--epochs", "3"]
    assert main(["train", *arguments, "--output", str(tmp_path)]) == 0
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert run["learning_rate"] == OPTIMIZERS[name].learning_rate
    assert run["hyperparameters"] == json.loads(json.dumps(dict(OPTIMIZERS[name].hyperparameters)))
    assert run["test_accuracy"] > 0.8


@sweep("optimizer", OPTIMIZERS, short=only("decoupled_lionw"))
def test_the_table_fits_80_columns(capsys, monkeypatch, tmp_path, optimizer):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("fusedbun.tools.train.run.digits", lambda seed, shares: digits(seed, [0.2, 0.05])[:2])
    arguments = ["--dtype", "float64", "--epochs", "1", "--optimizer", optimizer, "--no-compare"]
    assert main(["train", *arguments, "--output", str(tmp_path)]) == 0
    table, _, _ = capsys.readouterr().out.partition("numbers:")
    assert "…" not in table
    for written in ("framework", "accuracy", "differ by", optimizer):
        assert written in table


def test_learning_rate_is_the_optimizer_s_and_not_the_other_s(tmp_path):
    main(["train", "--framework", "torch", "--lr", "1e-3", "--epochs", "1", "--output", str(tmp_path)])
    rates = {
        run["optimizer"]: run["learning_rate"] for run in json.loads((tmp_path / "results.json").read_text())["runs"]
    }
    assert rates["fusedbunw"] == 1e-3
    assert rates["adamw"] == 3e-3


@pytest.mark.parametrize("alone", [["--no-compare"], ["--optimizer", "adamw", "--compare", "adamw"]])
def test_one_optimizer_alone(tmp_path, alone):
    main(["train", "--framework", "torch", *alone, "--epochs", "1", "--output", str(tmp_path)])
    assert len(json.loads((tmp_path / "results.json").read_text())["runs"]) == 1


def test_a_run_that_diverges_is_written_as_valid_json(capsys, tmp_path):
    arguments = ["--framework", "torch", "--lr", "1e30", "--no-compare", "--epochs", "1", "--output", str(tmp_path)]
    assert main(["train", *arguments]) == 0

    def refuse(constant):
        raise AssertionError(constant)

    (run,) = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)["runs"]
    assert run["test_loss"] is None
    assert "nan" in capsys.readouterr().out


@sweep(
    ("library", "framework", "said"),
    [
        ("torch", "torch", "PyTorch is not installed; training in torch needs: pip install 'fusedbun[torch,train]'"),
        ("torch", "both", "pip install 'fusedbun[torch,flax,train]'"),
        ("flax", "flax", "Flax is not installed; training in flax needs: pip install 'fusedbun[flax,train]'"),
        ("optax", "flax", "optax is not installed"),
        ("sklearn", "torch", "scikit-learn is not installed"),
        ("rich", "torch", "rich is not installed"),
        ("matplotlib", "torch", "matplotlib is not installed"),
    ],
    short=lambda library, framework, said: library in ("torch", "flax", "rich"),
)
def test_a_missing_library_is_named_with_its_extra(tmp_path, library, framework, said):
    code, out, err = run_command("train", "--framework", framework, "--output", tmp_path / "out", absent=library)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@long
@pytest.mark.parametrize(("library", "framework"), [("torch", "flax"), ("jax", "torch")])
def test_a_framework_that_is_not_asked_for_need_not_be_there(tmp_path, library, framework):
    arguments = ["--framework", framework, "--epochs", "1", "--output", tmp_path]
    code, _, err = run_command("train", *arguments, absent=library)
    assert code == 0, err
    assert (tmp_path / "results.json").exists()


def test_ctrl_c_keeps_what_was_measured_in_torch_without_jax(tmp_path):
    process = start("train", "--framework", "torch", "--epochs", 100_000, "--output", tmp_path, absent="jax")
    assert "epoch 1 of 100000" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err == ""
    assert "interrupted" in out
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["interrupted"]
    (run,) = written["runs"]
    assert not run["finished"]
    assert len(run["curves"]["train"]["loss"]) >= 19
    assert math.isfinite(run["test_accuracy"])
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("write", ["write_json", "write_atomically"])
def test_results_that_cannot_be_written_are_shown_all_the_same(capsys, monkeypatch, tmp_path, write):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"fusedbun.tools.shared.files.{write}", fail)
    assert main(["train", "--framework", "torch", "--epochs", "1", "--no-compare", "--output", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert re.search(r"^fusedbunw +torch ", out, re.MULTILINE)
    assert err.endswith(f"error: argument --output: cannot write in '{tmp_path}': No space left on device\n")


@long
def test_a_reader_that_goes_away_gets_no_traceback(tmp_path):
    process = start("train", "--framework", "torch", "--epochs", "1", "--output", tmp_path)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    process.wait(timeout=300)
    assert "Traceback" not in err
    assert (tmp_path / "results.json").exists()


@pytest.mark.parametrize("where", ["run.digits", "in_torch.Trainer.step"])
def test_ctrl_c_before_anything_was_measured(capsys, monkeypatch, tmp_path, where):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"fusedbun.tools.train.{where}", interrupt)
    assert main(["train", "--framework", "torch", "--output", str(tmp_path)]) == 130
    assert capsys.readouterr() == ("", "fusedbun train: interrupted\n")
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(monkeypatch, tmp_path):
    path = tmp_path / "results.json"
    write_atomically(path, b"old")

    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no space left"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [Path(path)]
