"""Small models of other libraries, with padded batches, for the tests of vlmfast.patch.

Each gives a mapping with "loss" when called with its inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn

SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {"image_size": 32, "patch_size": 8}
VOCAB, LENGTHS = 60, (9, 4, 7, 9)
TEXT = {**SIZE, "vocab_size": VOCAB}
BERT = {**TEXT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
Inputs = dict[str, Any]


def texts() -> dict[str, Tensor]:
    """Of different lengths, padded on the right, ended by the highest id."""
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(5, VOCAB - 1, mask.shape)
    ids[torch.arange(len(LENGTHS)), torch.tensor(LENGTHS) - 1] = VOCAB - 1
    return {"input_ids": ids * mask, "attention_mask": mask}


def pairs() -> Inputs:
    return {"pixel_values": torch.randn(len(LENGTHS), 3, 32, 32), **texts(), "return_loss": True}


def with_labels(inputs: dict[str, Tensor]) -> Inputs:
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def clip() -> tuple[nn.Module, Inputs]:
    text = {**TEXT, "max_position_embeddings": 12, "eos_token_id": VOCAB - 1, "bos_token_id": None}
    config = transformers.CLIPConfig(vision_config={**SIZE, **IMAGE}, text_config=text, projection_dim=24)
    return transformers.CLIPModel(config), pairs()


def siglip() -> tuple[nn.Module, Inputs]:
    text = {**TEXT, "max_position_embeddings": 12, "bos_token_id": None, "eos_token_id": None}
    config = transformers.SiglipConfig(vision_config={**SIZE, **IMAGE}, text_config=text)
    return transformers.SiglipModel(config), pairs()


def siglip2() -> tuple[nn.Module, Inputs]:
    """Images of different grids, padded to 16 patches."""
    text = {**TEXT, "max_position_embeddings": 12, "bos_token_id": None, "eos_token_id": None}
    vision = {**SIZE, "num_patches": 16, "patch_size": 8}
    shapes = torch.tensor([[4, 4], [2, 5], [3, 4], [2, 7]])
    mask = (torch.arange(16) < shapes.prod(1)[:, None]).long()
    inputs = {
        "pixel_values": torch.randn(4, 16, 3 * 8 * 8) * mask[:, :, None], "pixel_attention_mask": mask,
        "spatial_shapes": shapes, **texts(), "return_loss": True,
    }  # fmt: skip
    return transformers.Siglip2Model(transformers.Siglip2Config(vision_config=vision, text_config=text)), inputs


def dual_encoder() -> tuple[nn.Module, Inputs]:
    bert, vit = transformers.BertConfig(**BERT), transformers.ViTConfig(**SIZE, **IMAGE)
    towers = {"vision_model": transformers.ViTModel(vit), "text_model": transformers.BertModel(bert)}
    return transformers.VisionTextDualEncoderModel(**towers), pairs()


def align() -> tuple[nn.Module, Inputs]:
    vision = {
        "image_size": 32, "width_coefficient": 1.0, "depth_coefficient": 1.0, "kernel_sizes": [3], "in_channels": [32],
        "out_channels": [16], "depthwise_padding": [], "strides": [1], "num_block_repeats": [1], "expand_ratios": [1],
        "drop_connect_rate": 0.0,
    }  # fmt: skip
    config = transformers.AlignConfig(vision_config=vision, text_config=BERT, projection_dim=16)
    return transformers.AlignModel(config), pairs()


class Flava(transformers.FlavaModel):
    """With a loss of all that it embeds; FlavaForPreTraining needs a codebook beside it."""

    def forward(self, **inputs: Any) -> Inputs:  # type: ignore[override]
        out = super().forward(**inputs)
        image, text, both = out.image_embeddings, out.text_embeddings, out.multimodal_embeddings
        loss = image.square().mean() + (text[:, 0] * both[:, 0]).sum() + (both[:, 1:-9] * image).mean()
        return {"loss": loss, "image_embeds": image, "text_embeds": text, "both": both}


def flava() -> tuple[nn.Module, Inputs]:
    config = transformers.FlavaConfig(
        image_config={**SIZE, **IMAGE}, text_config=TEXT, multimodal_config=SIZE, hidden_size=32, projection_dim=16
    )
    return Flava(config), {**pairs(), "bool_masked_pos": torch.rand(4, 16) < 0.4, "return_loss": None}


def bridgetower() -> tuple[nn.Module, Inputs]:
    vision = {"hidden_size": 64, "num_hidden_layers": 2, **IMAGE}
    config = transformers.BridgeTowerConfig(
        vision_config=vision, text_config={**BERT, "hidden_size": 64, "max_position_embeddings": 32}, hidden_size=64,
        num_attention_heads=4, num_hidden_layers=1, intermediate_size=64, contrastive_hidden_size=16,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, logit_scale_init_value=2.6592,
    )  # fmt: skip
    return transformers.BridgeTowerForContrastiveLearning(config), {**pairs(), "pixel_mask": torch.ones(4, 32, 32)}


def vit() -> tuple[nn.Module, Inputs]:
    config = transformers.ViTConfig(**SIZE, **IMAGE, num_labels=3)
    inputs = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.tensor([0, 1, 2, 0])}
    return transformers.ViTForImageClassification(config), inputs


def idefics() -> tuple[nn.Module, Inputs]:
    vision = {
        "embed_dim": 32, "image_size": 16, "patch_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32,
    }  # fmt: skip
    config = transformers.IdeficsConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        cross_layer_interval=1, alpha_initializer="ones", vision_config=vision,
    )  # fmt: skip
    seen = (torch.arange(9)[:, None] >= torch.tensor([1, 4])) & (torch.arange(9)[:, None] < torch.tensor([4, 9]))
    images = {"pixel_values": torch.randn(4, 2, 3, 16, 16), "image_attention_mask": seen.long().expand(4, -1, -1)}
    return transformers.IdeficsForVisionText2Text(config), {**with_labels(texts()), **images}


def mllama() -> tuple[nn.Module, Inputs]:
    """The first sample has two images, one of two tiles; the others one image of one tile."""
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_global_layers": 1,
        "attention_heads": 2, "image_size": 16, "patch_size": 8, "vision_output_dim": 64, "max_num_tiles": 2,
        "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }  # fmt: skip
    text = {**TEXT, "num_key_value_heads": 2, "cross_attention_layers": [1], "max_position_embeddings": 64}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.MllamaConfig(vision_config=vision, text_config={**text, **ids}, image_token_index=VOCAB)
    model = transformers.MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "gate" in name:  # at 0, where training begins, nothing of the images comes through
            nn.init.constant_(parameter, 0.7)
    tiles = torch.tensor([[[1, 1], [1, 0]], *[[[1, 0], [0, 0]]] * 3])
    seen = torch.zeros(4, 9, 2, 2, dtype=torch.long)
    seen[:, 1:, 0] = tiles[:, None, 0]
    seen[0, 5:] = tiles[0]
    seen[0, 5:, 0] = 0
    images = {
        "pixel_values": torch.randn(4, 2, 2, 3, 16, 16) * tiles[..., None, None, None], "aspect_ratio_mask": tiles,
        "aspect_ratio_ids": torch.tensor([[2, 1], [1, 0], [1, 0], [1, 0]]), "cross_attention_mask": seen,
    }  # fmt: skip
    return model, {**with_labels(texts()), **images}


def qwen2_vl() -> tuple[nn.Module, Inputs]:
    """Two of the four samples have an image, of different sizes."""
    vision = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "patch_size": 4, "mlp_ratio": 2}
    rope = {"rope_type": "default", "type": "mrope", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {**TEXT, "num_key_value_heads": 2, "rope_parameters": rope, "bos_token_id": None, "eos_token_id": None}
    special = {"image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4}
    model = transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(vision_config=vision, text_config=text, **special)
    )
    inputs = texts()
    ids = inputs["input_ids"]
    ids[[0, 2], 0] = 3
    ids[0, 1:5] = ids[2, 1:3] = 1
    images = {
        "pixel_values": torch.randn(16 + 8, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 2]]),
    }
    return model, {**with_labels(inputs), **images, "mm_token_type_ids": (ids == 1).long()}


class Classifier(nn.Module):
    """A timm model and its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Any, labels: Tensor) -> Inputs:
        logits = self.model(images)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 3}
