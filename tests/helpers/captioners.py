"""Tiny captioners and batches for the tests of models whose decoder reads an image by cross-attention."""

from __future__ import annotations

from typing import Any

import torch
from prefix_models import PAD, STOP, VOCAB, gpt2, vit
from torch import Tensor

BEGIN = 3
CAPTIONS = ([BEGIN, 5, 9, 11, STOP], [BEGIN, 6, STOP], [BEGIN, 12, 13, 5, 5, 9, STOP])


def make(cls: Any, language: Any = None, **options: Any) -> Any:
    """A model in eval mode whose weights are large enough that everything it reads shows."""
    torch.manual_seed(1)
    language = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0) if language is None else language
    tokens = {"begin_token_id": BEGIN, "stop_token_id": STOP, "filler_token_id": PAD}
    model = cls(cls.config_class(**{"vision_config": vit(), "text_config": language, **tokens, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("vision") and parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.eval()


def pixels(count: int = len(CAPTIONS)) -> Tensor:
    return torch.randint(256, (count, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))


def captions(*, left: bool = False) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels of CAPTIONS, with junk at the pads."""
    length = max(map(len, CAPTIONS))
    ids, mask = torch.full((len(CAPTIONS), length), VOCAB - 1), torch.zeros(len(CAPTIONS), length, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for k, row in enumerate(CAPTIONS):
        place = slice(length - len(row), length) if left else slice(0, len(row))
        ids[k, place], mask[k, place] = torch.tensor(row), 1
        labels[k, place] = torch.tensor([-100, *row[1:]])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def regions(width: int = 20) -> dict[str, Tensor]:
    """Features of 4, 2 and 1 regions, with junk behind the last of each."""
    features = torch.randn(3, 4, width, generator=torch.Generator().manual_seed(5))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    return {"image_features": features, "image_mask": mask}


def check_generation(model: Any, **images: Tensor) -> None:
    """With a cache as without; greedy as a whole new pass for every token; prompts padded as alone; with a cache the
    keys and values of images are computed once."""
    prompts = torch.tensor([[0, BEGIN, 5], [0, 0, BEGIN], [BEGIN, 9, 11]])
    mask = torch.tensor([[0, 1, 1], [0, 0, 1], [1, 1, 1]])
    given = {"input_ids": prompts, "attention_mask": mask, **images}
    computed = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: computed.append(name))
        for name, module in model.named_modules()
        if name.endswith("crossattention.c_attn")
    ]
    greedy = model.generate(**given, max_new_tokens=8)
    assert len(computed) == len(set(computed)) == len(handles) > 0
    assert torch.equal(greedy, model.generate(**given, max_new_tokens=8, use_cache=False))
    beams = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 6}
    found = model.generate(**given, **beams)
    assert torch.equal(found, model.generate(**given, **beams, use_cache=False))
    assert len(found.unique(dim=0)) > 3
    for k in range(3):
        image = {name: value[k : k + 1] for name, value in images.items()}
        ids = prompts[k][mask[k] == 1].tolist()
        for token in greedy[k].tolist():
            states = model(input_ids=torch.tensor([ids]), **image).hidden_states
            logits = sum(head(state[0, -1]) for head, state in zip(model.decoder.heads(), states, strict=True))
            assert int(logits.argmax()) == token
            ids.append(token)
            if token == STOP:
                break
