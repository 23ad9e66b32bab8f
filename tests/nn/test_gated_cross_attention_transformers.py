from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from modules import check_module, randomise
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, GPT2Config, IdeficsConfig, MllamaConfig
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.models.idefics import modeling_idefics as idefics
from transformers.models.mllama import modeling_mllama as mllama

from vlmfast.nn.transformers_cross_attention import (
    GPT2CrossAttention,
    IdeficsGatedCrossAttentionLayer,
    MllamaCrossAttentionDecoderLayer,
)

EPSILON = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8}
DIM, LENGTH = 64, 9


def additive(visible: Tensor) -> Tensor:
    return torch.where(visible, 0.0, torch.finfo(torch.float32).min)


# IDEFICS: three images of four tokens. The second sample has two, and forgets them after the end of its text.
IMAGE_OF = torch.tensor([[0, 1, 1, 1, 2, 2, 3, 3, 3], [0, 0, 1, 2, 2, 2, 0, 0, 0]])
SEES_IMAGE = IMAGE_OF[..., None] == torch.arange(1, 4)
IDEFICS_MASK = additive(SEES_IMAGE.repeat_interleave(4, 2)[:, None])
GATE = SEES_IMAGE.any(2).float()


def idefics_config(**options: Any) -> IdeficsConfig:
    return IdeficsConfig(
        **{
            "vocab_size": 50,
            "hidden_size": DIM,
            "num_attention_heads": 2,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "vision_config": {"embed_dim": 40, "image_size": 8, "patch_size": 4, "num_hidden_layers": 1,
                              "num_attention_heads": 2, "intermediate_size": 48},
            "alpha_initializer": "ones",
            "attn_implementation": "eager",
            **options,
        }
    )  # fmt: skip


@pytest.mark.parametrize("dtype", list(EPSILON))
@pytest.mark.parametrize("alpha_type", ["float", "vector"])
@pytest.mark.parametrize("qk_layer_norms", [False, True])
def test_idefics(qk_layer_norms: bool, alpha_type: str, dtype: torch.dtype) -> None:
    config = idefics_config(qk_layer_norms=qk_layer_norms, alpha_type=alpha_type)
    original = randomise(idefics.IdeficsGatedCrossAttentionLayer(config, layer_idx=0))
    ours = IdeficsGatedCrossAttentionLayer(config, layer_idx=0)
    ours.load_state_dict(original.state_dict())
    given = {"image_attention_mask": IDEFICS_MASK, "cross_attention_gate": GATE}
    check_module(Idefics(ours), Idefics(original), idefics_inputs(), given, given, dtype=dtype, epsilon=EPSILON[dtype])


def test_idefics_gate() -> None:
    """The gate alone, of tokens that see an image."""
    original = randomise(idefics.IdeficsGatedCrossAttentionLayer(idefics_config(), layer_idx=0))
    ours = IdeficsGatedCrossAttentionLayer.from_module(copy.deepcopy(original))
    gate = (torch.arange(LENGTH) % 2).float().expand(2, -1)
    given = {"cross_attention_gate": gate, "image_attention_mask": additive(torch.ones(2, 1, LENGTH, 12).bool())}
    check_module(Idefics(ours), Idefics(original), idefics_inputs(), given, given)


def test_idefics_by_intervals() -> None:
    """No mask anywhere: the intervals, and the gate that follows from them."""
    original = randomise(idefics.IdeficsGatedCrossAttentionLayer(idefics_config(), layer_idx=0))
    ours = IdeficsGatedCrossAttentionLayer.from_module(copy.deepcopy(original))
    given = {"media_lo": IMAGE_OF, "media_hi": IMAGE_OF, "tokens_per_media": 4}
    reference = {"image_attention_mask": IDEFICS_MASK, "cross_attention_gate": GATE}
    check_module(Idefics(ours), Idefics(original), idefics_inputs(), given, reference)


