"""The ASIF example, on small encoders in the place of its packages'."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from toys import COLOURS, write_records

from vlmfast.data import load_tokenizer

ROOT = Path(__file__).parents[2]


def test_the_example_makes_anchors_and_scores_val(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = importlib.import_module("asif")
    try:
        for split in ("train", "val"):
            records = [(colour, {"caption": colour, "category": colour}) for colour in COLOURS]
            write_records(tmp_path / f"{split}-00000.tar", *records)
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        tokenizer, bert = load_tokenizer(), tmp_path / "bert"
        transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained(bert)
        tokenizer.save_pretrained(bert)
        tower = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=8))
        monkeypatch.setattr(example, "PAIRS", tmp_path)
        monkeypatch.setattr(example, "image_tower", lambda: tower)
        monkeypatch.setattr(example, "package", lambda name: SimpleNamespace(get_model_path=lambda: str(bert)))
        out = tmp_path / "run"
        monkeypatch.setattr(sys, "argv", ["asif.py", f"--output-dir={out}", "--image-size=16", "--k=1"])
        example.main()
    finally:
        del sys.modules["asif"], sys.modules["lit"]
    said = capsys.readouterr().out
    assert "6 anchors" in said
    # Val is the training pairs: each describes itself.
    assert said.split("image -> text")[1].split()[0] == "100.0%"
    assert (out / "config.json").exists()
