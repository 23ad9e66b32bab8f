from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmfast.ops import media_index
from vlmfast.ops.media_index import MediaState, row_valid

MEDIA, EOS = 7, 2


def one_by_one(ids: list[int], mode: str, eos_id: int | None) -> list[tuple[int, int]]:
    """What a token sees, told a token at a time; (0, 0) for nothing."""
    seen, first, closed, previous, out = 0, 0, False, None, []
    for token in ids:
        if token == MEDIA:
            seen += 1
            closed = False
            if previous != MEDIA:
                first = seen
        lo = {"last": seen, "all_prev": 1, "group": first}[mode]
        out.append((0, 0) if closed or seen == 0 else (lo, seen))
        closed = closed or token == eos_id
        previous = token
    return out


def told(lo: Tensor, hi: Tensor) -> list[list[tuple[int, int]]]:
    """Pairs of Python numbers; (0, 0) where media_attention sees nothing."""
    empty = (hi < lo) | (hi <= 0)
    pairs = torch.stack([lo, hi], -1).masked_fill(empty[..., None], 0).tolist()
    return [[tuple(pair) for pair in row] for row in pairs]


@settings(max_examples=60, deadline=None)
@given(
    ids=st.integers(1, 4).flatmap(
        lambda batch: st.integers(1, 20).flatmap(
            lambda length: st.lists(
                st.lists(st.sampled_from([1, EOS, MEDIA]), min_size=length, max_size=length),
                min_size=batch,
                max_size=batch,
            )
        )
    ),
    mode=st.sampled_from(["last", "all_prev", "group"]),
    eos=st.sampled_from([None, EOS]),
    cut=st.integers(0, 20),
)
def test_equals_a_loop_whole_and_in_parts(ids: list[list[int]], mode: str, eos: int | None, cut: int) -> None:
    tokens = torch.tensor(ids)
    expected = [one_by_one(row, mode, eos) for row in ids]
    lo, hi, state = media_index(tokens, MEDIA, mode=mode, eos_id=eos)
    assert told(lo, hi) == expected
    assert lo.dtype == hi.dtype == torch.int32
    if 0 < cut < tokens.shape[1]:
        first = media_index(tokens[:, :cut], MEDIA, mode=mode, eos_id=eos)
        second = media_index(tokens[:, cut:], MEDIA, mode=mode, eos_id=eos, state=first[2])
        assert told(*(torch.cat([a, b], 1) for a, b in zip(first[:2], second[:2], strict=True))) == expected
        assert all(torch.equal(a, b) for a, b in zip(second[2], state, strict=True))


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.sampled_from([1, EOS, MEDIA]), min_size=1, max_size=20), more=st.integers(0, 2))
def test_next_equals_a_loop_whole_and_in_parts(ids: list[int], more: int) -> None:
    """Beside a sample without media. What has media left over when the text ends may see them."""
    tokens, number = torch.tensor([ids, [1] * len(ids)]), ids.count(MEDIA)

    def look_ahead(media: int) -> list[tuple[int, int]]:
        found = [ids[:i].count(MEDIA) + 1 for i in range(len(ids))]
        return [(n, n) if n <= media else (0, 0) for n in found]

    lo, hi, state = media_index(tokens, MEDIA, mode="next")
    assert told(lo, hi) == [look_ahead(number), [(0, 0)] * len(ids)]
    assert lo.dtype == hi.dtype == torch.int32
    num_media = torch.tensor([number + more, 0])
    lo, hi, state = media_index(tokens, MEDIA, mode="next", num_media=num_media)
    assert told(lo, hi) == [look_ahead(number + more), [(0, 0)] * len(ids)]
    parts, before = [], None
    for step in tokens.split(1, dim=1):
        *part, before = media_index(step, MEDIA, mode="next", num_media=num_media, state=before)
        parts.append(part)
    assert told(*(torch.cat(columns, 1) for columns in zip(*parts, strict=True))) == told(lo, hi)
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))


def test_groups_are_mllamas() -> None:
    """The spans that transformers' processor makes of image tokens."""
    processing = pytest.importorskip("transformers.models.mllama.processing_mllama")
    ids = [1, 7, 7, 4, 4, 7, 4, 4]
    spans = processing.get_cross_attention_token_mask(ids, MEDIA)
    visible = torch.zeros(8, 3, dtype=torch.bool)
    for number, (start, end) in enumerate(spans):
        visible[start : len(ids) if end == -1 else end, number] = True
    lo, hi, _ = media_index(torch.tensor([ids]), MEDIA, mode="group")
    media = torch.arange(1, 4)
    assert torch.equal((lo[0, :, None] <= media) & (media <= hi[0, :, None]), visible)


def test_eos_is_idefics() -> None:
    processing = pytest.importorskip("transformers.models.idefics.processing_idefics")

    class Tokenizer:
        eos_token_id = EOS

        def convert_tokens_to_ids(self, token: str) -> int:
            return MEDIA

    ids = torch.tensor([[1, 7, 1, 2, 1, 7, 7, 2, 2, 1, 7, 1], [2, 1, 1, 7, 1, 1, 1, 1, 2, 1, 1, 2]])
    theirs, _ = processing.image_attention_mask_for_packed_input_ids(ids, Tokenizer(), "pt")  # from 0, -1 for none
    lo, hi, _ = media_index(ids, MEDIA, eos_id=EOS)
    assert told(lo, hi) == [[(n + 1, n + 1) for n in row] for row in theirs.tolist()]


