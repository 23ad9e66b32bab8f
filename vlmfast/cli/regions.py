"""vlmfast regions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmfast.cli.arguments import parse
from vlmfast.models import model_class, model_type

BLOCK_ROWS = 256
"""Images of a file: 100 regions of 2048 numbers, and 1,601 probabilities of each, are 1.5 MB an image."""
CHECKED = 1000
"""Images whose true boxes are looked for among the regions."""
ENOUGH = 0.5


@dataclass
class RegionsArguments:
    """What `vlmfast regions` takes."""

    detector: str = field(metadata={"help": "Folder or name of a trained detector."})
    data: str = field(metadata={"help": "Shards, a table or a folder of images; no text is needed."})
    output: str = field(metadata={"help": "A folder for the regions; run again to go on after a stop."})
    model: str | None = field(
        default=None,
        metadata={"help": "Name of a model, or package.module:Class; by default what the checkpoint says that it is."},
    )
    min_regions: int = field(default=10, metadata={"help": "Regions of an image at least."})
    max_regions: int = field(default=100, metadata={"help": "Regions of an image at most; 36 of both are 36 of each."})
    threshold: float = field(default=0.2, metadata={"help": "Score from which a region is kept beyond the least."})
    batch_size: int = field(default=16, metadata={"help": "Images per forward pass."})
    num_workers: int = field(default=2, metadata={"help": "Processes that decode images."})
    device: str | None = field(default=None, metadata={"help": "By default a GPU where there is one."})

    def __post_init__(self) -> None:
        if not 1 <= self.min_regions <= self.max_regions:
            raise ValueError(
                f"--max-regions: expected at least --min-regions {self.min_regions}, got {self.max_regions}"
            )
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"--threshold: expected a probability, got {self.threshold}")
        if self.batch_size < 1:
            raise ValueError(f"--batch-size: expected at least 1, got {self.batch_size}")


def run(arguments: Sequence[str]) -> int:
    """The folder that --features reads, and on standard output how many regions there are and what was skipped."""
    parsed = parse("vlmfast regions", {"the run": (RegionsArguments, {})}, arguments)
    if parsed is None:
        return 0
    import torch

    from vlmfast.data import ImageTextDataset, cache_features
    from vlmfast.models.checkpoints import load

    (args,) = parsed
    cls = model_class(args.model or model_type(args.detector))
    if not hasattr(cls, "regions"):
        raise ValueError(f"--detector {args.detector}: {cls.__name__} finds no regions")
    model = load(cls, args.detector).to(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    transform = model.transform(model.Options(pretrained=args.detector), train=False)
    dataset = ImageTextDataset(args.data, transform=transform, requires=())
    many = {"least": args.min_regions, "most": args.max_regions, "threshold": args.threshold}
    cache = cache_features(
        args.output,
        dataset,
        lambda images: model.regions(images, **many),
        f"{model.frozen_fingerprint()} {many}",
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        block_rows=BLOCK_ROWS,
        progress=lambda done, files: print(f"regions: {done} of {files} files of {BLOCK_ROWS} images", flush=True),
    )
    unreadable = len(cache.unreadable())
    print(f"{len(cache) - unreadable} images in {args.output}; skipped: {unreadable or 'nothing'}")
    for reason, count in dataset.skipped().items():
        print(f"  {count} {reason}")
    _print_summary(cache, dataset)
    return 0


def _print_summary(cache: Any, dataset: Any) -> None:
    """How many regions an image has, and how many true boxes they reach, where the records have any."""
    from vlmfast.tasks.boxes import overlap
    from vlmfast.tasks.detection import objects_of

    counts, width, reached, boxes = [], 0, 0, 0
    for index in range(0, len(cache), max(1, len(cache) // CHECKED)):
        found = cache[index]
        if found is None:
            continue
        counts.append(len(found["boxes"]))
        width = found["features"].shape[1]
        truth, _, crowd = objects_of(dataset.record(index))
        truth = truth[crowd == 0]
        boxes += len(truth)
        reached += int((overlap(truth, found["boxes"].double()) >= ENOUGH).any(dim=1).sum())
    if counts:
        mean = sum(counts) / len(counts)
        print(f"of {len(counts)} images: {min(counts)} to {max(counts)} regions, {mean:.1f} on average, {width} wide")
    if boxes:
        print(f"true boxes that a region overlaps by IoU {ENOUGH} or more: {100 * reached / boxes:.1f} % of {boxes}")
