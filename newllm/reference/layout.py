"""Where a row's tokens lie: compaction of padding, the ring of past tokens, segment alignment.

Everything is a gather along the token axis, so that rows of a batch may be at different phases.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens ``index [B, N]`` of ``x [B, H, T, D]`` as ``[B, H, N, D]``."""
    batch, heads, _, width = x.shape
    return x.gather(2, index[:, None, :, None].expand(batch, heads, -1, width))


def compaction(padding_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How to move the real tokens of ``padding_mask [B, T]`` to the front of each row, and back.

    Returns ``order [B, T]`` (real tokens first, in order), ``rank [B, T]`` (where token t went; only
    meaningful for real tokens) and ``length [B]``.
    """
    order = padding_mask.logical_not().to(torch.int8).argsort(dim=1, stable=True)
    rank = (padding_mask.cumsum(1) - 1).clamp(min=0)
    return order, rank, padding_mask.sum(1)


def past_slots(position: Tensor, count: int, size: int) -> Tensor:
    """Where a ring of ``size`` slots keeps the last ``count`` tokens, ``[B, count]``, oldest first."""
    return (position[:, None] + torch.arange(-count, 0, device=position.device)) % size


def newest(position: Tensor, length: Tensor | int, size: int) -> Tensor:
    """Which of a row's ``length [B]`` new tokens is the latest in each slot, ``[B, R]``; negative: none."""
    slot = torch.arange(size, device=position.device)
    last = position + (length - 1)
    return (last - position)[:, None] - (last[:, None] - slot) % size


def ring_history(ring: Tensor, position: Tensor, count: int) -> Tensor:
    """The last ``count`` tokens ``[B, H, count, D]`` of ``ring [B, H, R, D]``, oldest first."""
    return take(ring, past_slots(position, count, ring.shape[2]))


def behind_ring(ring: Tensor, new: Tensor, slots: Tensor) -> Tensor:
    """``new [B, H, T, D]`` behind ``slots [B, N]`` of the ring, token by token as projections leave it."""
    tokens, heads, width = slots.shape[1], ring.shape[1], ring.shape[3]
    past = ring.transpose(1, 2).gather(1, slots[:, :, None, None].expand(-1, tokens, heads, width))
    return torch.cat([past, new.transpose(1, 2).contiguous()], 1).transpose(1, 2)


def ring_append(
    pairs: Sequence[tuple[Tensor, Tensor]], position: Tensor, length: Tensor | int
) -> list[Tensor]:
    """Rings ``[B, H, R, D]`` after a row's first ``length [B]`` tokens of ``[B, H, T, D]`` joined them.

    Of each of ``pairs``, a ring and what joins it. Slot r holds the latest token n with ``n % R == r``; slots
    that no token has reached keep zeros.
    """
    (ring, new), *_ = pairs
    source = newest(position, length, ring.shape[2])
    if not isinstance(length, Tensor) and length >= ring.shape[2]:
        # Every slot is new: on a GPU each step less is a launch less.
        return [take(new, source) for _, new in pairs]
    index, fresh = source.clamp(0, new.shape[2] - 1), (source >= 0)[:, None, :, None]
    return [torch.where(fresh, take(new, index), ring) for ring, new in pairs]


def ring_start(new: Tensor, size: int, before: int = 0) -> Tensor:
    """The ring of ``size`` tokens after the tokens ``new [B, H, T, D]`` that start a stream.

    Those behind ``before`` others end with a ring as well, if they are at least ``size``.
    """
    tokens = new.shape[2]
    if tokens < size:
        return pad_tokens(new, size)
    # The slot of the oldest of the last `size` tokens.
    oldest = (before + tokens) % size
    parts = new[:, :, tokens - oldest :], new[:, :, tokens - size : tokens - oldest]
    return torch.cat(parts, 2)


def pad_tokens(x: Tensor, total: int) -> Tensor:
    """``x [B, H, T, D]`` with zeros behind it up to ``total`` tokens."""
    missing = total - x.shape[2]
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x
