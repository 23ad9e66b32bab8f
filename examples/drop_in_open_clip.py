"""open_clip's model and loss with vlmfast's inside; the training loop stays as it is, and images may stay uint8.

python examples/drop_in_open_clip.py
"""

import open_clip
import torch

import vlmfast

torch.manual_seed(0)
model = open_clip.create_model("ViT-S-32", pretrained=None)  # random weights here
loss_fn = open_clip.loss.ClipLoss()
images, texts = torch.randn(4, 3, 224, 224), torch.randint(1, 1000, (4, 77))

before = loss_fn(*model(images, texts)[:3])
print(vlmfast.patch(model), vlmfast.patch(loss_fn), sep="\n")
after = loss_fn(*model(images, texts)[:3])
print(f"loss before {before.item():.6f}, after {after.item():.6f}")
torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)

pixels = torch.randint(0, 256, (4, 224, 224, 3), dtype=torch.uint8)  # as a decoder gives them
print(f"features of uint8 pixels: {tuple(model.encode_image(pixels).shape)}")