LABELS = torch.tensor([0, 1, 2, 0])


def timm_vit() -> tuple[nn.Module, Inputs]:
    timm = pytest.importorskip("timm")
    model = timm.models.VisionTransformer(**TIMM, reg_tokens=2, drop_path_rate=0.0)
    return Classifier(model), {"images": torch.randn(4, 3, 32, 32), "labels": LABELS}


def naflex(projection: str = "linear", **options: Any) -> tuple[nn.Module, Inputs]:
    """Images of different sizes, padded to 16 patches; or, by a convolution, of one size that is not the grid's."""
    timm = pytest.importorskip("timm")
    config = timm.models.naflexvit.NaFlexVitCfg(
        patch_size=8, embed_dim=32, depth=2, num_heads=4, pos_embed_grid_size=(4, 4), embed_proj_type=projection,
        reg_tokens=1, **options,
    )  # fmt: skip
    model = timm.models.naflexvit.NaFlexVit(config, num_classes=3)
    nn.init.normal_(model.embeds.pos_embed)
    if projection == "conv":
        return Classifier(model), {"images": torch.randn(4, 3, 24, 40), "labels": LABELS}
    coordinates = torch.zeros(4, 16, 2, dtype=torch.long)
    valid = torch.zeros(4, 16, dtype=torch.bool)
    for i, (rows, columns) in enumerate([(4, 4), (2, 5), (3, 4), (2, 7)]):
        coordinates[i, : rows * columns] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        valid[i, : rows * columns] = True
    patches = torch.randn(4, 16, 3 * 8 * 8) * valid[:, :, None]
    images = {"patches": patches, "patch_coord": coordinates, "patch_valid": valid}
    return Classifier(model), {"images": images, "labels": LABELS}


