"""vlmfast eval."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from vlmfast.cli.models import MODELS, existing, image_size, model_class, model_type


def run(arguments: Sequence[str]) -> int:
    """Scores as a table, as JSON with --output and as a picture with --report."""
    parser = argparse.ArgumentParser(prog="vlmfast eval", description="Retrieval and zero-shot scores of a checkpoint.")
    parser.add_argument("--model", choices=list(MODELS), help="by default what the checkpoint says that it is")
    parser.add_argument("--checkpoint", required=True, help="folder or name of a trained model")
    parser.add_argument("--data", required=True, help="shards, a table or a folder of image-text pairs")
    parser.add_argument("--tokenizer", help="folder or name; by default the checkpoint's own")
    parser.add_argument("--image-size", type=int, help="side of the images, where the checkpoint's config has none")
    parser.add_argument(
        "--max-length", type=int, help="tokens of a caption at most; by default what the model was made for"
    )
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--num-workers", type=int, default=2, help="processes that decode images")
    parser.add_argument("--device", help="by default a GPU where there is one")
    parser.add_argument("--output", type=Path, help="write the scores to this JSON file")
    parser.add_argument("--report", type=Path, help="write queries and what they retrieve to this PNG file")
    options = parser.parse_args(arguments)

    from transformers.utils import logging

    from vlmfast.data import ImageTextDataset, eval_transform, load_tokenizer
    from vlmfast.evaluation import evaluate, write_report

    for path in (options.output, options.report):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    name = options.model or model_type(options.checkpoint)
    model = model_class(name).from_pretrained(existing(options.checkpoint))
    tokenizer = load_tokenizer(options.tokenizer or options.checkpoint)
    dataset = ImageTextDataset(options.data, transform=eval_transform(image_size(model, options.image_size)))
    scores = evaluate(
        model,
        dataset,
        tokenizer,
        max_length=options.max_length or model.config.text_config.max_position_embeddings,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        device=options.device,
    )
    scores.arguments.update(checkpoint=options.checkpoint, data=options.data)
    print(scores.table())
    if options.output:
        options.output.write_text(json.dumps(scores.to_dict(), indent=2) + "\n")
        print(f"scores: {options.output}")
    if options.report:
        write_report(options.report, scores, dataset)
        print(f"report: {options.report}")
    return 0