class Idefics(nn.Module):
    """The layer as a function of its two inputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, images: Tensor, **given: Any) -> Tensor:
        given = {"cross_attention_gate": None, **given}
        return self.layer(x, image_hidden_states=images, **given)


def idefics_inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, LENGTH, DIM), torch.randn(2, 12, 40)


@torch.no_grad()
def test_idefics_keys_are_computed_once() -> None:
    """The original has no cache here. The first step knows one image, a later one brings the others."""
    ours = randomise(IdeficsGatedCrossAttentionLayer(idefics_config(qk_layer_norms=True), layer_idx=0))
    x, images = idefics_inputs()
    whole = ours(x, None, images, IDEFICS_MASK)
    calls, cache = [], DynamicCache()
    ours.cross_attn.k_proj.register_forward_hook(lambda *_: calls.append(1))
    for i in range(LENGTH):
        new, known = {0: (images[:, :4], 4), 3: (images[:, 4:], 12)}.get(i, (None, 4 if i < 3 else 12))
        step = ours(x[:, i : i + 1], None, new, IDEFICS_MASK[:, :, i : i + 1, :known], past_key_values=cache)
        torch.testing.assert_close(step, whole[:, i : i + 1], rtol=1e-5, atol=1e-6)
    assert len(calls) == 2
    with pytest.raises(ValueError, match=r"^IdeficsGatedCrossAttentionLayer: image_hidden_states must be a tensor wh"):
        ours(x, past_key_values=DynamicCache())


def idefics_model(**options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = idefics.IdeficsForVisionText2Text(idefics_config(**options))
    for layer in model.model.gated_cross_attn_layers:
        randomise(layer)
    ids = torch.randint(3, 50, (2, LENGTH))
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids).index_put_((torch.tensor(1), torch.tensor([7, 8])), torch.tensor(0)),
        "pixel_values": torch.randn(2, 3, 3, 8, 8),
        "image_attention_mask": SEES_IMAGE.long(),
        "labels": ids,
    }
    return model, batch


def loss_and_gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(
            value, b[name], rtol=1e-4, atol=1e-6 + 1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_idefics_model(implementation: str, checkpointing: bool) -> None:
    """Loss and gradients of a padded batch, the layers swapped in place; also under gradient checkpointing."""
    model, batch = idefics_model(attn_implementation=implementation)
    if checkpointing:
        model.gradient_checkpointing_enable()
    expected = loss_and_gradients(model.train(), batch)
    layers = model.model.gated_cross_attn_layers
    model.model.gated_cross_attn_layers = nn.ModuleList(map(IdeficsGatedCrossAttentionLayer.from_module, layers))
    calls = []
    model.model.gated_cross_attn_layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    assert_same(loss_and_gradients(model, batch), expected)
    assert len(calls) == 1 + checkpointing


# Mllama: three images of up to two tiles of three tokens; groups of images that follow one another are seen together.
TILES = torch.tensor([[2, 1, 2], [1, 2, 0]])
GROUP_LO = torch.tensor([[0, 1, 1, 1, 1, 3, 3, 3, 3], [0, 0, 0, 1, 1, 2, 2, 2, 2]])
GROUP_HI = torch.tensor([[0, 1, 2, 2, 2, 3, 3, 3, 3], [0, 0, 0, 1, 1, 2, 2, 2, 2]])


def mllama_mask() -> Tensor:
    """(B, L, images, tiles), as transformers' processor makes it."""
    image, tile = torch.arange(1, 4), torch.arange(2)
    sees = (GROUP_LO[..., None] <= image) & (image <= GROUP_HI[..., None])
    return (sees[..., None] & (tile < TILES[:, None, :, None])).long()


MLLAMA_MASK, FULL_ROWS = mllama._prepare_cross_attention_mask(mllama_mask(), 3, torch.float32)


