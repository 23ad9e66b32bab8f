"""`vlmfast bench step` as a script."""

from __future__ import annotations

import sys

from vlmfast.cli.bench import run

if __name__ == "__main__":
    raise SystemExit(run(["step", *sys.argv[1:]]))
