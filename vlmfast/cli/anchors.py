"""vlmfast anchors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmfast.cli.arguments import UsageError, parse
from vlmfast.models import model_class

MODEL = "asif"


@dataclass
class AnchorArguments:
    """What is done, and with which pairs."""

    data: str | None = field(
        default=None, metadata={"help": "Pairs that become anchors: shards, a table or a folder of samples."}
    )
    output_dir: Path | None = field(default=None, metadata={"help": "A folder for a new model and its anchors."})
    checkpoint: Path | None = field(default=None, metadata={"help": "A model whose anchors are changed or explained."})
    remove: Path | None = field(
        default=None, metadata={"help": "A file of keys of samples, one a line, whose anchors no longer count."}
    )
    restore: Path | None = field(default=None, metadata={"help": "A file of keys whose anchors count again."})
    explain: str | None = field(
        default=None, metadata={"help": "Samples whose decisions are traced to anchors; writes --report."}
    )
    report: Path | None = field(default=None, metadata={"help": "The picture of --explain, a PNG."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Name or folder of a transformers tokenizer; by default the text model's own."}
    )
    batch_size: int = field(default=256, metadata={"help": "Pairs per forward pass."})
    num_workers: int = field(default=0, metadata={"help": "Processes that decode images."})
    device: str | None = field(default=None, metadata={"help": "By default a GPU where there is one."})

    def __post_init__(self) -> None:
        for name, value, least in (("batch-size", self.batch_size, 1), ("num-workers", self.num_workers, 0)):
            if value < least:
                raise UsageError(f"--{name}: expected at least {least}, got {value}")
        if (self.output_dir is None) == (self.checkpoint is None):
            raise UsageError("one of --output-dir, for a new model, and --checkpoint is needed")
        if self.output_dir is not None and self.data is None:
            raise UsageError("--data is needed: pairs that become anchors")
        edits = {"remove": self.remove, "restore": self.restore, "explain": self.explain}
        given = [f"--{name}" for name, value in edits.items() if value is not None]
        if self.output_dir is not None and given:
            raise UsageError(f"{given[0]} needs --checkpoint")
        if self.checkpoint is not None and self.data is None and not given:
            raise UsageError("--checkpoint needs one of --data, --remove, --restore and --explain")
        if (self.explain is None) != (self.report is None):
            raise UsageError("--explain and --report belong together")


def run(arguments: Sequence[str]) -> int:
    """Makes a model of two encoders and anchor pairs, or changes or explains the anchors of one."""
    cls = model_class(MODEL)
    kinds: dict[str, Any] = {"anchors": (AnchorArguments, {}), f"{MODEL}: {cls.paper}": (cls.Options, {})}
    parsed = parse("vlmfast anchors", kinds, arguments)
    if parsed is None:
        return 0
    args, options = parsed

    import torch
    from transformers.utils import logging

    from vlmfast.models.checkpoints import find_tokenizer, load

    logging.disable_progress_bar()
    options.check()
    if args.output_dir is not None:
        tokenizer = find_tokenizer(args.tokenizer or options.tokenizer_source())
        model = cls.build(options, tokenizer)
        folder = args.output_dir / "anchors"
    else:
        options.refuse([f.name for f in dataclasses.fields(options)], f"--checkpoint {args.checkpoint}")
        model = load(cls, str(args.checkpoint))
        tokenizer = find_tokenizer(args.tokenizer or str(args.checkpoint))
        options = cls.Options(pretrained=str(args.checkpoint))
        folder = model.anchor_folder
    model.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()

    if args.data is not None:
        _add(model, tokenizer, options, args, folder)
    for path, change in ((args.remove, "remove"), (args.restore, "restore")):
        if path is not None:
            keys = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
            numbers = model.anchors.of_keys(keys)
            getattr(model.anchors, change)(numbers)
            model.anchors.write_removed()
            print(f"{change}d {len(numbers):,}; {len(model.anchors):,} anchors count")
    if args.explain is not None:
        _explain(model, tokenizer, options, args)
    return 0


def _add(model: Any, tokenizer: Any, options: Any, args: AnchorArguments, folder: Path) -> None:
    from vlmfast.data import ImageTextDataset

    assert args.data is not None
    dataset = ImageTextDataset(args.data, transform=model.transform(options, train=False))
    path = Path(args.data)
    model.add_anchors(
        folder,
        dataset,
        model.collator(options, tokenizer, train=False),
        source=str(path.resolve()) if path.parent.is_dir() and "," not in args.data else args.data,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        progress=lambda done, blocks: print(f"anchors: {done} of {blocks} blocks", flush=True),
    )
    if args.output_dir is not None:
        model.save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)
    skipped = ", ".join(f"{count} {reason}" for reason, count in dataset.skipped().items() if count)
    print(f"{len(model.anchors):,} anchors in {folder}; skipped: {skipped or 'nothing'}")


def _explain(model: Any, tokenizer: Any, options: Any, args: AnchorArguments) -> None:
    from vlmfast.data import ImageTextDataset
    from vlmfast.tasks.attribution import write_attribution

    assert args.explain is not None
    assert args.report is not None
    dataset = ImageTextDataset(args.explain, transform=model.transform(options, train=False))
    write_attribution(
        args.report,
        model,
        dataset,
        model.collator(options, tokenizer, train=False),
        batch_size=args.batch_size,
        num_workers=args.num_workers,
    )
    print(f"report: {args.report}")