def mllama_config() -> Any:
    config = MllamaConfig(
        text_config={
            "vocab_size": 50,
            "hidden_size": DIM,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "cross_attention_layers": [1],
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        attn_implementation="eager",
    )
    config.text_config._attn_implementation = "eager"
    return config.text_config


class Mllama(nn.Module):
    """The layer as a function of its two inputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, images: Tensor, **given: Any) -> Tensor:
        given = {"cross_attention_mask": None, "full_text_row_masked_out_mask": None, **given}
        return self.layer(x, images, attention_mask=None, **given)


def mllama_original() -> nn.Module:
    return randomise(mllama.MllamaCrossAttentionDecoderLayer(mllama_config(), layer_idx=1))


def mllama_inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, LENGTH, DIM), torch.randn(2, 18, DIM)


MASKED = {"cross_attention_mask": MLLAMA_MASK, "full_text_row_masked_out_mask": FULL_ROWS}


@pytest.mark.parametrize("dtype", list(EPSILON))
def test_mllama(dtype: torch.dtype) -> None:
    """Grouped-query attention, images with missing tiles, tokens before the first image."""
    original = mllama_original()
    ours = MllamaCrossAttentionDecoderLayer(mllama_config(), layer_idx=1, empty="all")
    ours.load_state_dict(original.state_dict())
    check_module(Mllama(ours), Mllama(original), mllama_inputs(), MASKED, MASKED, dtype=dtype, epsilon=EPSILON[dtype])


def test_mllama_by_intervals() -> None:
    original = mllama_original()
    ours = MllamaCrossAttentionDecoderLayer.from_module(copy.deepcopy(original), empty="all")
    given = {"media_lo": GROUP_LO, "media_hi": GROUP_HI, "tokens_per_media": 6, "media_len": TILES * 3}
    given["full_text_row_masked_out_mask"] = FULL_ROWS
    check_module(Mllama(ours), Mllama(original), mllama_inputs(), given, MASKED)


def test_mllama_without_masks() -> None:
    original = mllama_original()
    ours = MllamaCrossAttentionDecoderLayer.from_module(copy.deepcopy(original))
    check_module(Mllama(ours), Mllama(original), mllama_inputs())


@torch.no_grad()
def test_mllama_before_the_first_image() -> None:
    """transformers' tokens before the first image see all images and padding tiles; ours are left as they are."""
    original = mllama_original()
    x, images = mllama_inputs()
    expected = Mllama(original)(x, images, **MASKED)
    zero, everything = (
        Mllama(MllamaCrossAttentionDecoderLayer.from_module(original, empty=empty))(x, images, **MASKED)
        for empty in ("zero", "all")
    )
    before = GROUP_HI == 0
    assert torch.equal(zero[before], x[before])
    torch.testing.assert_close(zero[~before], expected[~before], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(everything, expected, rtol=1e-5, atol=1e-5)
    assert (expected[before] - x[before]).abs().max() > 0.1
    images[1, 4] += 1  # the second tile of an image that has one
    moved = (Mllama(original)(x, images, **MASKED) != expected).any(-1)
    ours = MllamaCrossAttentionDecoderLayer.from_module(original, empty="all")
    assert torch.equal((Mllama(ours)(x, images, **MASKED) != everything).any(-1), moved)
    assert torch.equal(moved, before & torch.tensor([[False], [True]]))


def mllama_model() -> nn.Module:
    torch.manual_seed(0)
    model = mllama.MllamaForCausalLM(mllama_config())
    randomise(model.model.layers[1])
    return model


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_mllama_model(implementation: str) -> None:
    """A padded batch through the language model; then token by token over transformers' cache."""
    model = mllama_model()
    model.set_attn_implementation(implementation)
    ids = torch.randint(3, 50, (2, LENGTH))
    attention_mask = torch.ones_like(ids)
    attention_mask[1, 7:] = 0
    given = {
        "input_ids": ids,
        "attention_mask": attention_mask,
        "cross_attention_states": torch.randn(2 * 3 * 2, 3, DIM),
        "cross_attention_mask": MLLAMA_MASK,
        "full_text_row_masked_out_mask": FULL_ROWS,
        "labels": ids,
        "use_cache": False,
    }
    given["cross_attention_states"] = given["cross_attention_states"].reshape(2, 18, DIM)
    expected = loss_and_gradients(model, given)
    model.model.layers[1] = MllamaCrossAttentionDecoderLayer.from_module(model.model.layers[1], empty="all")
    assert_same(loss_and_gradients(model, given), expected)
    calls = []
    model.model.layers[1].cross_attn.k_proj.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        given = {**given, "labels": None, "attention_mask": None}
        whole = model(**given).logits
        cache, steps = DynamicCache(config=model.config), []
        for i in range(LENGTH):
            now = {
                "input_ids": ids[:, i : i + 1],
                "cross_attention_states": given["cross_attention_states"] if i == 0 else None,
                "cross_attention_mask": MLLAMA_MASK[:, :, i : i + 1],
                "full_text_row_masked_out_mask": FULL_ROWS[:, :, i : i + 1],
            }
            steps.append(model(**now, past_key_values=cache, use_cache=True).logits)
    assert len(calls) == 2
    torch.testing.assert_close(torch.cat(steps[4:], 1), whole[:, 4:], rtol=1e-4, atol=1e-5)


def gpt2_config(**options: Any) -> GPT2Config:
    sizes = {"vocab_size": 50, "n_positions": 32, "n_embd": DIM, "n_layer": 2, "n_head": 2, "attn_pdrop": 0.0}
    sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "add_cross_attention": True, "attn_implementation": "eager"}
    return GPT2Config(**{**sizes, **options})


class GPT2(nn.Module):
    """The attention as a function of its two inputs."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, encoder: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.attention(x, encoder_hidden_states=encoder, encoder_attention_mask=mask)[0]


KEYS = torch.arange(7) < torch.tensor([[7], [4]])


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.bfloat16),
        ({"scale_attn_by_inverse_layer_idx": True}, torch.float32),
        ({"scale_attn_weights": False}, torch.float32),
        ({"reorder_and_upcast_attn": True}, torch.float32),
    ],
    ids=str,
)
def test_gpt2(options: dict[str, Any], dtype: torch.dtype) -> None:
    config = gpt2_config(**options)
    original = randomise(gpt2.GPT2Attention(config, is_cross_attention=True, layer_idx=1))
    ours = GPT2CrossAttention(config, layer_idx=1)
    ours.load_state_dict(original.state_dict())
    inputs = torch.randn(2, LENGTH, DIM), torch.randn(2, 7, DIM)
    given = {"mask": additive(KEYS[:, None, None])}
    check_module(GPT2(ours), GPT2(original), inputs, given, given, dtype=dtype, epsilon=EPSILON[dtype])


@torch.no_grad()
def test_gpt2_masks_of_every_form() -> None:
    ours = GPT2(randomise(GPT2CrossAttention(gpt2_config(), layer_idx=0)))
    x, encoder = torch.randn(2, LENGTH, DIM), torch.randn(2, 7, DIM)
    expected = torch.cat([ours(x[i : i + 1], encoder[i : i + 1, : KEYS[i].sum()]) for i in range(2)])
    rows = KEYS[:, None, None].expand(-1, 1, LENGTH, -1)
    for mask in (KEYS, KEYS.long(), KEYS.float(), rows, additive(rows), rows[:, :, :1], additive(rows).bfloat16()):
        torch.testing.assert_close(ours(x, encoder, mask), expected, rtol=1e-5, atol=1e-5)
    nothing = torch.zeros(2, 7)
    assert torch.equal(ours(x, encoder, nothing), ours.attention.c_proj.bias.expand(2, LENGTH, -1))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_gpt2_model(implementation: str) -> None:
    """Loss, gradients and cached decoding, the images' padding masked as transformers masks it."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(gpt2_config(attn_implementation=implementation))
    ids = torch.randint(3, 50, (2, LENGTH))
    attention_mask = torch.ones_like(ids)
    attention_mask[1, 7:] = 0
    given = {"input_ids": ids, "attention_mask": attention_mask, "labels": ids}
    given |= {"encoder_hidden_states": torch.randn(2, 7, DIM), "encoder_attention_mask": KEYS.long()}
    expected = loss_and_gradients(model, given)
    for layer in model.transformer.h:
        layer.crossattention = GPT2CrossAttention.from_module(layer.crossattention)
    assert_same(loss_and_gradients(model, given), expected)
    calls = []
    model.transformer.h[0].crossattention.c_attn.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        given = {**given, "labels": None, "attention_mask": None}
        whole = model(**given).logits
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        steps = [model(**{**given, "input_ids": ids[:, i, None]}, past_key_values=cache).logits for i in range(LENGTH)]
    assert len(calls) == 2
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)