def naflex_convolution() -> tuple[nn.Module, Inputs]:
    return naflex("conv", class_token=True)


class Contrastive(nn.Module):
    """An open_clip model and one of its losses."""

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        model.output_dict = True

    def forward(self, images: Tensor, texts: Tensor) -> Inputs:
        out = self.model(images, texts)
        losses = self.loss(**out, output_dict=True)
        return {"loss": sum(losses.values()), **losses, "image_embeds": out["image_features"]}


OPEN_CLIP_VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 8}
OPEN_CLIP_TEXT = {"context_length": 12, "vocab_size": VOCAB, "width": 32, "heads": 4, "layers": 2}


def padded_ids(length: int = 12) -> Tensor:
    return nn.functional.pad(texts()["input_ids"], (0, length - max(LENGTHS)))


def open_clip() -> tuple[nn.Module, Inputs]:
    library = pytest.importorskip("open_clip")
    model = library.CLIP(embed_dim=24, vision_cfg=OPEN_CLIP_VISION, text_cfg=OPEN_CLIP_TEXT)
    inputs = {"images": torch.randn(4, 3, 32, 32), "texts": padded_ids()}
    return Contrastive(model, library.loss.ClipLoss()), inputs


def open_clip_siglip() -> tuple[nn.Module, Inputs]:
    library = pytest.importorskip("open_clip")
    model = library.CLIP(
        embed_dim=24, vision_cfg=OPEN_CLIP_VISION, text_cfg=OPEN_CLIP_TEXT, init_logit_bias=-3.0, init_logit_scale=2.0
    )
    inputs = {"images": torch.randn(4, 3, 32, 32), "texts": padded_ids()}
    return Contrastive(model, library.loss.SigLipLoss()), inputs


def coca() -> tuple[nn.Module, Inputs]:
    library = pytest.importorskip("open_clip")
    vision = {
        **OPEN_CLIP_VISION, "attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 4,
        "output_tokens": True,
    }  # fmt: skip
    text = {**OPEN_CLIP_TEXT, "embed_cls": True, "output_tokens": True, "pad_id": 0}
    multimodal = {**OPEN_CLIP_TEXT, "mlp_ratio": 2}
    model = library.coca_model.CoCa(embed_dim=32, multimodal_cfg=multimodal, text_cfg=text, vision_cfg=vision)
    nn.init.normal_(model.text_decoder.text_projection, std=0.1)  # open_clip leaves it as memory was
    inputs = {"images": torch.randn(4, 3, 32, 32), "texts": padded_ids()}
    return Contrastive(model, library.loss.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=0.5)), inputs


class FlamingoBlock(nn.Module):
    """Resampler and gated cross-attention of flamingo-pytorch or open_flamingo; one sample lacks a medium."""

    def __init__(self, library: Any, immediate: bool, **options: Any) -> None:
        super().__init__()
        self.resampler = library.PerceiverResampler(dim=32, depth=1, dim_head=16, heads=2, num_latents=4)
        self.attend = library.GatedCrossAttentionBlock(
            dim=32, dim_head=16, heads=2, only_attend_immediate_media=immediate, **options
        )
        nn.init.constant_(self.attend.attn_gate, 0.7)
        nn.init.constant_(self.attend.ff_gate, 0.3)

    def forward(self, text: Tensor, media: Tensor, locations: Tensor, mask: Tensor) -> Inputs:
        out = self.attend(text, self.resampler(media), media_locations=locations)
        return {"loss": ((out + 1).square() * mask).mean(), "logits": out}