def test_samples_do_not_disturb_one_another() -> None:
    """One sample's medium during decoding leaves the others where they are, and beams may be reordered."""
    _, _, state = media_index(torch.tensor([[7, 1, 7], [1, 7, 1], [1, 1, 1]]), MEDIA)
    lo, hi, after = media_index(torch.tensor([[1], [7], [1]]), MEDIA, state=state)
    assert told(lo, hi) == [[(2, 2)], [(2, 2)], [(0, 0)]]
    beams = MediaState(*(t[torch.tensor([1, 1, 0])] for t in after))
    lo, hi, _ = media_index(torch.tensor([[1], [7], [1]]), MEDIA, state=beams)
    assert told(lo, hi) == [[(2, 2)], [(3, 3)], [(2, 2)]]


def test_large_ids_are_not_confused() -> None:
    """50277 and 50278 are the same number in bfloat16, in which some training scripts keep them."""
    lo, hi, _ = media_index(torch.tensor([[50277, 50278, 50277]]), 50278)
    assert told(lo, hi) == [[(0, 0), (1, 1), (1, 1)]]
    with pytest.raises(TypeError, match=r"input_ids must be an integer tensor; got torch.bfloat16"):
        media_index(torch.tensor([[50277, 50278]]).bfloat16(), 50278)


def test_more_tokens_than_media() -> None:
    ids = torch.tensor([[7, 1, 7, 1], [1, 7, 1, 1]])
    for num_media in (2, torch.tensor([2, 1])):
        lo, hi, _ = media_index(ids, MEDIA, num_media=num_media)
        assert told(lo, hi) == told(*media_index(ids, MEDIA)[:2])
    with pytest.raises(ValueError, match=r"num_media must be at least .*; got 1 for sample 0 with 2 tokens"):
        media_index(ids, MEDIA, num_media=torch.tensor([1, 1]))
    with pytest.raises(ValueError, match=r"got 0 for sample 1 with 1 tokens"):
        media_index(ids[1:].expand(2, -1), MEDIA, num_media=torch.tensor([1, 0]))

    # Where nothing is raised, what is not there is not seen.
    compiled = torch.compile(media_index, fullgraph=True, backend="aot_eager")
    expected = {"last": (0, 0), "all_prev": (1, 1), "group": (0, 0)}
    for mode, beyond in expected.items():
        lo, hi, _ = compiled(ids, MEDIA, mode=mode, num_media=1)
        assert told(lo, hi) == [[(1, 1), (1, 1), beyond, beyond], [(0, 0), (1, 1), (1, 1), (1, 1)]]
    lo, hi, _ = compiled(ids, MEDIA, mode="next", num_media=1)
    assert told(lo, hi) == [[(1, 1), (0, 0), (0, 0), (0, 0)], [(1, 1), (1, 1), (0, 0), (0, 0)]]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10000), media=st.integers(1, 5), with_len=st.booleans())
def test_row_valid(seed: int, media: int, with_len: bool) -> None:
    torch.manual_seed(seed)
    lo, hi = (torch.randint(-1, media + 3, (2, 9)) for _ in range(2))
    lengths = torch.randint(0, 3, (2, media)) if with_len else None
    number = torch.arange(1, media + 1)

    def expected(lo: Tensor | None, hi: Tensor | None) -> Tensor:
        visible = torch.ones(2, 9, media, dtype=torch.bool)
        if lo is not None:
            visible &= lo[..., None] <= number
        if hi is not None:
            visible &= number <= hi[..., None]
        return (visible if lengths is None else visible & (lengths > 0)[:, None]).any(-1)

    for a, b in ((lo, hi), (lo, None), (None, hi)):
        assert torch.equal(row_valid(a, b, num_media=media, media_len=lengths), expected(a, b))
    if with_len:
        assert torch.equal(row_valid(None, None, num_media=media, media_len=lengths), (lengths > 0).any(1)[:, None])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.ones(4).long()}, r"input_ids must be \(batch, length\) and not empty; got \(4,\)"),
        ({"input_ids": torch.ones(2, 0).long()}, r"input_ids must be .* not empty; got \(2, 0\)"),
        ({"mode": "first"}, "mode must be one of last, all_prev, group, next; got 'first'"),
        ({"mode": "next", "eos_id": EOS}, "mode 'next' needs eos_id None"),
        ({"mode": "next", "state": MediaState(*[torch.zeros(2)] * 4)}, "mode 'next' needs num_media beside state"),
        ({"num_media": torch.ones(3)}, r"num_media must be \(2,\), one per sample; got \(3,\)"),
        ({"num_media": torch.ones(2, device="meta")}, "num_media must be on input_ids' device cpu; got meta"),
        ({"state": MediaState(*[torch.zeros(3)] * 4)}, r"seen must be \(2,\), one per sample; got \(3,\)"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^media_index: .*{message}"):
        media_index(**{"input_ids": torch.ones(2, 4).long(), "media_token_id": MEDIA, **change})