def cases() -> dict[str, tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]]:
    return {
        "idefics": (
            Idefics(randomise(IdeficsGatedCrossAttentionLayer(idefics_config(qk_layer_norms=True), layer_idx=0))),
            idefics_inputs(),
            {"image_attention_mask": IDEFICS_MASK, "cross_attention_gate": GATE},
        ),
        "mllama": (
            Mllama(randomise(MllamaCrossAttentionDecoderLayer(mllama_config(), layer_idx=1))),
            mllama_inputs(),
            MASKED,
        ),
        "gpt2": (
            GPT2(randomise(GPT2CrossAttention(gpt2_config(), layer_idx=0))),
            (torch.randn(2, LENGTH, DIM), torch.randn(2, 7, DIM)),
            {"mask": additive(KEYS[:, None, None].expand(-1, 1, LENGTH, -1))},
        ),
    }


@pytest.mark.parametrize("name", ["idefics", "mllama", "gpt2"])
def test_compiles_as_one_graph(name: str) -> None:
    module, inputs, given = cases()[name]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = []
    for function in (module, compiled):
        module.zero_grad()
        out = function(*inputs, **given)
        out.pow(2).sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in module.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["idefics", "mllama"])
def test_gate_zero_is_the_input_and_trains_the_gates_alone(name: str) -> None:
    module, inputs, given = cases()[name]
    with torch.no_grad():
        for parameter_name, parameter in module.named_parameters():
            if "alpha" in parameter_name or parameter_name.endswith("_gate"):
                parameter.zero_()
    out = module(*inputs, **given)
    assert torch.equal(out, inputs[0])
    out.backward(torch.randn_like(out))
    moved = {n.split(".")[-1] for n, p in module.named_parameters() if p.grad.any()}
    gates = {"idefics": {"alpha_cross_attn", "alpha_dense"}, "mllama": {"cross_attn_attn_gate", "cross_attn_mlp_gate"}}
    assert moved == gates[name]


