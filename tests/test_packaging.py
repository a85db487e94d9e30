"""What is installed: with a compiler there are kernels in it, without one there are none, and both step."""

import os
import shutil
import subprocess
import sys
import sysconfig
from itertools import product
from pathlib import Path
from zipfile import ZipFile

import pytest
from sweeps import only, sweep

from fusedbun.compiler.cpp import build, family, native
from fusedbun.compiler.cpp.module import TYPES, emit
from fusedbun.compiler.trace import trace
from fusedbun.recipes import RECIPES

ROOT = Path(__file__).parent.parent
PARTS = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "fusedbun", "fusedbun_jax")
# In a copy of the source, so that it takes seconds to compile.
FEWER = """
from dataclasses import replace
RECIPES = {name: replace(RECIPES[name], compiled=RECIPES[name].compiled[:2]) for name in ("fusedbun", "sm3")}
RECIPES = {name: replace(recipe, compiled_for_networks=()) for name, recipe in RECIPES.items()}
TYPES = {"float32": TYPES["float32"]}
"""
# Steps with what is installed, and with the definition; prints where fusedbun is and how much is in the cache.
STEP = """
import sys, torch, fusedbun
from pathlib import Path
from fusedbun.compiler.cpp import build

def stepped(make, implementation):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in [(), (17,), (64, 32), (8, 4, 3, 3)]]
    optimizer = make(params, implementation=implementation)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in params])

recommended = dict(lr=0.1, centralize=True, use_rms=True, nesterov=True)
for make in (lambda p, **more: fusedbun.Fusedbun(p, **recommended, **more), fusedbun.SM3):
    torch.testing.assert_close(stepped(make, IMPLEMENTATION), stepped(make, "definition"))
print(Path(fusedbun.__file__).parent.parent, len(list(build.cache_folder().glob("*.so"))))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the source with fewer kernels."""
    copy = tmp_path_factory.mktemp("source")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__", "built"))
        else:
            shutil.copy(ROOT / part, copy)
    with (copy / "fusedbun" / "compiler" / "cpp" / "family.py").open("a") as file:
        file.write(FEWER)
    return copy


def run(*command, compiler, cwd, **environment):
    """Runs Python where there is a compiler, or none."""
    environment = {**os.environ, **environment} | ({} if compiler else {"PATH": str(cwd), "CXX": ""})
    done = subprocess.run([sys.executable, *command], env=environment, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def wheel(source, folder, compiler):
    """Builds a wheel of a copy of the source; returns it and what was said."""
    copy = shutil.copytree(source, folder / "copy")
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--verbose")
    done = run("-m", "pip", "wheel", *offline, "--wheel-dir", str(folder), str(copy), compiler=compiler, cwd=folder)
    (made,) = folder.glob("*.whl")
    return made, done.stdout + done.stderr


def steps(made, folder, compiler, implementation):
    """Installs a wheel and steps with it; returns how many libraries were compiled for that, and what was said."""
    target = folder / "target"
    run("-m", "pip", "install", "--no-deps", "--no-index", "--target", target, made, compiler=compiler, cwd=folder)
    code = STEP.replace("IMPLEMENTATION", repr(implementation))
    paths = {"PYTHONPATH": str(target), "FUSEDBUN_CACHE": str(folder / "cache")}
    done = run("-c", code, compiler=compiler, cwd=folder, **paths)
    where, compiled = done.stdout.split()
    assert where == str(target)
    return int(compiled), done.stderr


@pytest.mark.long
def test_kernels_come_with_the_wheel(source, tmp_path):
    if build.find_compiler() is None:
        pytest.skip("there is no C++ compiler")
    made, _ = wheel(source, tmp_path, compiler=True)
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert made.name.endswith(f"-py3-none-{platform}.whl")
    names = ZipFile(made).namelist()
    assert not any(name.startswith("fusedbun-0.1.0.data") for name in names)
    for needed in (
        "compiler/cpp/runtime/driver.cpp",
        "compiler/cpp/runtime/vectors.h",
        "tools/bench/limits.c",
        "py.typed",
    ):
        assert f"fusedbun/{needed}" in names
    assert steps(made, tmp_path, compiler=False, implementation="kernel") == (0, "")


def test_without_a_compiler_the_definition_steps(source, tmp_path):
    made, said = wheel(source, tmp_path, compiler=False)
    assert said.count("fusedbun: no kernels are compiled now: there is no C++ compiler") == 1
    assert made.name.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in ZipFile(made).namelist())
    compiled, said = steps(made, tmp_path, compiler=False, implementation=None)
    assert compiled == 0
    assert "there is no C++ compiler" in said


