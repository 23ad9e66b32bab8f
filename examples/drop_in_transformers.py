"""transformers' CLIP with vlmfast's stem and loss: one line, the same loss, no N x N logits.

python examples/drop_in_transformers.py
"""

import torch
from transformers import CLIPConfig, CLIPModel

import vlmfast

SIZE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
torch.manual_seed(0)
vision = {**SIZE, "image_size": 32, "patch_size": 8}
text = {**SIZE, "vocab_size": 100, "max_position_embeddings": 8, "eos_token_id": 99}
model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text))  # or CLIPModel.from_pretrained(...)
batch = {"pixel_values": torch.randn(16, 3, 32, 32), "input_ids": torch.randint(3, 100, (16, 8)), "return_loss": True}

before = model(**batch).loss
print(vlmfast.patch(model))
after = model(**batch).loss
print(f"loss before {before.item():.6f}, after {after.item():.6f}")
torch.testing.assert_close(after, before)
