"""`fusedbun plan`, as its users call it."""

import json
import re
import struct
import subprocess
import sys

import pytest

import fusedbun
from fusedbun.recipes import RECIPES
from fusedbun.tools.cli import main

ABSENT = (
    "import sys; sys.modules.update({name}=None); from fusedbun.tools.cli import main; sys.exit(main(sys.argv[1:]))"
)


def shown(capsys, *arguments):
    """Runs the command; returns what it prints."""
    assert main(["plan", *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refused(capsys, *arguments):
    """Runs the command with what it refuses; returns its one line on stderr."""
    try:
        code = main(["plan", *map(str, arguments)])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("fusedbun plan: error: ")
    assert err.count("\n") == 1
    return err


def without(library, *arguments):
    command = [sys.executable, "-c", ABSENT.format(name=library), "plan", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def file(tmp_path):
    """A safetensors file of one matrix in bfloat16."""
    header = json.dumps({"layer.weight": {"dtype": "BF16", "shape": [64, 32], "data_offsets": [0, 4096]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4096))
    return path


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(["plan", "--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert "\nexamples:\n  fusedbun plan gpt2\n" in out
    assert all(name in out for name in (*RECIPES, "adamw"))
    assert "Activations are not counted" in out
    assert max(map(len, out.splitlines())) <= 88


def test_the_examples_of_the_help_that_need_no_files(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    lines = re.findall(r"^  fusedbun plan (.+)$", capsys.readouterr().out, re.MULTILINE)
    runnable = [line.replace("'", "").split() for line in lines if "path/" not in line and ".safetensors" not in line]
    assert len(runnable) == 5
    for arguments in runnable:
        assert "Not counted: activations" in shown(capsys, *arguments)


def test_the_command_shows_what_the_function_finds(capsys, file):
    plan = fusedbun.plan(file, ["sm3", "adamw"], threads=1, budget="1GiB")
    arguments = (file, "--optimizer", "sm3", "AdamW", "--threads", 1, "--budget", "1GiB")
    assert shown(capsys, *arguments) == f"{plan}\n"
    assert json.loads(shown(capsys, *arguments, "--json")) == json.loads(json.dumps(plan.as_dict()))


def test_shapes_with_and_without_names(capsys):
    found = json.loads(
        shown(capsys, "embed.weight=50x8", "8x8", "8", "--optimizer", "sm3", "--sparse", "embed*", "--json")
    )
    assert (found["parameters"], found["tensors"], found["sparse"]) == (50 * 8 + 8 * 8 + 8, 3, ["embed.weight"])


def test_stacks(capsys):
    found = json.loads(
        shown(capsys, "experts=4x8x16", "router=4x8", "--stacked", "exp*", "--optimizer", "sm3", "--json")
    )
    assert found["estimates"][0]["state"] == 4 * (4 * (8 + 16) + (4 + 8))


def test_networks_by_name(capsys):
    assert shown(capsys, "gpt2", "--optimizer", "sm3").startswith("124,439,808 float32 parameters in 148 tensors;")
    assert shown(capsys, "resnet50", "--dtype", "bfloat16").startswith("25,557,032 bfloat16 parameters in 161 tensors;")


def test_settings_of_ones_own(capsys):
    setting = "fusedbun:momentum_dtype=int8,lagged=True,momentum_beta=0.8"
    lion = "decoupled_lionw:betas=(0.9, 0.95)"
    found = json.loads(shown(capsys, "64x64", "--optimizer", setting, lion, "--json"))["estimates"]
    assert found[0]["hyperparameters"] == {"momentum_dtype": "int8", "lagged": True, "momentum_beta": 0.8}
    assert found[2]["hyperparameters"] == {"betas": [0.9, 0.95]}


def test_only_what_fits(capsys):
    some = shown(capsys, "gpt2", "--budget", "700MiB", "--only-fitting")
    assert "SM3" in some
    assert "MupAdam " not in some
    none = shown(capsys, "gpt2", "--budget", "1MiB", "--only-fitting", "--optimizer", "sm3", "--threads", 1)
    assert "Nothing fits in 1.00 MiB." in none
    assert re.search(r"The least takes \d{3}\.\d\d MiB: SM3, no momentum with gradient release\.", none)


def test_a_chart(capsys, tmp_path):
    chart = tmp_path / "memory.png"
    assert shown(capsys, "64x64", "--chart", chart, "--budget", "1MiB").endswith(f"chart: {chart}\n")
    assert chart.read_bytes().startswith(b"\x89PNG")
    chart.unlink()
    json.loads(shown(capsys, "64x64", "--chart", chart, "--json"))
    assert chart.exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "the following arguments are required: MODEL"),
        (["gpt3"], "there is no file or folder 'gpt3'; it must be one, a network (gpt2, resnet50), or shapes such as"),
        (["absent.safetensors"], "there is no file or folder 'absent.safetensors'"),
        (["8x8", "gpt2"], "where several are given, each must be a shape such as 768x3072"),
        (["a=8x8", "a=8"], "each shape must have a name of its own, but 'a' is there twice"),
        (["a=8x-8"], "the shape of 'a' must be of whole numbers from 0 up, but it is (8, -8)"),
        (["9" * 30], "must have at most 2**59 elements"),
        (["8x8", "--optimizer", "sm33"], "but it is 'sm33'; did you mean 'sm3'?"),
        (["8x8", "--optimizer", "sm3:momentum"], "must be NAME or NAME:KEY=VALUE,…, but it is 'sm3:momentum'"),
        (["8x8", "--optimizer", "sm3:momentum=2"], "sm3: momentum must lie in [0, 1), but it is 2"),
        (["8x8", "--optimizer", "sm3:moment=2"], "its arguments are momentum, beta, eps, statistic, momentum_dtype"),
        (["8x8", "--budget", "24"], "argument --budget: must be a size above 0, a number and one of the units B, KiB"),
        (["8x8", "--budget", "much"], "such as 24GiB, but it is 'much'"),
        (["8x8", "--only-fitting"], "argument --only-fitting: needs a --budget to fit in"),
        (["8x8", "--dtype", "int8"], "dtype must be one of float64, float32, bfloat16, float16, but it is 'int8'"),
        (["8x8", "--sparse", "embed*"], "'embed*' matches none of the 1: '0'"),
        (["8x8", "--stacked", "embed*"], "--stacked must match trained parameters of two or more axes, but 'embed*'"),
        (["8x8", "--tokens", "0"], "argument --tokens: must be a whole number of at least 1"),
        (["8x8", "--threads", "x"], "argument --threads: must be a whole number of at least 1"),
        (["8x8", "--chart", "/absent/chart.png"], "argument --chart: cannot write '/absent/chart.png': No such file"),
        (["/"], "/ has no safetensors files"),
        (["/dev/null"], "/dev/null must be a file or a folder"),
    ],
)
def test_what_is_refused(capsys, arguments, reason):
    assert reason in refused(capsys, *arguments)


def test_a_corrupt_file_is_refused(capsys, file):
    file.write_bytes(file.read_bytes()[:-1])
    assert "model.safetensors is no safetensors file, or a part of one" in refused(capsys, file)
    file.write_bytes(b"")
    assert "header too small" in refused(capsys, file)


def test_a_file_that_may_not_be_read(capsys, file, monkeypatch):
    def forbid(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("fusedbun.tools.plan.sources._read", forbid)
    assert f"cannot read '{file}': Permission denied" in refused(capsys, file)


@pytest.mark.parametrize(("library", "title"), [("safetensors", "safetensors"), ("matplotlib", "matplotlib")])
def test_a_library_that_is_missing_is_named(file, library, title):
    done = without(library, file, "--chart", file.with_suffix(".png"))
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{title} is not installed; " in done.stderr
    assert done.stderr.endswith("needs: pip install 'fusedbun[plan]'\n")
    assert done.stderr.count("\n") == 1
    assert without(library, "8x8").returncode == 0


def test_it_is_among_the_commands(capsys):
    assert main([]) == 0
    assert "  fusedbun plan  " in capsys.readouterr().out
