"""Which media each text token sees, from token ids: the intervals that media_attention takes.

Media are counted from 1 per sample, in the order of their tokens; 0 stands for none. A decoder feeds the tokens of a
step with the state that the step before returned, and gets what the whole sequence would have given: every sample goes
on from its own state, whatever the others' tokens are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmfast.ops._arguments import check_integer, check_integers, check_string, check_tensor, refuse

MODES = ("last", "all_prev", "group", "next")


class MediaState(NamedTuple):
    """Where each sample's sequence has come to, each (B,). Beams are reordered by indexing all four."""

    seen: Tensor
    """int32: media so far."""
    first: Tensor
    """int32: the first medium of the group that the last one belongs to."""
    in_group: Tensor
    """bool: the last token was a medium's, so a medium's token now belongs to its group."""
    closed: Tensor
    """bool: the last eos_id came after the last medium."""


def media_index(
    input_ids: Tensor,
    media_token_id: int,
    *,
    mode: str = "last",
    eos_id: int | None = None,
    num_media: Tensor | int | None = None,
    state: MediaState | None = None,
) -> tuple[Tensor, Tensor, MediaState]:
    """The interval of media [lo, hi], counted from 1, that each token sees; hi < lo or hi = 0 where it sees none.

    With count the number of media at or before a token, its own included, hi = count and

    - "last": lo = count, the last medium alone (Flamingo, IDEFICS);
    - "all_prev": lo = 1, all media so far;
    - "group": lo = the first of the media whose tokens follow one another without another token between, up to the last
      (Mllama).

    And with hi = count at a medium's token, else count + 1,

    - "next": lo = hi, the medium that comes next, none after the last one: Flamingo's augmentation of half of the
      sequences in training, for text that comes before its image.

    Args:
        input_ids (B, L): integers.
        media_token_id: the token that stands for a medium.
        mode: one of the four.
        eos_id: tokens after this one see nothing until the next medium's token; the eos_id token itself still sees
            (IDEFICS). None: nothing ends.
        num_media: media that each sample has, (B,) or one for all. None: not looked at, but by "next", which then takes
            input_ids for the whole sequence.
        state: of the tokens before input_ids, as this function returned it; None: input_ids are the first.
    Returns:
        lo (B, L), hi (B, L): int32, on input_ids' device.
        state: to go on from.
    Raises:
        TypeError: an argument is not of the type above. input_ids must be integers: ids beyond 256 are no longer
            themselves in bfloat16.
        ValueError: media_token_id or eos_id is not within input_ids' dtype; mode is not one of the four, or "next" with
            eos_id, or with state but without num_media; a shape or device disagrees; or a sample has more tokens of
            media than media, the last for CPU tensors outside torch.compile only: elsewhere tokens of media that are
            not there see nothing, in modes "last" and "next", or nothing of them.
    Source: open_flamingo, transformers' Idefics and Mllama; Alayrac et al. 2022 (Flamingo) for "next".
    """
    _check(input_ids, media_token_id, mode, eos_id, num_media, state)
    if state is None:
        nothing = input_ids.new_zeros(input_ids.shape[0], dtype=torch.int32)
        state = MediaState(nothing, nothing, nothing.bool(), nothing.bool())
    is_media = input_ids == media_token_id
    count = state.seen[:, None] + is_media.cumsum(1, dtype=torch.int32)
    # A group starts at a medium's token that does not follow another; first is carried on from there.
    after_media = torch.cat([state.in_group[:, None], is_media[:, :-1]], 1)
    starts = torch.where(is_media & ~after_media, count, state.first[:, None])
    first = starts.cummax(1).values
    hi = count + (~is_media).int() if mode == "next" else count
    following = hi
    if mode == "next" and num_media is None:
        hi = torch.minimum(hi, count[:, -1:])
    closed = state.closed
    if eos_id is not None:
        is_eos = input_ids == eos_id
        position = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device).expand_as(input_ids)
        last_media = torch.where(is_media, position, 0).cummax(1).values
        last_eos = torch.where(is_eos, position, 0).cummax(1).values
        last_eos = torch.where((last_eos == 0) & (last_media == 0) & closed[:, None], 1, last_eos)
        ended = last_eos > last_media
        before = torch.cat([closed[:, None], ended[:, :-1]], 1) & ~is_media
        hi = torch.where(before, 0, hi)
        closed = ended[:, -1]
    if num_media is not None:
        hi = _limited(count, hi, num_media)
    lo = {"last": count, "all_prev": torch.ones_like(count), "group": first, "next": following}[mode]
    return lo, hi, MediaState(count[:, -1], first[:, -1], is_media[:, -1], closed)


