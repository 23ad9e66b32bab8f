"""Installation without a compiler, and what a distribution holds."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git tracks, with nothing built."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.split("\0"):
        if name and not name.startswith("examples/") and (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def install(checkout: Path, target: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--verbose", "--no-deps", "--no-build-isolation", "--no-index",
         "--target", str(target), str(checkout)],
        capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout, installed without the extension as asked for."""
    folder = tmp_path_factory.mktemp("installed")
    install(checkout, folder, VLMFAST_NO_EXT="1")
    return folder


# The finder of an editable install would answer for the extension that this copy lacks.
USE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
import warnings, torch, vlmfast
from pathlib import Path
print(Path(vlmfast.__file__).parent)
x = torch.randn(4, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        vlmfast.ops.info_nce(x, x, 2.0)
print(len(caught), caught[0].message)
print(vlmfast.explain("info_nce", x, x, 2.0))
"""


@pytest.mark.parametrize("how", ["asked for", "no tools"])
def test_without_the_extension_it_runs_on_torch_and_says_so_once(
    checkout: Path, installed: Path, tmp_path: Path, how: str
) -> None:
    folder = installed
    if how == "no tools":
        folder = tmp_path
        log = install(checkout, folder, PATH="")
        assert "the C++ core is not built, vlmfast will run on PyTorch ops" in log
    assert not list((folder / "vlmfast").glob("_C*"))
    done = subprocess.run(
        [sys.executable, "-c", USE], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    where, warning, reasons = done.stdout.splitlines()
    assert where == str(folder / "vlmfast")
    assert warning.startswith("1 vlmfast.info_nce runs on PyTorch ops (cpu: the C++ extension vlmfast._C was not built")
    assert "triton: the tensors are on cpu; cuda: the tensors are on cpu" in warning
    assert "'torch': None" in reasons


def test_the_package_holds_its_data(checkout: Path, installed: Path) -> None:
    assert (installed / "vlmfast" / "py.typed").exists()
    assert (installed / "vlmfast" / "data" / "tokenizer" / "tokenizer.json").exists()
    packaged = {str(p.relative_to(installed)) for p in (installed / "vlmfast").rglob("*.py")}
    kernels = {f"vlmfast/kernels/{p.name}" for p in (checkout / "kernels" / "triton").glob("*.py")}
    assert kernels
    assert packaged == kernels | {str(p.relative_to(checkout)) for p in (checkout / "vlmfast").rglob("*.py")}


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution of the checkout, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    program = f"from setuptools import build_meta; print(build_meta.build_sdist({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_the_source_distribution_holds_what_a_build_reads(
    checkout: Path, sdist: Path, installed: Path, tmp_path: Path
) -> None:
    folders = [checkout / name for name in ("csrc", "kernels", "vlmfast")]
    needed = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    needed += [checkout / name for name in ("CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py")]
    for path in needed:
        copied = sdist / path.relative_to(checkout)
        assert copied.exists(), copied
        assert copied.read_bytes() == path.read_bytes()
    assert not list(sdist.rglob("*.so"))
    install(sdist, tmp_path, VLMFAST_NO_EXT="1")
    found = [
        {path.relative_to(folder) for path in folder.rglob("*") if path.suffix != ".pyc"}
        for folder in (tmp_path, installed)
    ]
    assert found[0] == found[1]


FRESH = """
import torch, vlmfast
from pathlib import Path
print(Path(vlmfast.__file__).parent)
model = torch.nn.Sequential(torch.nn.Linear(8, 4))
assert not vlmfast.patch(model).replaced
x = model(torch.randn(4, 8))
vlmfast.ops.info_nce(x, x, 2.0).backward()
"""
EXTRAS = {"train", "bench", "detection", "docs", "dev", "eval", "gguf", "captioning", "streaming"}


def test_the_wheel_works_in_a_fresh_environment(checkout: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--no-input"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    steps = [
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path), str(checkout)],
        [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")],
    ]
    for step in steps:
        done = subprocess.run(
            step, capture_output=True, text=True, check=False, env={**environment, "VLMFAST_NO_EXT": "1"}
        )
        assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "vlmfast/py.typed" in archive.namelist()
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        described = email.message_from_bytes(archive.read(name))
    assert set(described.get_all("Provides-Extra")) == EXTRAS
    assert "torch>=2.9" in described.get_all("Requires-Dist")
    python = tmp_path / "venv" / "bin" / "python"
    done = subprocess.run(
        [*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Torch and the rest from here, without the .pth files, and so without the editable install of the checkout.
    environment["PYTHONPATH"] = str(Path(torch.__file__).parents[1])
    for command in (
        [str(python), "-c", FRESH],
        [str(python), "-m", "vlmfast", "--help"],
        [str(tmp_path / "venv" / "bin" / "vlmfast"), "--help"],
    ):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        expected = str(tmp_path / "venv") if "-c" in command else "train"
        assert expected in done.stdout


def test_a_required_extension_that_cannot_be_built_is_an_error(checkout: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"the C\+\+ core was not built"):
        install(checkout, tmp_path, PATH="", VLMFAST_REQUIRE_EXT="1")


def test_nothing_asks_what_the_build_host_can_do() -> None:
    for name in ("CMakeLists.txt", "setup.py"):
        text = (ROOT / name).read_text()
        assert "native" not in text
        assert "cpuinfo" not in text
