"""Swaps the stem of a transformers CLIP vision tower for one op and feeds it uint8 pixels."""

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vlmfast.nn.transformers import CLIPVisionEmbeddings


def main() -> None:
    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_size=192, intermediate_size=768, num_hidden_layers=2, num_attention_heads=3)
    model = CLIPVisionModel(config).eval()
    images = torch.randint(0, 256, (4, 224, 224, 3), dtype=torch.uint8)  # as decoders give them

    # What a data path does today: floats, normalised, channels first.
    mean, std = torch.tensor(OPENAI_CLIP_MEAN), torch.tensor(OPENAI_CLIP_STD)
    floats = ((images / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        expected = model(floats).pooler_output

    # The parameters stay the model's own: checkpoints and optimizers do not notice.
    keys = list(model.state_dict())
    model.embeddings = CLIPVisionEmbeddings.from_original(model.embeddings, mean=OPENAI_CLIP_MEAN, std=OPENAI_CLIP_STD)
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        from_uint8, from_floats = model(images).pooler_output, model(floats).pooler_output

    torch.testing.assert_close(from_uint8, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(from_floats, expected, rtol=1e-4, atol=1e-4)
    print(f"largest value: {expected.abs().max():.1f}")
    print(f"largest difference from uint8: {(from_uint8 - expected).abs().max():.1e}")
    print(f"largest difference from floats: {(from_floats - expected).abs().max():.1e}")
    print(f"bytes per image: {images[0].nbytes}, before {floats[0].nbytes}")


if __name__ == "__main__":
    main()
