"""Compiles the kernels of `fusedbun.compiler.cpp.family` at installation; all else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
BUILT = Path("fusedbun", "compiler", "cpp", "built")


class BuildWithKernels(build_py):
    """Copies the package and compiles its kernels; an editable install needs those for this machine only."""

    def run(self) -> None:
        super().run()
        sys.path.insert(0, str(HERE))
        from fusedbun.compiler.cpp import family

        folder = HERE if self.editable_mode else Path(self.build_lib)
        family.build(folder / BUILT, self.editable_mode)


class WheelOfPlatform(bdist_wheel):
    """A wheel of this platform, and of every Python, where there are kernels in it; of every platform where not."""

    def run(self) -> None:
        self.run_command("build")
        libraries = Path(self.get_finalized_command("build_py").build_lib, BUILT).glob("*.so")
        self.root_is_pure = not any(libraries)
        self.distribution.has_ext_modules = lambda: not self.root_is_pure
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelOfPlatform})
