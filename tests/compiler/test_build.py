"""Generated code is compiled once, kept where it is told, and what goes wrong on the way is said."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from leaves import by_kernel, leaf

from fusedbun import chain
from fusedbun.compiler.cpp import build, native
from fusedbun.transforms import Decay

SOURCE = 'extern "C" __attribute__((visibility("default"))) int number() { return 42; }\n'
TRANSFORMS = chain(Decay(0.5))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache of the test's own, and nothing that came with the package."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FUSEDBUN_CACHE", str(folder))
    monkeypatch.delenv("FUSEDBUN_CXXFLAGS", raising=False)
    monkeypatch.setattr(build, "BUILT", tmp_path / "built")
    monkeypatch.setattr(native, "_KERNELS", {})
    native.driver()  # compiled once for all tests, into the cache of the first
    build.find_compiler.cache_clear()
    build._bundles.cache_clear()
    yield folder
    build.find_compiler.cache_clear()
    build._bundles.cache_clear()


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Makes a compiler of some lines of shell."""

    def make(*lines):
        path = tmp_path / "compiler"
        path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        return str(path)

    return make


@pytest.fixture
def calls(tmp_path, script):
    """How often the compiler is called from here on."""
    log = tmp_path / "calls"
    compiler = " ".join(build.find_compiler())
    build.find_compiler.cache_clear()
    script(f'echo "$@" >> {log}', f'exec {compiler} "$@"')
    return lambda: len(log.read_text().splitlines()) if log.exists() else 0


def left_behind(folder):
    """What lies in the cache beside libraries."""
    return [path.name for path in folder.iterdir() if path.suffix != ".so"]


def test_without_a_compiler_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    text = r"there is no C\+\+ compiler: install g\+\+ or clang\+\+, or name one in the environment variable CXX"
    with pytest.raises(build.BuildError, match=text):
        build.library(SOURCE)
    for _ in range(2):  # the reason is remembered
        with pytest.raises(native.KernelError, match=text):
            native.kernel(TRANSFORMS, 1, (0,), "float32")


def test_a_compiler_that_fails_is_quoted(folder, script):
    name = script("echo 'code.cpp:1:1: error: no such thing' >&2", "exit 3")
    with pytest.raises(build.BuildError, match=f"^{name} failed: code.cpp:1:1: error: no such thing$"):
        build.library(SOURCE)
    with pytest.raises(native.KernelError, match="no such thing"):
        native.kernel(TRANSFORMS, 1, (0,), "float32")
    assert list(folder.iterdir()) == []


def test_code_that_is_no_cpp_gets_the_compilers_own_words(folder):
    with pytest.raises(build.BuildError, match=r"error: .*nonsense"):
        build.library("nonsense nonsense;")
    assert list(folder.iterdir()) == []


def test_a_compiler_that_is_not_there(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match=r"compiling to .* failed: .*no-such-compiler"):
        build.library(SOURCE)


def test_a_compiler_that_never_ends(script, monkeypatch):
    script("exec sleep 60")
    monkeypatch.setattr(build, "TIME_LIMIT", 0.2)
    with pytest.raises(build.BuildError, match=r"compiling to .* failed: .* timed out after 0.2 seconds"):
        build.library(SOURCE)


def test_the_compiler_may_have_arguments(folder, calls, monkeypatch):
    monkeypatch.setenv("CXX", f"{os.environ['CXX']} -DUNUSED")
    assert build.load(build.library(SOURCE)).number() == 42
    assert calls() == 1


def test_what_was_compiled_is_not_compiled_again(folder, calls, monkeypatch):
    path = build.library(SOURCE)
    assert path.parent == folder
    assert build.library(SOURCE) == path
    assert calls() == 1
    others = {build.library(SOURCE + "// other"), build.library(SOURCE, registers=native.registers())}
    monkeypatch.setenv("FUSEDBUN_CXXFLAGS", "-DOTHER")
    others.add(build.library(SOURCE))
    assert len({path, *others}) == calls() == (4 if native.registers() > 1 else 3)
    assert left_behind(folder) == []


def test_a_kernel_is_compiled_once(folder, calls, monkeypatch):
    arrays = leaf(TRANSFORMS, (20,), "float32")
    once = by_kernel(TRANSFORMS, arrays)
    monkeypatch.setattr(native, "_KERNELS", {})  # as in another process
    again = by_kernel(TRANSFORMS, arrays)
    np.testing.assert_array_equal(again["param"], once["param"])
    assert calls() == 1


def test_where_code_comes_from(folder):
    assert build.origin(SOURCE) is None
    path = build.library(SOURCE)
    assert build.origin(SOURCE) == "cache"
    build.BUILT.mkdir()
    shutil.copy(path, build.BUILT)
    assert build.origin(SOURCE) == "package"
    assert build.library(SOURCE).parent == build.BUILT


