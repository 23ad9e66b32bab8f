"""What the CUDA C++ kernels in the built extension use on every architecture, without a GPU.

`python tests/cuda_resources.py` writes tests/kernels/cuda_resources.json, which test_cuda_resources.py there compares.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from vlmfast.ops._dispatch import core

TABLE = Path(__file__).parent / "kernels" / "cuda_resources.json"
WARP = 32
REGISTERS = 65536
# Threads and blocks of one multiprocessor: CUDA C++ Programming Guide, "Compute Capabilities".
LIMITS = {80: (2048, 32), 86: (1536, 16), 89: (1536, 24), 90: (2048, 32), 100: (2048, 32), 120: (1536, 24)}


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


def table() -> dict[str, dict[str, dict[str, Any]]]:
    """Of each architecture and kernel: registers, bytes of stack, spills and shared memory, threads, occupancy."""
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
            row = {"registers": registers, "stack": stack, "spills": local, "shared": shared}
            if mangled in threads:
                row["threads"] = threads[mangled]
                row["occupancy"] = occupancy(capability, registers, threads[mangled])
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


def occupancy(capability: int, registers: int, threads: int) -> float:
    """Share of a multiprocessor's threads that registers leave room for; dynamic shared memory may leave less."""
    most_threads, most_blocks = LIMITS[capability]
    of_warp = -(-registers * WARP // 256) * 256
    warps = -(-threads // WARP)
    blocks = min(most_blocks, most_threads // (warps * WARP), REGISTERS // of_warp // warps)
    return round(blocks * warps * WARP / most_threads, 3)


def main() -> None:
    if core is None or not hasattr(core, "cuda"):
        sys.exit("the extension was built without CUDA")
    TABLE.write_text(json.dumps({"nvcc": core.build_info()["nvcc"], **table()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
