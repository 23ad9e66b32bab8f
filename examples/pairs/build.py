"""Build the bundled image-text pairs from Debian's packages: `python examples/pairs/build.py --output examples/pairs`.

Two builds with the same packages, Pillow and libwebp give the same bytes. README.md beside this file says what is in
the set, where it comes from, and how it is licensed.
"""

import argparse
import hashlib
import io
import json
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from clipart_pairs import clipart_pairs
from emoji_pairs import emoji_pairs, without_skin_tone
from pair import MissingPackageError, Pair
from PIL import Image
from tqdm import tqdm

WEBP_QUALITY = 75
TRAIN_SHARDS = 8
VAL_PER_MILLE = 70  # about 500 pairs


@dataclass(frozen=True)
class Sample:
    """A pair as it lies in a shard. `digest`: SHA-256, in hex, of the pixels that a reader decodes from `webp`."""

    digest: str
    webp: bytes
    pair: Pair

    @property
    def key(self) -> str:
        return self.digest[:16]


def encode(pair: Pair) -> Sample:
    """Encode the image; hash what comes back from the decoder, not what went into the encoder."""
    buffer = io.BytesIO()
    pair.image.save(buffer, "WEBP", quality=WEBP_QUALITY, method=6)
    with Image.open(buffer) as decoded:
        digest = hashlib.sha256(decoded.convert("RGB").tobytes()).hexdigest()
    return Sample(digest, buffer.getvalue(), pair)


def split_of(digest: str) -> str:
    """'val' or 'train', from the last 32 bits of the digest: one image, whatever its text, falls on one side."""
    return "val" if int(digest[-8:], 16) % 1000 < VAL_PER_MILLE else "train"


def distinct(samples: Iterable[Sample], dropped: Counter[str]) -> list[Sample]:
    """One sample per image, sorted by digest, which mixes the sources.

    Of pairs with the same pixels the shortest caption stays, then the first in the alphabet: 'flag of norway', not
    'flag of bouvet island' or 'flag of svalbard & jan mayen'.
    """
    kept: dict[str, Sample] = {}
    for sample in samples:
        other = kept.get(sample.digest)
        if other is not None:
            dropped[f"{sample.pair.source}: same pixels as another pair"] += 1
        if other is None or _preference(sample) < _preference(other):
            kept[sample.digest] = sample
    return [kept[digest] for digest in sorted(kept)]


def _preference(sample: Sample) -> tuple[int, str]:
    return len(sample.pair.caption), sample.pair.caption


def metadata(pair: Pair) -> bytes:
    """The JSON member of a pair, compact and in UTF-8."""
    fields = {
        "caption": pair.caption,
        "category": pair.category,
        "source": pair.source,
        "title": pair.title,
        "keywords": pair.keywords,
        "group": pair.group,
        "subgroup": pair.subgroup,
    }
    if pair.author:
        fields["author"] = pair.author
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()


def write_shard(path: Path, samples: Iterable[Sample]) -> None:
    """Write a webdataset shard: key.webp and key.json per sample, no time, owner or other trace of the build."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for suffix, content in (("webp", sample.webp), ("json", metadata(sample.pair))):
                member = tarfile.TarInfo(f"{sample.key}.{suffix}")
                member.size, member.mode, member.mtime = len(content), 0o644, 0
                tar.addfile(member, io.BytesIO(content))


def write_shards(samples: list[Sample], output: Path) -> dict[str, list[Sample]]:
    """Write val-00000.tar and train-{00000..}.tar into `output` in place of shards there; return the splits."""
    output.mkdir(parents=True, exist_ok=True)
    for old in [*output.glob("train-*.tar"), *output.glob("val-*.tar")]:
        old.unlink()
    splits: dict[str, list[Sample]] = {"train": [], "val": []}
    for sample in samples:
        splits[split_of(sample.digest)].append(sample)
    write_shard(output / "val-00000.tar", splits["val"])
    size = -(-len(splits["train"]) // TRAIN_SHARDS)
    for shard in range(TRAIN_SHARDS):
        write_shard(output / f"train-{shard:05d}.tar", splits["train"][shard * size : (shard + 1) * size])
    return splits


def siblings(splits: dict[str, list[Sample]]) -> dict[str, int]:
    """Per source, the val pairs that have a sibling in train: the same emoji in another skin tone, the same caption."""

    def family(sample: Sample) -> tuple[str, str]:
        pair = sample.pair
        return pair.source, without_skin_tone(pair.title) if pair.source == "emoji" else pair.caption

    seen = {family(sample) for sample in splits["train"]}
    return dict(Counter(sample.pair.source for sample in splits["val"] if family(sample) in seen))


def summarise(splits: dict[str, list[Sample]], dropped: Counter[str]) -> None:
    """Print the counts by split, source and category, the siblings across the split, and what was dropped."""
    pairs = {split: Counter(sample.pair.source for sample in samples) for split, samples in splits.items()}
    for split, sources in pairs.items():
        print(f"| {split} | {sources['emoji']} | {sources['openclipart']} | {sources.total()} |")
    categories = {split: Counter(sample.pair.category for sample in samples) for split, samples in splits.items()}
    for category in sorted(categories["train"] | categories["val"]):
        print(f"| {category} | {categories['train'][category]} | {categories['val'][category]} |")
    print(f"val pairs with a sibling in train: {siblings(splits)}")
    print("dropped:")
    for reason, count in sorted(dropped.items()):
        print(f"  {count:5d}  {reason}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the bundled image-text pairs from Debian's packages.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the shards")
    output: Path = parser.parse_args().output
    dropped: Counter[str] = Counter()
    try:
        samples = [encode(pair) for pair in tqdm(emoji_pairs(dropped), desc="emoji", unit=" pairs")]
        samples += [encode(pair) for pair in tqdm(clipart_pairs(dropped), desc="clip art", unit=" pairs")]
    except MissingPackageError as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 1
    summarise(write_shards(distinct(samples, dropped), output), dropped)
    return 0


if __name__ == "__main__":
    sys.exit(main())
