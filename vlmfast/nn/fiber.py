"""FIBER's fusion in the backbone: image into a text layer, text into an image layer, each beside its self-attention.

Neither has a tanh: the gates `alpha_t2i` and `alpha_i2t` multiply as they are and start at 0, where each backbone is
what it was without the other. Dropout in the attention and after it is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.nn._attention import add_gated, attend, key_bias, merge_heads, split_heads
from vlmfast.nn._sizes import check_divides, check_integers


class TextToImageFusion(nn.Module):
    """Text attends to the image: `a + alpha_t2i * dense(attention(a, image))` in a RoBERTa layer.

    a is the self-attention's output after its dense layer, before residual and norm; the layer goes on with
    `LayerNorm(fused + x)`. Parameters have the names that they have in FIBER's RobertaLayer. There,
    `crossattention_t2i.output.LayerNorm` takes part in nothing; here it is not a parameter, and dropped when a state
    dict is loaded.

    Args:
        hidden_size, num_attention_heads: of the text.
        image_size: width of the image's tokens, 512 in FIBER's layers 6 to 9 and 1024 in its last two.
    Raises:
        TypeError: one of those is no integer.
        ValueError: one is less than 1, or num_attention_heads does not divide hidden_size.
    Source: Dou et al. 2022 (FIBER), equations 1 and 2; FIBER's roberta.py for the names.
    """

    def __init__(self, hidden_size: int = 768, num_attention_heads: int = 12, image_size: int = 512) -> None:
        super().__init__()
        name = "TextToImageFusion"
        check_integers(name, hidden_size=hidden_size, num_attention_heads=num_attention_heads, image_size=image_size)
        check_divides(name, "num_attention_heads", num_attention_heads, "hidden_size", hidden_size)
        self.num_attention_heads = num_attention_heads
        self.crossattention_t2i = nn.ModuleDict(
            {
                "self": nn.ModuleDict(
                    {
                        "query": nn.Linear(hidden_size, hidden_size),
                        "key": nn.Linear(image_size, hidden_size),
                        "value": nn.Linear(image_size, hidden_size),
                    }
                ),
                "output": nn.ModuleDict({"dense": nn.Linear(hidden_size, hidden_size)}),
            }
        )
        self.alpha_t2i = nn.Parameter(torch.zeros(1))
        self.register_load_state_dict_pre_hook(_drop_unused_norm)

    def forward(self, attention_output: Tensor, image: Tensor) -> Tensor:
        """(B, L, hidden_size): attention_output with the image in it.

        Args:
            attention_output (B, L, hidden_size): also where the queries come from.
            image (B, Lk, image_size): from before the paired image block.
        """
        heads, attention = self.num_attention_heads, self.crossattention_t2i["self"]
        q = split_heads(attention["query"](attention_output), heads)  # type: ignore[index]
        k, v = (split_heads(attention[name](image), heads) for name in ("key", "value"))  # type: ignore[index]
        hidden = self.crossattention_t2i["output"]["dense"](merge_heads(attend(q, k, v)))  # type: ignore[index]
        return add_gated(attention_output, hidden, self.alpha_t2i, activation="identity")


class ImageToTextFusion(nn.Module):
    """Image attends to the text: `s + alpha_i2t * proj_i2t(attention(norm_i2t_i(s), text))` in a Swin block.

    s is the window attention's output after its projection. All windows see the same text, so the queries of a sample
    are taken together and the text's keys and values are not repeated per window. Parameters have the names that they
    have in FIBER's WindowAttention.

    Args:
        dim, num_heads: of the image.
        dim_text: of the text.
        qkv_bias: whether the three projections have a bias.
        norm_layer: of the queries; None: none, as in FIBER's fine-grained stage, version 2.
    Raises:
        TypeError: dim, num_heads or dim_text is no integer.
        ValueError: one of them is less than 1, or num_heads does not divide dim.
    Source: Dou et al. 2022 (FIBER), equations 1 and 2; FIBER's swin_transformer.py for the names.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        dim_text: int = 768,
        qkv_bias: bool = True,
        norm_layer: Callable[[int], nn.Module] | None = nn.LayerNorm,
    ) -> None:
        super().__init__()
        check_integers("ImageToTextFusion", dim=dim, num_heads=num_heads, dim_text=dim_text)
        check_divides("ImageToTextFusion", "num_heads", num_heads, "dim", dim)
        self.num_heads = num_heads
        self.qkv_text_i2t = nn.Linear(dim_text, dim * 2, bias=qkv_bias)
        self.qkv_i2t = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj_i2t = nn.Linear(dim, dim)
        self.alpha_i2t = nn.Parameter(torch.zeros(1))
        self.norm_i2t_i = nn.Identity() if norm_layer is None else norm_layer(dim)

    def forward(self, x: Tensor, y: Tensor, y_mask: Tensor | None = None) -> Tensor:
        """x with the text in it, in x's shape.

        Args:
            x (B * windows, N, dim): tokens of the windows, those of a sample one after the other; or (B, L, dim).
            y (B, Lt, dim_text): from before the paired text layer.
            y_mask (B, 1, 1, Lt): added to the scores, FIBER's is -10000 at padding; or bool; or (B, Lt), nonzero at
                tokens.
        Raises:
            ValueError: x's batch is no multiple of y's, or y_mask has another shape.
        """
        if x.dim() != 3 or y.dim() != 3 or x.shape[0] % y.shape[0]:
            raise ValueError(
                f"ImageToTextFusion: x must be (batch * windows, length, dim), y being {tuple(y.shape)}; "
                f"got {tuple(x.shape)}"
            )
        q = self.qkv_i2t(self.norm_i2t_i(x)).reshape(y.shape[0], -1, x.shape[2])
        q, k, v = (split_heads(t, self.num_heads) for t in (q, *self.qkv_text_i2t(y).chunk(2, -1)))
        bias = key_bias("ImageToTextFusion", y_mask, y.shape[0], y.shape[1])
        hidden = self.proj_i2t(merge_heads(attend(q, k, v, key_bias=bias))).view(x.shape)
        return add_gated(x, hidden, self.alpha_i2t, activation="identity")


def _drop_unused_norm(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    for name in ("weight", "bias"):
        state_dict.pop(f"{prefix}crossattention_t2i.output.LayerNorm.{name}", None)
