"""Backends of ops on CPU tensors: forced by name, CUDA C++ ones compiled for the processor by g++."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pybind11
import pytest
import torch

from vlmfast.ops import _dispatch
from vlmfast.ops._dispatch import Impl

ROOT = Path(__file__).parents[2]


PROBE = (torch.zeros(1, 1, 1, 32),) * 3
"""Of every op, what its backends look at to say whether they can run."""


def use_backend(monkeypatch: pytest.MonkeyPatch, impls: Mapping[str, Impl], name: str) -> None:
    """Forces a backend, or skips where it cannot run on CPU tensors."""
    monkeypatch.setenv("VLMFAST_BACKEND", name)
    if name == "cuda":
        use_cuda_on_host(monkeypatch)
    if reason := impls[name].unsupported(*PROBE):
        pytest.skip(reason)


def use_cuda_on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts kernels and schedules for GPUs, compiled for CPU tensors, in the place of the extension's own."""
    if not (shutil.which("g++") and sys.platform == "linux"):
        pytest.skip("needs g++ on Linux")
    monkeypatch.setattr(_dispatch, "cuda_core", cuda_on_host())


@functools.cache
def cuda_on_host() -> Any:
    spec = importlib.util.spec_from_file_location("_cuda_host", build_cuda_on_host() / "_cuda_host.so")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def build_cuda_on_host() -> Path:
    """The folder of _cuda_host.so and _cuda_sanitized.so, built by CMake where they are not up to date."""
    build = ROOT / "build" / "cuda_host"
    build.mkdir(parents=True, exist_ok=True)
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DVLMFAST_CUDA_ON_HOST=ON",
        f"-DVLMFAST_TORCH_DIR={Path(torch.__file__).parent}", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build}",
    ]  # fmt: skip
    # cmake and ninja of this environment, also where it is not activated.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with open(build / "lock", "w") as lock:  # one process builds, others wait for it
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", str(build)]):
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
    return build
