"""What the CUDA C++ kernels in the built extension use on every architecture, without a GPU.

`python tests/helpers/cuda_resources.py` writes tests/kernels/cuda_resources.json, the table of test_cuda_resources.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cuda_results
from backends import cuda_on_host

from vlmfast.ops import _dispatch
from vlmfast.ops._dispatch import core

TABLE = Path(__file__).parents[1] / "kernels" / "cuda_resources.json"
WARP = 32
REGISTERS = 65536
# Threads, blocks and KiB of shared memory of one multiprocessor, of which each block takes 1 for the system: CUDA C++
# Programming Guide, "Compute Capabilities".
LIMITS = {
    80: (2048, 32, 164), 86: (1536, 16, 100), 89: (1536, 24, 100),
    90: (2048, 32, 228), 100: (2048, 32, 228), 120: (1536, 24, 100),
}  # fmt: skip


def tool() -> str:
    """triton's wheel carries it."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def dump(*options: str) -> str:
    return subprocess.run([tool(), *options, core.__file__], capture_output=True, text=True, check=True).stdout


def demangled(names: list[str]) -> list[str]:
    """Of vlmfast::cuda::(anonymous namespace)::kernel<T>(...), kernel<T>."""
    found = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [
        re.sub(r"^void |\(.*|vlmfast::cuda::|_GLOBAL__N__\w+::", "", name.replace("(anonymous namespace)::", ""))
        for name in found.stdout.splitlines()
    ]


def table(dynamic: Mapping[str, int]) -> dict[str, dict[str, dict[str, Any]]]:
    """Of each architecture and kernel: registers, bytes of stack, spills and shared memory, threads, occupancy.

    `dynamic` is the shared memory that kernels are launched with for the cases of cuda_results, by name.
    """
    threads = threads_of_blocks()
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for part in re.split(r"(?=arch = sm_)", dump("--dump-resource-usage")):
        match = re.match(r"arch = (sm_\d+)", part)
        if match is None:
            continue
        capability = int(match[1].removeprefix("sm_"))
        rows = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", part)
        for name, (mangled, *numbers) in zip(demangled([row[0] for row in rows]), rows, strict=True):
            registers, stack, shared, local = map(int, numbers)
            row = {"registers": registers, "stack": stack, "spills": local, "shared": shared + dynamic[name]}
            if mangled in threads:
                row["threads"] = threads[mangled]
                row["occupancy"] = occupancy(capability, registers, threads[mangled], row["shared"])
            found.setdefault(match[1], {})[name] = row
    return {arch: dict(sorted(rows.items())) for arch, rows in sorted(found.items(), key=lambda item: int(item[0][3:]))}


def threads_of_blocks() -> dict[str, int]:
    """Of kernels with launch bounds, by mangled name."""
    found = {}
    for name, section in re.findall(r"\.nv\.info\.(\S+)\n(.*?)(?=\n\.|\Z)", dump("--dump-elf"), re.DOTALL):
        if match := re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:\s+(0x\w+) (0x\w+) (0x\w+)", section):
            x, y, z = (int(value, 16) for value in match.groups())
            found[name] = x * y * z
    return found


def occupancy(capability: int, registers: int, threads: int, shared: int) -> float:
    """Share of a multiprocessor's threads that registers and shared memory leave room for."""
    most_threads, most_blocks, kilobytes = LIMITS[capability]
    of_warp = -(-registers * WARP // 256) * 256
    warps = -(-threads // WARP)
    of_system = 1024 if capability < 90 else 0  # else it is in what the compiler reports
    by_shared = kilobytes * 1024 // max(1, shared + of_system)
    blocks = min(most_blocks, most_threads // (warps * WARP), REGISTERS // of_warp // warps, by_shared)
    return round(blocks * warps * WARP / most_threads, 3)


def shared_of_launches(module: Any) -> dict[str, int]:
    """Bytes of dynamic shared memory that kernels of the host build were launched with since the last call, by name."""
    bytes_of = module.take_shared()
    lines = subprocess.run(["nm", module.__file__], capture_output=True, text=True, check=True).stdout.splitlines()
    symbols = [line.split() for line in lines if " t " in line.lower()]
    mangled = {symbol: bytes_of[int(place, 16)] for place, _, symbol in symbols if int(place, 16) in bytes_of}
    return dict(sorted(zip(demangled(list(mangled)), mangled.values(), strict=True)))


def main() -> None:
    if core is None or not hasattr(core, "cuda"):
        sys.exit("the extension was built without CUDA")
    _dispatch.cuda_core = cuda_on_host()
    os.environ["VLMFAST_BACKEND"] = "cuda"
    for _ in cuda_results.results():
        pass
    dynamic = shared_of_launches(_dispatch.cuda_core)
    found = {"nvcc": core.build_info()["nvcc"], "dynamic_shared": dynamic, **table(dynamic)}
    TABLE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