def flamingo_inputs() -> Inputs:
    locations = torch.zeros(2, 10, dtype=torch.bool)
    locations[0, [1, 6]] = True
    locations[1, 3] = True
    mask = torch.ones(2, 10, 1)
    mask[1, 7:] = 0
    return {"text": torch.randn(2, 10, 32), "media": torch.randn(2, 2, 5, 32), "locations": locations, "mask": mask}


def flamingo() -> tuple[nn.Module, Inputs]:
    return FlamingoBlock(pytest.importorskip("flamingo_pytorch"), True), flamingo_inputs()


def flamingo_all_media() -> tuple[nn.Module, Inputs]:
    return FlamingoBlock(pytest.importorskip("flamingo_pytorch"), False), flamingo_inputs()


def open_flamingo() -> tuple[nn.Module, Inputs]:
    """Its media have frames: (B, T, F, n, D)."""
    inputs = flamingo_inputs()
    library = pytest.importorskip("open_flamingo.src.helpers")
    return FlamingoBlock(library, True, dim_visual=32), {**inputs, "media": inputs["media"][:, :, None]}


class Known(NamedTuple):
    """How to make a model, what is replaced in it, by name in the model and by the name of its class, and what not.

    `layers`: how many layers of a tower it can do with.
    """

    make: Callable[[], tuple[nn.Module, Inputs]]
    replaced: dict[str, str]
    left: tuple[str, ...] = ()
    layers: int = 1

    def shortened(self) -> tuple[nn.Module, Inputs]:
        """With these layers alone, which are the library's own and take a compiler long; what is replaced is whole."""
        model, inputs = self.make()
        for name, module in list(model.named_modules()):
            whole = any(
                f"{path}.".startswith(f"{name}.") or name.startswith(f"{path}.") for path in self.replaced if path
            )
            if isinstance(module, nn.ModuleList) and not whole:
                del module[self.layers :]
        return model, inputs


MODELS = {
    "clip": Known(clip, {"": "CLIPModel", "vision_model.embeddings": "CLIPVisionEmbeddings"}, layers=0),
    "siglip": Known(siglip, {"": "SiglipModel", "vision_model.embeddings": "SiglipVisionEmbeddings"}, layers=0),
    "siglip2": Known(siglip2, {"": "Siglip2Model", "vision_model.embeddings": "Siglip2VisionEmbeddings"}, layers=0),
    "dual encoder": Known(
        dual_encoder, {"": "VisionTextDualEncoderModel", "vision_model.embeddings": "ViTEmbeddings"}, layers=0
    ),
    "align": Known(align, {"": "AlignModel"}),
    "flava": Known(flava, {"image_model.embeddings": "FlavaImageEmbeddings"}, layers=0),
    "bridgetower": Known(
        bridgetower, {"bridgetower.vision_model.visual.embeddings": "BridgeTowerVisionEmbeddings"}, ("",)
    ),
    "vit": Known(vit, {"vit.embeddings": "ViTEmbeddings"}, layers=0),
    "idefics": Known(
        idefics, {f"model.gated_cross_attn_layers.{i}": "IdeficsGatedCrossAttentionLayer" for i in range(2)}, ("",)
    ),
    "mllama": Known(
        mllama,
        {"": "MllamaForConditionalGeneration", "model.language_model.layers.1": "MllamaCrossAttentionDecoderLayer"},
    ),
    "qwen2-vl": Known(
        qwen2_vl, {"": "Qwen2VLForConditionalGeneration", "model.visual.patch_embed": "PatchEmbed"}, layers=0
    ),
    "timm": Known(timm_vit, {"model.patch_embed": "PatchEmbed"}),
    "naflex": Known(naflex, {"model.embeds": "NaFlexEmbeds"}),
    "naflex, convolution": Known(naflex_convolution, {"model.embeds": "NaFlexEmbeds"}),
    "open_clip": Known(open_clip, {"model.visual": "VisionTransformer", "loss": "ClipLoss"}),
    "open_clip siglip": Known(open_clip_siglip, {"model.visual": "VisionTransformer", "loss": "SigLipLoss"}),
    "coca": Known(coca, {"model.visual": "VisionTransformer", "loss": "CoCaLoss"}),
    "flamingo": Known(flamingo, {"resampler": "PerceiverResampler", "attend": "GatedCrossAttentionBlock"}),
    "flamingo, all media": Known(
        flamingo_all_media, {"resampler": "PerceiverResampler", "attend": "GatedCrossAttentionBlock"}
    ),
    "open_flamingo": Known(open_flamingo, {"resampler": "PerceiverResampler", "attend": "GatedCrossAttentionBlock"}),
}