@pytest.mark.long
def test_an_editable_install_compiles_into_the_source_what_it_lacks(source, tmp_path):
    if build.find_compiler() is None:
        pytest.skip("there is no C++ compiler")
    copy = shutil.copytree(source, tmp_path / "copy")
    built = copy / "fusedbun" / "compiler" / "cpp" / "built"
    install = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    times = []
    for _ in range(2):
        run("-c", install, compiler=True, cwd=copy)
        times.append({path.name: path.stat().st_mtime_ns for path in built.iterdir()})
        (built / "stale.so").touch()
    assert times[0]
    assert times[0].items() <= times[1].items()
    assert {name.split("-")[1] for name in times[0] if "-" in name} == {str(native.registers())}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_recipe_comes_with_the_package_at_its_defaults(dtype):
    built = set(family.sources(dtype))
    for name, ndim in product(RECIPES, range(5)):
        assert emit(trace(family.chain_of(name, {}, ndim), ndim, dtype=dtype)) in built


@sweep("dtype", TYPES, short=only("float32"))
def test_a_bundle_has_every_kernel_under_a_name_of_its_own(dtype):
    registers = family.widths()[0]
    names = {build.digest(source, registers) for source in family.sources(dtype)}
    assert len(names) == len(family.sources(dtype))
    for text in family.bundles(dtype, registers):
        found = {name for name in names if f"#define fusedbun_kernel fusedbun_kernel_{name}" in text}
        assert found
        names -= found
    assert not names


def test_kernels_are_found_in_a_bundle_and_not_compiled(monkeypatch, tmp_path):
    registers = native.registers()
    kernels = [emit(trace(family.chain_of(name, {}, 1), 1, dtype="float32")) for name in ("sm3", "scaled_optum")]
    build.compile_in(tmp_path, build.bundle(kernels, registers), registers, build.bundle_prefix(registers))
    (tmp_path / f"{build.bundle_prefix(registers)}broken.so").write_text("no library")
    monkeypatch.setattr(build, "BUILT", tmp_path)
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    monkeypatch.setenv("FUSEDBUN_CACHE", str(tmp_path / "cache"))
    build._bundles.cache_clear()
    try:
        assert [build.origin(code, registers) for code in kernels] == ["package", "package"]
        assert build.entry(kernels[0], registers).__name__ != build.entry(kernels[1], registers).__name__
        assert build.origin(kernels[0] + "// changed", registers) is None
        with pytest.raises(build.BuildError, match="there is no C"):
            build.entry(kernels[0] + "// changed", registers)
    finally:
        build._bundles.cache_clear()


def test_flags_of_the_user_s_are_part_of_the_name(monkeypatch):
    before = build.digest("int x;", 1)
    monkeypatch.setenv("FUSEDBUN_CXXFLAGS", "-g")
    assert build.digest("int x;", 1) != before


def test_a_library_that_cannot_be_loaded_is_named(tmp_path):
    (tmp_path / "x.so").write_text("no library")
    with pytest.raises(build.BuildError, match=r"x\.so cannot be loaded"):
        build.load(tmp_path / "x.so")


def test_a_bundle_that_does_not_compile_is_named_in_one_line(capfd, monkeypatch, tmp_path):
    if build.find_compiler() is None:
        pytest.skip("there is no C++ compiler")
    monkeypatch.setattr(family, "TYPES", ["float32"])
    monkeypatch.setattr(family, "bundles", lambda dtype, registers: ["#error no such machine"])
    monkeypatch.setattr(family, "widths", lambda: [1])
    monkeypatch.setattr(family, "jax_handler", lambda: None)
    family.build(tmp_path)
    out, err = capfd.readouterr()
    assert out.startswith("fusedbun: 1 of 1 libraries of kernels did not compile")
    assert (out.count("\n"), err) == (1, "")
    assert len(list(tmp_path.glob("*.so"))) == 1  # the driver
