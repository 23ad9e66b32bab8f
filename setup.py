"""Drives CMakeLists.txt for the C++ core. Without a compiler, or with VLMFAST_NO_EXT=1, installs Python code alone.

VLMFAST_CUDA_ARCHS names the architectures of the CUDA kernels, such as 80,90a, or OFF; unset, all that are supported.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class BuildCore(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11
            import torch
        except ImportError as error:
            self._skip(
                f"{error.name} cannot be imported while building; install it first and pass --no-build-isolation to pip"
            )
            return
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DVLMFAST_TORCH_DIR={Path(torch.__file__).parent}",
            f"-DVLMFAST_TORCH_VERSION={torch.__version__}",
            f"-DVLMFAST_TORCH_CUDA={torch.version.cuda or ''}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
        ]  # fmt: skip
        if archs := os.environ.get("VLMFAST_CUDA_ARCHS"):
            configure.append(f"-DVLMFAST_CUDA_ARCHS={archs.replace(',', ';')}")
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            self._skip(f"{error}")

    def _skip(self, reason: str) -> None:
        if os.environ.get("VLMFAST_REQUIRE_EXT") == "1":
            raise SystemExit(f"vlmfast: the C++ core was not built: {reason}")
        self.warn(f"the C++ core is not built, vlmfast will run on PyTorch ops: {reason}")


without_core = os.environ.get("VLMFAST_NO_EXT") == "1"
setup(
    ext_modules=[] if without_core else [Extension("vlmfast._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildCore},
)
