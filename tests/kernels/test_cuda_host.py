"""The CUDA kernels run by g++: what the header that runs them finds, races, sanitizers, and squares of logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cuda_resources
import cuda_results
import pytest
import torch
from backends import ROOT, build_cuda_on_host, use_cuda_on_host
from torch.nn import functional as F

from vlmfast.ops import _dispatch, info_nce, sigmoid_loss

HERE = Path(__file__).parent
ORDERS = (0, 1, 2, 3)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs g++ on Linux")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMFAST_BACKEND", "cuda")
    use_cuda_on_host(monkeypatch)


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory):
    program = tmp_path_factory.mktemp("facts") / "facts"
    options = ("-std=c++20", "-O1", "-U_FORTIFY_SOURCE", "-fsanitize=address,undefined", "-DVLMFAST_ON_HOST")
    folders = (f"-I{ROOT / 'kernels/cuda'}", f"-I{HERE}")
    subprocess.run(["g++", *options, *folders, "-x", "c++", HERE / "facts.cu", "-o", program], check=True)

    def run(name: str, order: int = 0) -> tuple[int, str]:
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "VLMFAST_HOST_ORDER": str(order)}
        done = subprocess.run([program, name], capture_output=True, text=True, env=environment, check=False)
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.mark.parametrize("name", ["neighbours", "product"])
def test_a_kernel_that_waits_gives_the_same_bits_in_every_order(facts, name: str) -> None:
    found = {facts(name, order) for order in ORDERS}
    assert len(found) == 1
    code, out = found.pop()
    values = [float.fromhex(x) for x in out.split()]
    if name == "neighbours":
        assert values[:64] == [*map(float, range(1, 64)), 0.0]
    else:
        a = torch.tensor([[e - lane % 4 for lane in range(32)] for e in range(8)]).view(16, 16).double()
        assert torch.equal(torch.tensor(values).double().view(16, 16), a @ a.T / 2)
    assert code == 0


@pytest.mark.parametrize("name", ["race", "product without waiting"])
def test_a_kernel_that_does_not_wait_is_found(facts, name: str) -> None:
    right = facts("neighbours" if name == "race" else "product")
    assert right not in {facts(name, order) for order in ORDERS}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("leaves early", "a barrier that 63 of 64 threads reach; 1 have returned"),
        ("half a warp", "16 have returned, 16 wait for lanes of their warp"),
        ("beyond its memory", "heap-buffer-overflow"),
    ],
)
def test_what_would_hang_or_overflow_on_a_gpu_is_named(facts, name: str, message: str) -> None:
    code, out = facts(name)
    assert code != 0
    assert message in out


def test_no_kernel_has_a_race(backend: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits whatever the order of threads between barriers and of blocks; and the table's shared memory."""
    found = []
    cuda_resources.shared_of_launches(_dispatch.cuda_core)
    for order in ORDERS:
        monkeypatch.setenv("VLMFAST_HOST_ORDER", str(order))
        found.append(dict(cuda_results.results()))
    for other in found[1:]:
        for name, tensors in found[0].items():
            assert all(torch.equal(a, b) for a, b in zip(tensors, other[name], strict=True)), name
    shared = json.loads(cuda_resources.TABLE.read_text())["dynamic_shared"]
    assert cuda_resources.shared_of_launches(_dispatch.cuda_core) == shared


def test_no_kernel_goes_beyond_its_memory() -> None:
    """Under the address and the undefined-behaviour sanitizer; also that all results are finite."""
    module = build_cuda_on_host() / "_cuda_sanitized.so"
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {**os.environ, "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "helpers" / "cuda_results.py", module],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.split()[-1] == "done"


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_squares_of_logits_give_what_the_whole_gives(backend: None, dtype: torch.dtype, recompute: bool) -> None:
    image, text = (F.normalize(torch.randn(n, 24), dim=1).to(dtype).requires_grad_() for n in (150, 170))
    scale, bias = torch.tensor(40.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
    found = []
    for chunk in (0, 64, 150):
        _dispatch.cuda_core.set_chunk(chunk)
        try:
            loss = info_nce(image, text, scale, label_offset=9, recompute=recompute)
            loss = loss + sigmoid_loss(image, text, scale, bias, label_offset=9)
            found.append([loss.detach(), *torch.autograd.grad(loss, (image, text, scale, bias))])
        finally:
            _dispatch.cuda_core.set_chunk(0)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert (a - b).abs().max() <= (1e-6 if dtype == torch.float32 else 1e-3) * a.abs().max()