@pytest.mark.parametrize("damage", ["empty", "the header", "a half", "all but a byte", "nonsense", "a link to nowhere"])
def test_a_damaged_library_is_compiled_again(damage, folder, calls):
    path = build.library(SOURCE)
    whole = path.read_bytes()
    path.unlink()  # it may be loaded
    kept = {"empty": 0, "the header": 64, "a half": len(whole) // 2, "all but a byte": len(whole) - 1}
    if damage in kept:
        path.write_bytes(whole[: kept[damage]])
    elif damage == "nonsense":
        path.write_bytes(bytes(len(whole)))
    else:
        path.symlink_to("nowhere")
    if path.exists():
        with pytest.raises(build.BuildError, match=f"{path} cannot be loaded: "):
            build.load(path)
    assert build.loaded(SOURCE).number() == 42
    assert calls() == 2
    assert build.loaded(SOURCE).number() == 42
    assert calls() == 2


def test_a_damaged_library_of_the_package_is_compiled_to_the_cache(folder, calls):
    build.BUILT.mkdir()
    path = build.BUILT / f"{build.digest(SOURCE, 1)}.so"
    path.write_bytes(b"\x7fELF made for another machine")
    assert build.loaded(SOURCE).number() == 42
    assert [found.name for found in folder.iterdir()] == [path.name]


def test_processes_that_compile_the_same_at_once(folder, script):
    """The compiler waits for both of them."""
    compiler = " ".join(build.find_compiler())
    build.find_compiler.cache_clear()
    ready = folder.parent / "ready"
    ready.mkdir()
    script(f"touch {ready}/$$", f"while [ $(ls {ready} | wc -l) -lt 2 ]; do sleep 0.01; done", f'exec {compiler} "$@"')
    code = "import sys; from fusedbun.compiler.cpp import build; print(build.loaded(sys.argv[1]).number())"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, SOURCE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    assert [process.communicate(timeout=60) for process in started] == [("42\n", "")] * 2
    assert len(list(ready.iterdir())) == 2
    assert len(list(folder.iterdir())) == 1


def test_the_cache_is_where_it_is_told(monkeypatch, tmp_path):
    assert build.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("FUSEDBUN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build.cache_folder() == tmp_path / "xdg" / "fusedbun"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert build.cache_folder() == tmp_path / "home" / ".cache" / "fusedbun"


WITHOUT_KERNELS = """
import sys, warnings
from pathlib import Path
from fusedbun.compiler.cpp import build
build.BUILT = Path(sys.argv[1])
import torch, fusedbun
param = torch.nn.Parameter(torch.ones(6, 4))
param.grad = torch.ones(6, 4)
optimizer = fusedbun.SM3([param], lr=0.5)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    optimizer.step()
    optimizer.step()
print(round(param[0, 0].item(), 6), len(caught), caught[0].message)
"""


def test_a_cache_that_cannot_be_written_to(tmp_path, monkeypatch):
    """It is said once, and the optimizers step without kernels."""
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("FUSEDBUN_CACHE", str(file / "cache"))
    with pytest.raises(build.BuildError, match=f"compiling to {file / 'cache'} failed: .*Not a directory"):
        build.library(SOURCE)
    with pytest.raises(native.KernelError, match=f"compiling to {file / 'cache'} failed: "):
        native.kernel(TRANSFORMS, 1, (0,), "float32")
    command = [sys.executable, "-c", WITHOUT_KERNELS, str(tmp_path / "built")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ran.stderr == ""
    value, count, *message = ran.stdout.split()
    assert float(value) == pytest.approx(1 - 0.5 - 0.5 / 2**0.5, abs=1e-5)
    assert count == "1"
    assert f"compiling to {file / 'cache'} failed" in " ".join(message)


def test_a_bundle_holds_several_kernels(folder, calls):
    """Each has a name of its own in it, so that one library serves them all."""
    from fusedbun.compiler.cpp.module import emit
    from fusedbun.compiler.trace import trace

    sources = [emit(trace(TRANSFORMS, 1, dtype=dtype)) for dtype in ("float32", "float64")]
    registers = native.registers()
    build.compile_in(build.BUILT, build.bundle(sources, registers), registers, build.bundle_prefix(registers))
    assert calls() == 1
    for dtype in ("float32", "float64"):
        arrays = leaf(TRANSFORMS, (20,), dtype)
        want = arrays["param"] - 0.5 * (arrays["grad"] + 0.5 * arrays["param"])
        np.testing.assert_array_equal(by_kernel(TRANSFORMS, arrays)["param"], want)
    assert calls() == 1
    assert build.origin(sources[0], registers) == "package"
