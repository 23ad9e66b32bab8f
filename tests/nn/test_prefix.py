"""Images among tokens: places, pads, positions, labels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vlmfast.nn.prefix import IMAGE, assemble, compact, positions, token_ids

D = 6


def embedding() -> nn.Embedding:
    return nn.Embedding(20, D)


def test_token_ids_give_an_image_its_places() -> None:
    assert token_ids([[3, 4], None, [5], None, None], 2) == [3, 4, -1, -1, 5, -1, -1, -1, -1]


def test_images_stand_where_they_belong_and_get_their_gradient() -> None:
    """Three images in two rows, one of them without tokens before it."""
    table, images = embedding(), torch.randn(3, 2, D, requires_grad=True)
    rows = [token_ids([[3], None, [4, 5], None], 2), token_ids([None, [6]], 2)]
    ids = torch.zeros(2, 7, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for k, row in enumerate(rows):
        ids[k, : len(row)], mask[k, : len(row)] = torch.tensor(row), 1
    read = assemble(table, ids, images, mask)
    expected = [
        torch.cat([table.weight[[3]], images[0], table.weight[[4, 5]], images[1]]),
        torch.cat([images[2], table.weight[[6]]]),
    ]
    for k, row in enumerate(expected):
        assert torch.equal(read.inputs_embeds[k, : len(row)], row)
    assert read.labels is None
    weights = torch.randn(2, 7, D)
    (read.inputs_embeds * weights * mask[..., None]).sum().backward()
    assert torch.equal(images.grad, torch.stack([weights[0, 1:3], weights[0, 5:7], weights[1, 0:2]]))


@pytest.mark.parametrize("left", [False, True])
def test_where_pads_were_decides_nothing(left: bool) -> None:
    table, images = embedding(), torch.randn(2, 2, D)
    row = [IMAGE, IMAGE, 7, 8]
    given = torch.tensor([[0, *row, 0], [0, 0, *row], [*row, 0, 0], [*row[:3], 0, 0, row[3]]])
    present = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 1]])
    for ids, mask in zip(given.split(1), present.split(1), strict=True):
        read = assemble(table, ids, images[:1], mask, ids, left=left)
        place = slice(2, 6) if left else slice(0, 4)
        assert read.attention_mask[0].tolist() == ([0, 0, 1, 1, 1, 1] if left else [1, 1, 1, 1, 0, 0])
        assert read.position_ids[0, place].tolist() == [0, 1, 2, 3]
        assert torch.equal(read.inputs_embeds[0, place], torch.cat([images[0], table.weight[[7, 8]]]))
        assert read.labels is not None
        assert read.labels[0, place].tolist() == [-100, -100, 7, 8]
        assert read.labels[0].ne(-100).sum() == 2


def test_the_first_place_is_not_predicted() -> None:
    ids = torch.tensor([[4, 5, 6]])
    labels = assemble(embedding(), ids, torch.zeros(0, 2, D), labels=ids).labels
    assert labels is not None
    assert labels.tolist() == [[-100, 5, 6]]


def test_positions_and_compact() -> None:
    mask = torch.tensor([[0, 1, 0, 1, 1], [1, 1, 1, 0, 0]])
    assert positions(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]
    rows = torch.arange(10).view(2, 5)
    moved, found = compact(mask, rows)
    assert moved.tolist() == [[1, 1, 1, 0, 0]] * 2
    assert found[:, :3].tolist() == [[1, 3, 4], [5, 6, 7]]
    moved, found = compact(mask, rows, left=True)
    assert moved.tolist() == [[0, 0, 1, 1, 1]] * 2
    assert found[:, 2:].tolist() == [[1, 3, 4], [5, 6, 7]]


IDS = torch.tensor([[IMAGE, IMAGE, 3]])


@pytest.mark.parametrize(
    ("ids", "images", "more", "message"),
    [
        (IDS, torch.zeros(2, 2, D), {}, "input_ids: expected -1 at 4 places, for 2 images of 2 embeddings, got 2"),
        (IDS, torch.zeros(1, 2, D + 1), {}, r"images: expected \(N, k, 6\), got shape \(1, 2, 7\)"),
        (IDS, torch.zeros(2, D), {}, r"images: expected \(N, k, D\), got shape \(2, 6\)"),
        (IDS[0], torch.zeros(1, 2, D), {}, r"input_ids: expected \(B, L\), got shape \(3,\)"),
        (IDS - 1, torch.zeros(1, 2, D), {}, "input_ids: expected tokens, and -1 for images, got -2"),
        (IDS, torch.zeros(1, 2, D), {"attention_mask": IDS[:, 1:]}, r"attention_mask: expected the shape \(1, 3\)"),
        (IDS, torch.zeros(1, 2, D), {"labels": IDS[:, 1:]}, r"labels: expected the shape \(1, 3\)"),
    ],
)
def test_what_does_not_fit_is_named(ids: Tensor, images: Tensor, more: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assemble(embedding(), ids, images, **more)


def test_ids_must_be_integers() -> None:
    with pytest.raises(TypeError, match="input_ids: expected integers"):
        assemble(embedding(), IDS.float(), torch.zeros(1, 2, D))
