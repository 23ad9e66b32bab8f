from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from modules import check_module, randomise
from torch import Tensor, nn

from vlmfast.nn import GatedCrossAttentionBlock, MaskedCrossAttention, MediaCache

flamingo_pytorch = pytest.importorskip(
    "flamingo_pytorch.flamingo_pytorch", reason="needs pip install flamingo-pytorch: the module that is replaced"
)
open_flamingo = pytest.importorskip(
    "open_flamingo.src.helpers",
    reason="needs pip install --no-deps open-flamingo: the module that is replaced, which pins an old torch",
)

DIM, VISUAL, HEADS, HEAD_DIM, TOKENS = 48, 40, 2, 32, 5
LOCATIONS = torch.zeros(3, 14, dtype=torch.bool)
for sample, places in enumerate(([0, 5, 9], [3, 4], [])):
    LOCATIONS[sample, places] = True
"""Three images, one of them before any text; two, one after the other, then a column of padding; none."""


def original(library: str, immediate: bool = True) -> nn.Module:
    sizes = {"dim": DIM, "dim_head": HEAD_DIM, "heads": HEADS, "ff_mult": 2, "only_attend_immediate_media": immediate}
    if library == "open_flamingo":
        return randomise(open_flamingo.GatedCrossAttentionBlock(dim_visual=VISUAL, **sizes))
    return randomise(flamingo_pytorch.GatedCrossAttentionBlock(**sizes))


def inputs(block: nn.Module, batch: int = 3, length: int = 14, media: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, length, DIM), torch.randn(batch, media, TOKENS, block.attn.to_kv.in_features)