@pytest.mark.parametrize("name", ["idefics", "mllama", "gpt2"])
def test_from_module_shares_parameters_and_refuses_others(name: str) -> None:
    module, _, _ = cases()[name]
    ours = next(module.children())
    base = type(ours).__mro__[1]
    with torch.device("meta"):
        original = {
            "idefics": lambda: base(idefics_config(), 0),
            "mllama": lambda: base(mllama_config(), 1),
            "gpt2": lambda: base(gpt2_config(), is_cross_attention=True, layer_idx=0),
        }[name]().eval()
    replaced = type(ours).from_module(original)
    assert type(original) is base
    assert isinstance(replaced, type(ours))
    assert [(n, id(p)) for n, p in replaced.named_parameters()] == [(n, id(p)) for n, p in original.named_parameters()]
    assert not replaced.training
    with pytest.raises(TypeError, match=f"^{type(ours).__name__}: the original must be transformers' {base.__name__};"):
        type(ours).from_module(nn.Linear(2, 2))


def test_bad_input_is_named() -> None:
    modules = cases()

    def attempt(name: str, message: str, **changes: Any) -> None:
        module, inputs, given = modules[name]
        with pytest.raises(ValueError, match=message):
            module(*inputs, **{**given, **changes})

    gaps = SEES_IMAGE | (torch.arange(3) == 0)  # the first image and the last
    attempt("idefics", "^Idefics.*: every query must see an interval of the keys; got a mask with gaps",
            image_attention_mask=additive(gaps.repeat_interleave(4, 2)[:, None]))  # fmt: skip
    attempt("idefics", r"^Idefics.*: the mask must be \(2, 1, queries, 12\); got \(2, 1, 9, 11\)",
            image_attention_mask=IDEFICS_MASK[..., 1:])  # fmt: skip
    attempt("idefics", "^Idefics.*: media_lo, media_hi, tokens_per_media and media_len must be None", media_lo=IMAGE_OF)
    rows = torch.ones(2, 1, LENGTH, 7, dtype=torch.bool)
    rows[0, 0, 3, 2] = False
    attempt("gpt2", "^GPT2CrossAttention: the mask must be the same for all queries", mask=rows)
    attempt("gpt2", r"^GPT2CrossAttention: the mask must be \(2, 7\) or \(2, 1, 1, 7\); got \(2, 6\)", mask=KEYS[:, 1:])
    with pytest.raises(ValueError, match=r"encoder_hidden_states must be a tensor; got None"):
        GPT2CrossAttention(gpt2_config(), layer_idx=0)(torch.randn(2, 3, DIM))
    with pytest.raises(ValueError, match=r"^GPT2CrossAttention: is_cross_attention must be True; got False"):
        GPT2CrossAttention(gpt2_config(), False)
    with pytest.raises(ValueError, match=r"^GPT2CrossAttention: the original must be a cross-attention"):
        GPT2CrossAttention.from_module(gpt2.GPT2Attention(gpt2_config(), layer_idx=0))
    with pytest.raises(ValueError, match=r"empty must be 'zero' or 'all'; got 'none'"):
        MllamaCrossAttentionDecoderLayer(mllama_config(), 1, empty="none")
    dropout = GPT2CrossAttention(gpt2_config(attn_pdrop=0.1), layer_idx=0)
    x = torch.randn(2, 3, DIM)
    with pytest.raises(ValueError, match=r"attention dropout is not supported in training, set it to 0; got 0\.1"):
        dropout(x, encoder_hidden_states=x)
    assert dropout.eval()(x, encoder_hidden_states=x)[0].isfinite().all()