def row_valid(
    media_lo: Tensor | None, media_hi: Tensor | None, *, num_media: int, media_len: Tensor | None = None
) -> Tensor:
    """Which query rows see a valid key: those that media_attention does not take for empty.

    Args:
        media_lo, media_hi (B, Lq), media_len (B, T): integers, as media_attention takes them; one of them is not None.
        num_media: T, how many media there are.
    Returns:
        valid (B, Lq): bool; (B, 1) where media_lo and media_hi are None.
    """
    given = next(t for t in (media_lo, media_hi, media_len) if t is not None)
    lo = given.new_ones(given.shape[0], 1) if media_lo is None else media_lo
    hi = given.new_full((given.shape[0], 1), num_media) if media_hi is None else media_hi
    before, last = torch.broadcast_tensors(lo.long().clamp(1, num_media + 1) - 1, hi.long().clamp(0, num_media))
    if media_len is None:
        return last > before
    used = F.pad((media_len > 0).long().cumsum(1), (1, 0))  # (B, T + 1): media with keys among the first t
    return used.gather(1, last) > used.gather(1, before)


def _limited(count: Tensor, hi: Tensor, num_media: Tensor | int) -> Tensor:
    """hi where there are as many media; raises for a CPU's tensors where count goes beyond."""
    most = num_media[:, None] if isinstance(num_media, Tensor) else torch.full_like(count[:, :1], num_media)
    if count.device.type == "cpu" and not torch.compiler.is_compiling():
        beyond = (count[:, -1:] > most).flatten()
        if beyond.any():
            sample = int(beyond.nonzero()[0])
            raise ValueError(
                f"media_index: num_media must be at least each sample's number of tokens of media; got "
                f"{int(most[sample])} for sample {sample} with {int(count[sample, -1])} tokens"
            )
    return torch.minimum(hi, most.clamp(max=torch.iinfo(hi.dtype).max).to(hi.dtype))


def _check(
    input_ids: Tensor,
    media_token_id: int,
    mode: str,
    eos_id: int | None,
    num_media: Tensor | int | None,
    state: MediaState | None,
) -> None:
    check_integers("media_index", "input_ids", input_ids)
    limits = torch.iinfo(input_ids.dtype)
    tokens = {"media_token_id": media_token_id, **({} if eos_id is None else {"eos_id": eos_id})}
    for name, token in tokens.items():
        check_integer("media_index", name, token)
        if not limits.min <= token <= limits.max:
            raise ValueError(f"media_index: {name} must be within input_ids' {input_ids.dtype}; got {token}")
    check_string("media_index", "mode", mode)
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"media_index: input_ids must be (batch, length) and not empty; got {tuple(input_ids.shape)}")
    if mode not in MODES:
        raise ValueError(f"media_index: mode must be one of {', '.join(MODES)}; got {mode!r}")
    if mode == "next" and eos_id is not None:
        raise ValueError(f"media_index: mode 'next' needs eos_id None; got {eos_id}")
    if mode == "next" and state is not None and num_media is None:
        raise ValueError("media_index: mode 'next' needs num_media beside state, as media to come are not in input_ids")
    if state is not None and not isinstance(state, MediaState):
        refuse("media_index", "state", "a MediaState", state)
    given = {"num_media": num_media} if isinstance(num_media, Tensor) else {}
    if num_media is not None and not given:
        check_integer("media_index", "num_media", num_media)
        if num_media > torch.iinfo(torch.int32).max:
            raise ValueError(f"media_index: num_media must be an int32; got {num_media}")
    for name, tensor in {**given, **(state._asdict() if state else {})}.items():
        check_tensor("media_index", name, tensor)
        if tensor.shape != input_ids.shape[:1]:
            raise ValueError(
                f"media_index: {name} must be ({input_ids.shape[0]},), one per sample; got {tuple(tensor.shape)}"
            )
        if tensor.device != input_ids.device:
            raise ValueError(
                f"media_index: {name} must be on input_ids' device {input_ids.device}; got {tensor.device}"
            )
        if name not in ("in_group", "closed"):
            check_integers("media_index", name, tensor)