@pytest.fixture(params=["open_flamingo", "flamingo_pytorch"])
def library(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_original(library: str, dtype: torch.dtype) -> None:
    """Samples with three images, with two of three and with none."""
    reference = original(library)
    given = {"media_locations": LOCATIONS}
    epsilon = 2e-6 if dtype == torch.float32 else 2.0**-8
    ours = GatedCrossAttentionBlock.from_module(copy.deepcopy(reference))
    check_module(ours, reference, inputs(reference), given, given, dtype=dtype, epsilon=epsilon)


def test_equals_the_original_without_locations(library: str) -> None:
    reference = original(library)
    given = {"use_cached_media": True} if library == "open_flamingo" else {}  # it needs locations otherwise
    ours = GatedCrossAttentionBlock.from_module(copy.deepcopy(reference))
    check_module(ours, reference, inputs(reference), {}, given)


@pytest.mark.parametrize("before_media", ["zero", "uniform"])
def test_equals_the_original_with_all_media_before(library: str, before_media: str) -> None:
    """The originals give the tokens before the first image the mean of all images; so does before_media='uniform'."""
    reference = original(library, immediate=False)
    ours = GatedCrossAttentionBlock.from_module(copy.deepcopy(reference), before_media=before_media)
    x, media = inputs(reference)
    given = {"media_locations": LOCATIONS}
    if before_media == "uniform":
        check_module(ours, reference, (x, media), given, given)
        return
    # "zero" departs there and nowhere else.
    before = LOCATIONS.cumsum(1) == 0
    out, expected = ours.attn(x, media, LOCATIONS), reference.attn(x, media, LOCATIONS)
    torch.testing.assert_close(out[~before], expected[~before], rtol=1e-5, atol=1e-5)
    assert not out[before].any()
    assert expected[before].abs().amin(-1).max() > 0
    first = slice(0, 1), slice(0, 14)  # a sample that starts with an image
    check_module(ours, reference, (x[first], media[:1]), *[{"media_locations": LOCATIONS[:1]}] * 2)


@pytest.mark.parametrize("immediate", [True, False])
def test_equals_open_flamingo_with_cached_media(immediate: bool) -> None:
    reference = original("open_flamingo", immediate)
    x, media = inputs(reference, length=2)
    given = {"media_locations": LOCATIONS[:2], "use_cached_media": True}
    ours = GatedCrossAttentionBlock.from_module(copy.deepcopy(reference))
    check_module(ours, reference, (x[:2], media[:2]), given, given)


def test_state_dict_is_the_original_s(library: str) -> None:
    reference = original(library)
    sizes = {"dim": DIM, "dim_head": HEAD_DIM, "heads": HEADS, "ff_mult": 2}
    ours = GatedCrossAttentionBlock(**sizes, **({"dim_visual": VISUAL} if library == "open_flamingo" else {}))
    ours.load_state_dict(reference.state_dict())
    assert list(ours.state_dict()) == list(reference.state_dict())
    given = (*inputs(reference), LOCATIONS)
    torch.testing.assert_close(ours(*given), reference(*given), rtol=1e-5, atol=1e-5)


def test_from_module_shares_parameters(library: str) -> None:
    reference = original(library).eval()
    reference.attn.to_q.weight.requires_grad_(False)
    ours = GatedCrossAttentionBlock.from_module(reference)
    assert [(n, id(p)) for n, p in ours.named_parameters()] == [(n, id(p)) for n, p in reference.named_parameters()]
    assert not ours.training
    assert not ours.attn.to_q.weight.requires_grad
    reference.attn.to_out = nn.Linear(64, 8, bias=False)
    with pytest.raises(ValueError, match=r"^MaskedCrossAttention: the original's to_out.weight must be \(48, 64\)"):
        MaskedCrossAttention.from_module(reference.attn)
    reference.attn.to_out = nn.Linear(64, 48)
    with pytest.raises(ValueError, match=r"^MaskedCrossAttention: the original must have the parameters"):
        MaskedCrossAttention.from_module(reference.attn)


def block(**options: Any) -> GatedCrossAttentionBlock:
    sizes = {"dim": DIM, "dim_visual": VISUAL, "dim_head": HEAD_DIM, "heads": HEADS, "ff_mult": 2, **options}
    return GatedCrossAttentionBlock(**sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gate_zero_is_the_input_and_trains_the_gates_alone(dtype: torch.dtype) -> None:
    ours = block().to(dtype)
    x, media = (t.to(dtype).requires_grad_() for t in inputs(ours))
    out = ours(x, media, LOCATIONS)
    assert torch.equal(out, x)
    weights = torch.randn_like(out)
    out.backward(weights)
    assert torch.equal(x.grad, weights)
    assert not media.grad.any()
    moved = {name for name, parameter in ours.named_parameters() if parameter.grad.any()}
    assert moved == {"attn_gate", "ff_gate"}


def test_images_that_no_token_sees_change_nothing() -> None:
    ours = randomise(block())
    x, media = inputs(ours)
    media.requires_grad_()
    out = ours(x, media, LOCATIONS)
    out.sum().backward()
    assert media.grad[0].any(-1).all()
    assert not media.grad[1, 2].any()
    assert not media.grad[2].any()
    with torch.no_grad():
        other = media.clone()
        other[0, 1] += 1
        changed = (ours(x, other, LOCATIONS) != out).any(-1)
    expected = torch.zeros_like(changed)
    expected[0, 5:9] = True
    assert torch.equal(changed, expected)


def decode(ours: nn.Module, x: Tensor, media: Tensor, locations: Tensor, prompt: int) -> Tensor:
    """The prompt at once, then token by token with the images' keys and values cached."""
    cache = MediaCache()
    steps = [ours(x[:, :prompt], media, locations[:, :prompt], cache=cache)]
    for i in range(prompt, x.shape[1]):
        steps.append(ours(x[:, i : i + 1], None, locations[:, i : i + 1], cache=cache))
    return torch.cat(steps, 1)


@pytest.mark.parametrize("immediate", [True, False])
@pytest.mark.parametrize("prompt", [1, 6])
@torch.no_grad()
def test_cached_decoding_equals_the_whole_sequence(immediate: bool, prompt: int) -> None:
    """Samples come to their images at different steps, which the originals' decision for the whole batch gets wrong."""
    ours = randomise(block(only_attend_immediate_media=immediate))
    x, media = inputs(ours)
    calls = []
    ours.attn.to_kv.register_forward_hook(lambda *_: calls.append(1))
    whole = ours(x, media, LOCATIONS)
    torch.testing.assert_close(decode(ours, x, media, LOCATIONS, prompt), whole, rtol=1e-5, atol=1e-6)
    assert len(calls) == 2  # the whole sequence's, and one for all steps


@torch.no_grad()
def test_the_originals_cache_is_wrong_for_the_batch() -> None:
    """What per-sample state repairs: one sample's image token sends the others back to the start."""
    reference = original("open_flamingo")
    ours = GatedCrossAttentionBlock.from_module(reference)
    x, media = inputs(ours)
    whole = reference(x, media, LOCATIONS)
    step = 9  # the first sample meets its third image, the second has met both of its own
    # open_flamingo's model takes the cached media only where no sample has an image token in this step.
    theirs = reference(x[:, step : step + 1], media, LOCATIONS[:, step : step + 1])
    assert (theirs[1] - whole[1, step]).abs().max() > 0.01
    right = decode(ours, x, media, LOCATIONS, 5)[:, step]
    torch.testing.assert_close(right, whole[:, step], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_media_that_come_while_decoding() -> None:
    """Each sample's new images come after its own, whatever the number of the others'."""
    ours = randomise(block())
    x, media = inputs(ours)
    locations = LOCATIONS.clone()
    locations[2, 12] = True  # at steps 0 to 8 the samples have 2, 2 and 0 images; then one more, none and one
    media[2, 0] = media[0, 2]
    whole = ours(x, media, locations)
    cache = MediaCache()
    steps = [ours(x[:, :9], media[:, :2], locations[:, :9], cache=cache)]
    new = media[:, 2:].clone()
    new[2] = media[2, :1]
    steps.append(ours(x[:, 9:10], new, locations[:, 9:10], cache=cache))
    steps.append(ours(x[:, 10:], None, locations[:, 10:], cache=cache))
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"^MediaCache: media must have 5 tokens, as before; got 4"):
        ours(x[:, :1], media[:, :, :4], locations[:, :1], cache=cache)


@torch.no_grad()
def test_media_that_come_without_locations() -> None:
    ours = randomise(block())
    x, media = inputs(ours)
    cache = MediaCache()
    ours(x, media[:, :2], cache=cache)
    torch.testing.assert_close(ours(x, media[:, 2:], cache=cache), ours(x, media), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_beams_are_reordered() -> None:
    ours = randomise(block())
    x, media = inputs(ours)
    cache, beams = MediaCache(), torch.tensor([1, 1, 0, 2])
    ours(x[:, :6], media, LOCATIONS[:, :6], cache=cache)
    cache.reorder(beams)
    out = ours(x[beams, 6:], None, LOCATIONS[beams, 6:], cache=cache)
    torch.testing.assert_close(out, ours(x, media, LOCATIONS)[beams, 6:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("immediate", [True, False])
def test_compiles_as_one_graph(immediate: bool) -> None:
    ours = randomise(block(only_attend_immediate_media=immediate))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (14, 11):
        x, media = inputs(ours, length=length)
        found = []
        for function in (ours, compiled):
            ours.zero_grad()
            out = function(x, media, LOCATIONS[:, :length])
            out.pow(2).sum().backward()
            found.append([out.detach(), *(p.grad.clone() for p in ours.parameters())])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_train_and_eval_and_autocast() -> None:
    ours = randomise(block())
    x, media = inputs(ours)
    out = ours.train()(x, media, LOCATIONS)
    assert torch.equal(ours.eval()(x, media, LOCATIONS), out)
    with torch.autocast("cpu", torch.bfloat16):
        half = ours(x, media, LOCATIONS)
    assert half.dtype == torch.float32  # the stream stays what it was
    torch.testing.assert_close(half, out, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(3, DIM)}, r"x must be \(batch, length, dim\); got \(3, 48\)"),
        ({"media": torch.randn(3, 5, VISUAL)}, r"media must be \(batch, media, tokens, dim\) with x's batch of 3"),
        ({"media": torch.randn(2, 3, 5, VISUAL)}, r"media must be .* batch of 3; got \(2, 3, 5, 40\)"),
        ({"media": None}, "media must be a tensor where no cache holds them; got None"),
        ({"media": None, "cache": MediaCache()}, "media must be a tensor where no cache holds them; got None"),
        ({"media_locations": LOCATIONS[:, 1:]}, r"media_locations must be \(3, 14\), one per token; got \(3, 13\)"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    ours = block()
    x, media = inputs(ours)
    with pytest.raises(ValueError, match=f"^MaskedCrossAttention: {message}"):
        ours(**{"x": x, "media": media, "media_locations": LOCATIONS, **change})


def test_more_tokens_of_media_than_media_raise() -> None:
    """The originals give such a token the mean of all images."""
    ours = block()
    x, media = inputs(ours, media=2)
    with pytest.raises(ValueError, match=r"^media_index: num_media must be at least .* got 2 for sample 0 with 3"):
        ours(x, media, LOCATIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"before_media": "mean"}, "before_media must be 'zero' or 'uniform'; got 'mean'"),
        ({"before_media": "uniform"}, "before_media='uniform' needs only_attend_immediate_media=False"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^MaskedCrossAttention: {message}"):
        block(**options)
