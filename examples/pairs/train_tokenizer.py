"""Train the bundled tokenizer on the captions of the train split.

`python examples/pairs/train_tokenizer.py --shards examples/pairs --output vlmfast/data/tokenizer`
"""

import argparse
import json
import sys
import tarfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 4096
MAX_LENGTH = 77  # CLIP's context

# The end token is not 2: with eos_token_id 2 transformers' CLIP pools at the largest id, a rule for old checkpoints.
PAD, END, START = "<|pad|>", "<|endoftext|>", "<|startoftext|>"


def captions(shards: Path) -> list[str]:
    """The captions of train-*.tar in `shards`, in order.

    Raises:
        FileNotFoundError: the folder holds no such shard.
    """
    paths = sorted(shards.glob("train-*.tar"))
    if not paths:
        raise FileNotFoundError(f"no train-*.tar in {shards}: run build.py first")
    found = []
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json") and (file := tar.extractfile(member)):
                    found.append(json.load(file)["caption"])
    return found


def train(texts: list[str]) -> PreTrainedTokenizerFast:
    """A lower-casing byte-level BPE with ids 0 (pad), 1 (end), 2 (start), then all 256 bytes, so any text has ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        special_tokens=[PAD, END, START],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        pair=f"{START} $A {END} $B {END}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (START, END)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        bos_token=START,
        padding_side="right",
        truncation_side="right",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the bundled tokenizer on the captions of the train split.")
    parser.add_argument("--shards", type=Path, required=True, help="folder with train-*.tar")
    parser.add_argument("--output", type=Path, required=True, help="folder for the tokenizer")
    arguments = parser.parse_args()
    try:
        texts = captions(arguments.shards)
    except FileNotFoundError as error:
        print(f"train_tokenizer.py: {error}", file=sys.stderr)
        return 1
    tokenizer = train(texts)
    tokenizer.save_pretrained(arguments.output)
    tokens = sum(len(ids) for ids in tokenizer(texts)["input_ids"])
    print(f"{len(texts)} captions, {len(tokenizer)} tokens, {tokens / len(texts):.2f} ids per caption")
    return 0


if __name__ == "__main__":
    sys.exit(main())
