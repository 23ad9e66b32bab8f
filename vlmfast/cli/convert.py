"""vlmfast convert."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vlmfast.data.convert import FORMATS, convert


def run(arguments: Sequence[str]) -> int:
    """Shards, and on standard output what was skipped."""
    width = max(map(len, FORMATS))
    lines = [f"  {name:{width}}  {format.files}; images: {format.images}" for name, format in FORMATS.items()]
    parser = argparse.ArgumentParser(
        prog="vlmfast convert",
        description="A public data set to tar shards that --data reads. Run it again to go on after a stop.",
        epilog="\n".join(["formats and their annotation files:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("format", metavar="FORMAT", choices=list(FORMATS), help="one of those below")
    parser.add_argument("--annotations", type=Path, nargs="+", required=True, metavar="FILE", help="see below")
    parser.add_argument("--images", type=Path, required=True, metavar="FOLDER", help="where the image files are")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the shards go")
    parser.add_argument("--shard-size", type=int, default=1000, metavar="N", help="samples of a shard (1000)")
    options = parser.parse_args(arguments)
    done = convert(
        options.format,
        options.annotations,
        options.images,
        options.output,
        shard_size=options.shard_size,
        progress=True,
    )
    print(f"{done.samples} samples in {len(done.shards)} shards in {options.output}")
    for reason, count in sorted(done.skipped.items()):
        print(f"  skipped: {count} {reason}")
    return 0
