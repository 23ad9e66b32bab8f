from __future__ import annotations

import copy

import pytest
import torch
from modules import check_module, randomise
from torch import nn

from vlmfast.nn import PerceiverResampler

flamingo_pytorch = pytest.importorskip(
    "flamingo_pytorch.flamingo_pytorch", reason="needs pip install flamingo-pytorch: the module that is replaced"
)
open_flamingo = pytest.importorskip(
    "open_flamingo.src.helpers",
    reason="needs pip install --no-deps open-flamingo: the module that is replaced, which pins an old torch",
)

SIZES = {"dim": 48, "depth": 2, "dim_head": 32, "heads": 2, "num_latents": 6, "ff_mult": 2}
ORIGINALS = {
    "open_flamingo": lambda: open_flamingo.PerceiverResampler(**SIZES),
    "open_flamingo with embeddings": lambda: open_flamingo.PerceiverResampler(
        **SIZES, max_num_media=4, max_num_frames=3
    ),
    "flamingo_pytorch": lambda: flamingo_pytorch.PerceiverResampler(**SIZES),
}


@pytest.fixture(params=list(ORIGINALS))
def original(request: pytest.FixtureRequest) -> nn.Module:
    return randomise(ORIGINALS[request.param]())


def visual(original: nn.Module, media: int = 3) -> torch.Tensor:
    frames = () if hasattr(original, "media_pos_emb") else (2,)
    return torch.randn(2, media, *frames, 7, 48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_original(original: nn.Module, dtype: torch.dtype) -> None:
    ours = PerceiverResampler.from_module(copy.deepcopy(original))
    epsilon = 2e-6 if dtype == torch.float32 else 2.0**-8
    check_module(ours, original, (visual(original),), dtype=dtype, epsilon=epsilon)


def test_state_dict_is_the_original_s(original: nn.Module) -> None:
    numbers = {"max_num_media": "media_time_embs", "max_num_frames": "frame_embs", "num_media_embeds": "media_pos_emb"}
    tables = {argument: getattr(original, name, None) for argument, name in numbers.items()}
    ours = PerceiverResampler(**SIZES, **{a: None if table is None else len(table) for a, table in tables.items()})
    ours.load_state_dict(original.state_dict())
    assert set(ours.state_dict()) == set(original.state_dict())
    x = visual(original)
    torch.testing.assert_close(ours(x), original(x), rtol=1e-5, atol=1e-5)


def test_one_frame_and_one_medium_need_no_dimension() -> None:
    ours = PerceiverResampler(**SIZES)
    x = torch.randn(2, 7, 48)
    out = ours(x)
    assert out.shape == (2, 1, 6, 48)
    for other in (x[:, None], x[:, None, None]):
        assert torch.equal(ours(other), out)


def test_media_do_not_see_each_other() -> None:
    ours = PerceiverResampler(**SIZES)
    x = torch.randn(2, 3, 7, 48)
    other = x.clone()
    other[:, 1] += 1
    changed = (ours(x) != ours(other)).any(-1).all(-1)
    assert changed.tolist() == [[False, True, False]] * 2


def test_compiles_as_one_graph() -> None:
    ours = PerceiverResampler(**SIZES, max_num_frames=3)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for media in (3, 2):
        x = torch.randn(2, media, 2, 7, 48)
        torch.testing.assert_close(compiled(x), ours(x), rtol=1e-5, atol=1e-5)


def test_bad_input_is_named() -> None:
    ours = PerceiverResampler(**SIZES, max_num_media=2, max_num_frames=3)
    for shape, message in (
        ((7, 48), r"x must be \(batch, media, frames, tokens, dim\), without frames, or without both; got \(7, 48\)"),
        ((2, 3, 1, 7, 48), "x must have at most 2 media, embedded ones; got 3"),
        ((2, 2, 4, 7, 48), "x must have at most 3 frames, embedded ones; got 4"),
    ):
        with pytest.raises(ValueError, match=f"^PerceiverResampler: {message}"):
            ours(torch.randn(shape))
