"""Ships configs/ inside the package, where an installed wheel finds them. Everything else stands in pyproject.toml."""

from pathlib import Path
from shutil import copytree

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            copytree("configs", Path(self.build_lib, "halos_pl", "configs"), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithConfigs})
