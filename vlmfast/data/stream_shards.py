"""Shards that are read from the first byte to the last: what a source names, how it is opened, the samples in it.

Brace lists and URLs are those of the webdataset library, which also opens them. The archives are read by
`vlmfast.data.tar`: tarfile, which webdataset uses, takes an archive that is cut between two files for a whole one.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vlmfast.data.dataset import Source
from vlmfast.data.records import IMAGE_EXTENSIONS, URL, Text, parse_text
from vlmfast.data.shards import MEMBER_NAME, NOTHING, TEXT_EXTENSIONS, Part, group_samples
from vlmfast.data.tar import DamagedError, ForwardArchive, Member, members


def shard_urls(source: Source) -> list[str]:
    """The shards that a source names, local ones as paths.

    Args:
        source: `pipe:COMMAND`, a URL, a path, a glob, or several local ones with commas between; with braces, such as
            {00000..01023}; or a sequence of those.
    Raises:
        FileNotFoundError: a local path is not there, or a glob matches nothing.
        ValueError: no program here opens such a URL, or braces do not match.
    """
    parts = [source] if isinstance(source, str | os.PathLike) else list(source)
    urls = [url for part in parts for url in _expand(os.fspath(part))]
    for scheme in {match[0] for url in urls if (match := URL.match(url))}:
        _check_scheme(scheme, next(url for url in urls if url.startswith(scheme)))
    return urls


def _expand(source: str) -> list[str]:
    from webdataset.shardlists import expand_urls

    if os.path.isfile(source):
        return [source]
    try:
        if URL.match(source):
            return list(expand_urls(source))
        parts = expand_urls(source) if "{" in source else source.split(",")
    except (ValueError, AssertionError) as error:  # an AssertionError of a variable that is not set
        raise ValueError(
            f"source: {source!r} cannot be expanded ({error}); {{0..9}} and {{a,b}} are lists, and ${{NAME}} is the "
            "environment variable WDS_NAME, where $NAME is left to the shell"
        ) from error
    paths: list[str] = []
    for part in map(str.strip, parts):
        found = [part] if os.path.isfile(part) else sorted(glob.glob(part, recursive=True))
        if not found:
            raise FileNotFoundError(f"source: {part!r} is no file and, as a glob, matches nothing; expected tar shards")
        paths += found
    if wrong := next((path for path in paths if not os.path.isfile(path)), None):
        raise ValueError(f"source: {wrong!r} is no file; only tar shards are read as a stream")
    return paths


def _check_scheme(scheme: str, url: str) -> None:
    from webdataset.gopen import gopen_schemes

    name = scheme.partition(":")[0]
    if name == "s3":
        raise ValueError(f"source: {url!r} is opened by a command of your own: 'pipe:aws s3 cp {url} -'")
    if name not in gopen_schemes and name != "file":
        known = ", ".join(sorted(set(gopen_schemes) - {"__default__"}))
        raise ValueError(f"source: nothing opens {url!r}; expected one of {known}, such as 'pipe:COMMAND'")
    if name in ("http", "https") and shutil.which("curl") is None:
        raise ValueError(f"source: {url!r} is opened by curl, which is not installed")


@dataclass(frozen=True, slots=True)
class RawSample:
    """The bytes of one sample: `Files` of which it is the only one."""

    name: str
    plain: bytes | None
    structured: bytes | None
    images: list[bytes]
    document: bool
    place: tuple[int, int, int] = (0, 0, 0)  # round, number of the shard, place in the shard

    def key(self, index: int) -> str:
        return self.name

    def text(self, index: int) -> Text:
        return parse_text(self.plain, self.structured)

    def numbered(self, index: int) -> int:
        return len(self.images) if self.document else 0

    def image(self, index: int, number: int = 0) -> bytes | None:
        return self.images[number]


def read_shard(url: str, stream: Any, faults: Counter[str], *, last_try: bool) -> Iterator[RawSample]:
    """The samples of an archive as they come, grouped as those of `ShardPairs`.

    Args:
        stream: has `read(size)`.
        faults: what is no sample is counted here.
        last_try: of an archive that is damaged, give also a sample that is complete where the damage begins.
    Raises:
        ValueError: it is damaged, or no plain tar archive; after the samples before the damage.
    """
    archive = ForwardArchive(stream)
    seen: set[str] = set()
    group: str | None = None
    parts: list[tuple[str, Member]] = []
    data: list[bytes] = []

    def content(part: Part) -> bytes | None:
        return None if part == NOTHING else data[part[0]]

    def samples(damaged: bool = False) -> Iterator[RawSample]:
        for sample in group_samples(group or "", parts):
            if damaged and not sample.complete:
                continue
            faults["duplicate key"] += sample.repeated
            if not sample.images:
                faults["missing image"] += sample.plain != NOTHING or sample.structured != NOTHING
            elif sample.key in seen:
                faults["duplicate key"] += 1
            else:
                seen.add(sample.key)
                faults["second image"] += 0 if sample.numbered else len(sample.images) - 1
                images = [data[number] for number, _ in (sample.images if sample.numbered else sample.images[:1])]
                yield RawSample(sample.key, content(sample.plain), content(sample.structured), images, sample.numbered)

    try:
        for member in members(url, archive):
            if (match := MEMBER_NAME.match(member.name)) is None:
                continue
            if match[1] != group:
                yield from samples()
                group, parts, data = match[1], [], []
            if match[2].rpartition(".")[2].lower() in (*IMAGE_EXTENSIONS, *TEXT_EXTENSIONS):
                content_ = archive.read(member.offset, member.size)
                if len(content_) < member.size:
                    raise DamagedError
                parts.append((match[2], Member(member.name, len(data), member.size)))
                data.append(content_)
    except DamagedError as error:
        if last_try:
            yield from samples(damaged=True)
        raise ValueError("the archive is cut short or damaged") from error
    yield from samples()


@contextlib.contextmanager
def opened(url: str) -> Iterator[Any]:
    """A stream with `read(size)`.

    Raises:
        OSError: it cannot be opened or read; at the end, when its command has failed.
    """
    from webdataset.gopen import gopen

    stream = gopen(url, "rb")
    process = getattr(stream, "proc", None)
    # Pipe.read of webdataset drops what it has read where the command has failed by then.
    source = stream if process is None else process.stdout
    try:
        yield source
        stream.close()  # waits for the command, and raises where it failed
    except (OSError, ValueError) as error:
        if process is not None and _failed(process):
            raise OSError(f"its command ended with exit code {process.returncode}") from error
        raise
    finally:
        if process is not None and process.poll() is None:
            process.kill()
        with contextlib.suppress(OSError):  # of a command that was ended in the midst
            stream.close()


def _failed(process: subprocess.Popen[bytes]) -> bool:
    """Whether a command has failed by itself, once all that it wrote is read."""
    output = process.stdout
    if output is not None and not output.closed and output.read(1):
        return False
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    return bool(process.returncode)
