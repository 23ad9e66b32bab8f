"""FIBER's backbone: a Swin and a RoBERTa of transformers, and what fuses their last layers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from vlmfast.models.bert_attention import heads_attention
from vlmfast.models.checkpoints import find, load_auto
from vlmfast.models.towers import load_model, normalisation, tower_input
from vlmfast.nn.fiber import ImageToTextFusion, TextToImageFusion


class Image(NamedTuple):
    """Tokens (B, H * W, D) of images before the first fused block, and H and W."""

    states: Tensor
    size: tuple[int, int]


class Text(NamedTuple):
    """States (B, L, D) of texts before the first fused layer, and a mask bool (B, L), True at tokens; None: all are."""

    states: Tensor
    mask: Tensor | None


class Backbone(nn.Module):
    """The two towers, and a fusion for each of the last layers of RoBERTa and of the last blocks of Swin.

    Args:
        config: a FIBERConfig.
        fused: None leaves the fusions out; "both" has those of either side; "decoder" those of the text alone, and maps
            of the last image tokens to what each reads.
    """

    def __init__(self, config: Any, fused: str | None) -> None:
        super().__init__()
        vision, text = config.vision_config, config.text_config
        self.vision_model = transformers.SwinModel(vision, add_pooling_layer=False)
        self.text_model = transformers.RobertaModel(text, add_pooling_layer=False)
        self.image_mean, self.image_std = config.image_mean, config.image_std
        self.count = config.num_fused_layers
        pairs = self.stages[-self.count :]
        widths = [vision.embed_dim * 2**stage for stage in pairs]
        self.t2i = self.i2t = self.cross_modal_att_layers = None
        if fused is not None:
            self.t2i = nn.ModuleList(
                [TextToImageFusion(text.hidden_size, text.num_attention_heads, width) for width in widths]
            )
        if fused == "both":
            self.i2t = nn.ModuleList(
                [
                    ImageToTextFusion(width, vision.num_heads[stage], text.hidden_size)
                    for stage, width in zip(pairs, widths, strict=True)
                ]
            )
        if fused == "decoder":
            self.text_model.encoder.layer[-1].output.LayerNorm = nn.Identity()  # read by nothing
            self.cross_modal_att_layers = nn.ModuleList(
                [nn.Identity() if width == widths[-1] else nn.Linear(widths[-1], width) for width in widths]
            )

    @property
    def stages(self) -> list[int]:
        """The stage of each block of Swin."""
        return [stage for stage, depth in enumerate(self.vision_model.config.depths) for _ in range(depth)]

    def encode_image(self, pixel_values: Tensor, stages: list[Image] | None = None) -> Image:
        """Images as `vlmfast.models.towers.tower_input`, through the blocks that are never fused.

        Args:
            stages: takes in what each stage gives that ends on the way, before patches are merged.
        """
        tower = self.vision_model
        pixels = tower_input(tower, pixel_values, self.image_mean, self.image_std, reads_bytes=False)
        states, size = tower.embeddings(pixels)
        image = Image(states, tuple(size))
        for number in range(len(self.stages) - self.count):
            image = self._block(number, image, stages=stages)
        return image

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None, *, causal: bool = False) -> Text:
        """Texts (B, L), padded on the right, through the layers that are never fused."""
        mask = None if attention_mask is None else attention_mask.bool()
        text = Text(self.text_model.embeddings(input_ids=input_ids), mask)
        seen = _seen(text, causal)
        for layer in self.text_model.encoder.layer[: -self.count]:
            text = text._replace(states=text_layer(layer, text.states, seen))
        return text

    def alone(self, image: Image | None = None, text: Text | None = None) -> Tensor:
        """The last states of images (B, R, D), or of texts (B, L, D), each without the other, after the last norm."""
        if image is not None:
            for number in range(len(self.stages) - self.count, len(self.stages)):
                image = self._block(number, image)
            normed: Tensor = self.vision_model.layernorm(image.states)
            return normed
        assert text is not None
        states, seen = text.states, _seen(text)
        for layer in self.text_model.encoder.layer[-self.count :]:
            states = text_layer(layer, states, seen)
        return states

    def fuse(
        self,
        image: Image,
        text: Text,
        *,
        text_only: bool = False,
        last_norm: bool = False,
        stages: list[Image] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The last states of texts and images that read each other, images without their tower's last norm.

        Of each pair of layers, either reads the other's states from before the pair.

        Args:
            text_only: leaves out the last block of images, which texts do not read, and returns what was before it.
            last_norm: whether the texts' go through the norm of their last layer.
            stages: as `encode_image`.
        """
        assert self.t2i is not None
        assert self.i2t is not None
        first, states, seen = len(self.stages) - self.count, text.states, _seen(text)
        for k, layer in enumerate(self.text_model.encoder.layer[-self.count :]):
            last = k == self.count - 1
            read = text_layer(layer, states, seen, self.t2i[k], image.states, last_norm=last_norm or not last)
            if not (last and text_only):
                image = self._block(first + k, image, self.i2t[k], Text(states, text.mask), stages)
            states = read
        return states, image.states

    def decode(self, memory: Tensor, text: Text) -> Tensor:
        """The last states (B, L, D) of texts that read the image's last states (B, R, D), and no later token."""
        assert self.t2i is not None
        assert self.cross_modal_att_layers is not None
        states, seen = text.states, _seen(text, causal=True)
        for k, layer in enumerate(self.text_model.encoder.layer[-self.count :]):
            image = self.cross_modal_att_layers[k](memory)
            states = text_layer(layer, states, seen, self.t2i[k], image, last_norm=k < self.count - 1)
        return states

    def copy_from(self, vision: Any, text: Any) -> None:
        """Weights of a SwinModel and a RobertaModel of the same configs; None leaves a tower as it is."""
        for tower, own in ((vision, self.vision_model), (text, self.text_model)):
            if tower is not None:
                weights = tower.state_dict()
                own.load_state_dict({name: weights[name] for name in own.state_dict()})

    def _block(
        self,
        number: int,
        image: Image,
        fusion: Any = None,
        text: Text | None = None,
        stages: list[Image] | None = None,
    ) -> Image:
        """Block `number` of Swin, and the merging of patches behind it where a stage ends."""
        stage = self.stages[number]
        layer: Any = self.vision_model.encoder.layers[stage]
        block = layer.blocks[number - self.stages.index(stage)]
        handle, windows = None, (block.window_size, block.shift_size)
        if fusion is not None:
            assert text is not None
            # The windows' output behind the projection. They are a sample's one after the other, as the fusion wants.
            handle = block.attention.register_forward_hook(
                lambda module, given, found: (fusion(found[0], text.states, text.mask), *found[1:])
            )
        try:
            states = block(image.states, image.size)[0]
        finally:
            if handle is not None:
                handle.remove()
            block.window_size, block.shift_size = windows  # which transformers leaves changed by a small image
        image = Image(states, image.size)
        ends = number + 1 == len(self.stages) or self.stages[number + 1] != stage
        if ends and stages is not None:
            stages.append(image)
        if not ends or layer.downsample is None:
            return image
        height, width = image.size
        return Image(layer.downsample(image.states, image.size), ((height + 1) // 2, (width + 1) // 2))


class Pooler(nn.Module):
    """tanh(dense(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.dense(x).tanh()
        return pooled


def text_layer(
    layer: Any,
    x: Tensor,
    mask: Tensor | None,
    fusion: Any = None,
    image: Tensor | None = None,
    *,
    last_norm: bool = True,
) -> Tensor:
    """A RobertaLayer of x (B, L, D); with a fusion, the image is added before the residual and the norm of attention.

    Args:
        mask (B, 1, 1 or L, L): bool.
        image (B, R, W): what the fusion reads.
        last_norm: whether the layer's output goes through its norm.
    """
    output = layer.attention.output
    attended = output.dropout(output.dense(heads_attention(layer.attention.self, x, x, mask)))
    if fusion is not None:
        attended = fusion(attended, image)
    attended = output.LayerNorm(attended + x)
    if last_norm:
        found: Tensor = layer.feed_forward_chunk(attended)
        return found
    return attended + layer.output.dropout(layer.output.dense(layer.intermediate(attended)))


def _seen(text: Text, causal: bool = False) -> Tensor | None:
    """Which tokens each token sees, bool (B, 1, 1 or L, L); None: all."""
    mask = None if text.mask is None else text.mask[:, None, None]
    if not causal:
        return mask
    length = text.states.shape[1]
    past = torch.ones(length, length, dtype=torch.bool, device=text.states.device).tril()
    return past if mask is None else past & mask


def loaded_towers(options: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The SwinModel and the RobertaModel that options name, or None, and how the former's pixels are normalised.

    Raises:
        ValueError: one is a model of another kind.
    """
    vision = text = None
    normalised: dict[str, Any] = {}
    if options.vision_tower:
        vision = _loaded(transformers.SwinModel, "vision_tower", load_model("vision_tower", options.vision_tower))
        normalised = normalisation(options.vision_tower)
    if options.text_tower:
        source = load_auto(transformers.AutoModel, "text_tower", find(options.text_tower), new=("pooler.",))
        text = _loaded(transformers.RobertaModel, "text_tower", source)
    return vision, text, normalised


def _loaded(kind: Any, name: str, model: Any) -> Any:
    if not isinstance(model, kind):
        raise ValueError(f"--{name.replace('_', '-')}: expected a {kind.__name__}, got {type(model).__name__}")
    return model
