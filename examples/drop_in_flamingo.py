"""flamingo-pytorch's gated cross-attention with vlmfast's inside: no mask over the keys, the same outputs.

python examples/drop_in_flamingo.py
"""

import torch
from flamingo_pytorch import GatedCrossAttentionBlock, PerceiverResampler
from torch import nn

import vlmfast

torch.manual_seed(0)
model = nn.ModuleDict(
    {"resampler": PerceiverResampler(dim=64, depth=1), "attend": GatedCrossAttentionBlock(dim=64, dim_head=16, heads=4)}
)
nn.init.ones_(model["attend"].attn_gate)  # at 0, where training begins, the block is the identity
text, images = torch.randn(2, 48, 64), torch.randn(2, 3, 20, 64)  # three images of 20 tokens
places = torch.zeros(2, 48, dtype=torch.bool)
places[:, [0, 16, 32]] = True

before = model["attend"](text, model["resampler"](images), media_locations=places)
print(vlmfast.patch(model))
after = model["attend"](text, model["resampler"](images), media_locations=places)
print(f"largest difference: {(after - before).abs().max().item():.1e}")
torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
