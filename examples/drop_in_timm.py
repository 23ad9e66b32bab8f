"""A timm vision transformer with vlmfast's stem.

python examples/drop_in_timm.py
"""

import timm
import torch

import vlmfast

torch.manual_seed(0)
model = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
images = torch.randn(2, 3, 224, 224)
before = model(images)
with vlmfast.patch(model) as report:
    print(report)
    after = model(images)
print(f"largest difference of the logits: {(after - before).abs().max().item():.1e}")
torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
assert torch.equal(model(images), before)  # unpatched again
