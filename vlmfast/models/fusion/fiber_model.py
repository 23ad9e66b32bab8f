"""What FIBER's two stages have in common: the fused towers, how they are made, and how fast they learn."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from typing_extensions import Self

from vlmfast.models.fusion.fiber_config import small_roberta, small_swin
from vlmfast.models.fusion.fiber_parts import Backbone, loaded_towers
from vlmfast.models.masked_words import groups_of_two_rates
from vlmfast.models.roberta_text import ReadsRoBERTa


class FusedTowers(ReadsRoBERTa):
    """A Swin and a RoBERTa that are fused. A model adds what stands on them, and `settings`."""

    strategy = "fusion"
    main_input_name = "pixel_values"
    training_defaults: ClassVar[dict[str, Any]] = {
        "learning_rate": 1e-4,
        "weight_decay": 0.01,
        "adam_beta2": 0.98,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
    }
    accepts_loss_kwargs = False
    _supports_sdpa = True
    fast: ClassVar[tuple[str, ...]] = ("t2i", "i2t")
    """What is in the names of parameters that learn at `lr_factor` times the rate."""
    towers: Backbone

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # else transformers passes over modules without parameters of their own

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Of what is in no tower: normal. The towers' classes draw their own."""
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        for name in ("alpha_t2i", "alpha_i2t"):
            if hasattr(module, name):
                init.zeros_(getattr(module, name))

    @classmethod
    def settings(cls, options: Any, text: Any) -> dict[str, Any]:
        """Fields of the config that the options set for a new model, beside the towers and what fuses them.

        Args:
            text: the config of its RoBERTa.
        """
        raise NotImplementedError(f"{cls.__name__}.settings")

    @classmethod
    def create(cls, options: Any, tokenizer: Any, **overrides: Any) -> Self:
        """A new model from the options, its towers new or pretrained ones."""
        vision, text, normalised = loaded_towers(options)
        vision_config = small_swin(options) if vision is None else vision.config
        text_config = small_roberta(options, tokenizer) if text is None else text.config
        # 0.02 is meant for 768; of a small model the gates would not open, as what they let in is too faint to matter.
        begin = {} if text is not None else {"initializer_range": options.width**-0.5}
        settings = {
            "num_fused_layers": options.fused_layers,
            **begin,
            **cls.settings(options, text_config),
            **normalised,
            **overrides,
        }
        model: Any = cls(cls.config_class(vision_config, text_config, **settings))  # type: ignore[call-arg]
        model.towers.copy_from(vision, text)
        made: Self = model.eval()
        return made

    @property
    def text_tower(self) -> Any:
        return self.towers.text_model

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.text_tower.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_tower.set_input_embeddings(value)

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """What fuses at `lr_factor` times the rate; gains, biases and scalars do not decay."""
        return groups_of_two_rates(
            self.named_parameters(),  # type: ignore[attr-defined]
            lambda name: any(part in name for part in self.fast),
            lr=lr,
            factor=self.config.lr_factor,
            weight_decay=weight_decay,
        )

    def metrics(self) -> dict[str, float]:
        """The mean size of the gates of either side that is there."""
        found = {}
        for name, side in (("t2i", self.towers.t2i), ("i2t", self.towers.i2t)):
            if side is not None:
                gates = [getattr(fusion, f"alpha_{name}").detach().abs() for fusion in side]
                found[f"alpha_{name}"] = torch.cat(gates).mean().item()
        return found
