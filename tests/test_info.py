"""`fusedbun info`: what it says agrees with what a step does."""

import json
import subprocess
import sys

import pytest
import torch

import fusedbun
from fusedbun.compiler.cpp import build, native
from fusedbun.recipes import RECIPES
from fusedbun.tools.cli import main

ABSENT = """
import sys; sys.modules.update(torch=None, jax=None)
from fusedbun.tools.cli import main; sys.exit(main(["info"]))
"""


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Neither built kernels nor a cache."""
    monkeypatch.setattr(build, "BUILT", tmp_path / "built")
    monkeypatch.setenv("FUSEDBUN_CACHE", str(tmp_path / "cache"))
    build._bundles.cache_clear()
    yield tmp_path
    build._bundles.cache_clear()


def told(capsys):
    assert main(["info", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def origins(found):
    return {kernel["from"] for kernels in found["optimizers"].values() for kernel in kernels.values()}


def test_it_names_every_optimizer_and_library(capsys):
    found = told(capsys)
    assert list(found["optimizers"]) == list(RECIPES)
    assert found["versions"]["fusedbun"] == fusedbun.__version__
    assert found["torch"]["threads"] == torch.get_num_threads()
    assert found["jax"]["backend"] == "cpu"
    assert found["cache"]["folder"] == str(build.cache_folder())


def test_it_compiles_nothing(capsys, fresh):
    found = told(capsys)
    assert found["driver"] == "compile"
    assert origins(found) == {"compile"}
    assert not list(fresh.iterdir())


def test_what_a_step_has_compiled_is_in_the_cache(capsys, fresh):
    build.library(build.DRIVER.read_text())
    chain = fusedbun.recipes.sm3()
    native._KERNELS.clear()
    native.kernel(chain, 2, (0, 1), "float32")
    found = told(capsys)
    assert found["driver"] == "cache"
    assert found["cpu"]["registers"] in ("AVX-512", "AVX2", "baseline")
    assert found["optimizers"]["sm3"]["matrix"] == {"from": "cache"}
    assert found["optimizers"]["sm3"]["vector"] == {"from": "compile"}
    assert found["cache"]["libraries"] == 2
    assert found["cache"]["bytes"] > 0


def test_what_came_with_the_package(capsys, fresh):
    registers = native.registers()
    from fusedbun.compiler.cpp import family

    build.compile_in(fresh / "built", build.DRIVER.read_text())
    code = build.bundle([family.emit(family.trace(fusedbun.recipes.sm3(), 2, dtype="float32"))], registers)
    build.compile_in(fresh / "built", code, registers, build.bundle_prefix(registers))
    found = told(capsys)
    assert found["driver"] == "package"
    assert found["optimizers"]["sm3"]["matrix"] == {"from": "package"}
    assert found["package"]["libraries"] == 2


def test_without_a_compiler(capsys, monkeypatch, fresh):
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    found = told(capsys)
    assert found["compiler"] is None
    assert found["driver"] == "definition"
    assert origins(found) == {"definition"}
    assert main(["info"]) == 0
    assert "no code: tiles of rows in torch, the definition in JAX; there is no C++ compiler" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_compiler_that_does_not_run(capsys, monkeypatch, fresh):
    monkeypatch.setattr(build, "find_compiler", lambda: ("no-such-compiler",))
    assert told(capsys)["compiler"]["version"].startswith("does not run: ")


def test_as_text(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for word in ("versions", "processor", "compiler", "driver", "package", "cache", "torch", "jax", *RECIPES):
        assert f"\n{word} " in f"\n{out}"


def test_neither_torch_nor_jax_is_needed():
    done = subprocess.run([sys.executable, "-c", ABSENT], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\ntorch " not in done.stdout
    assert "\njax " not in done.stdout


def test_the_help_names_it(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "fusedbun info " in out
    assert "fusedbun bench " in out
