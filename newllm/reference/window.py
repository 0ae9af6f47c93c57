"""Causal sliding-window attention, and its segment-local form.

Query t sees keys t-W+1 .. t; with ``window=None`` it sees the keys of its own segment up to t.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from newllm.reference.layout import compaction, pad_tokens, take

Rope = tuple[Tensor, Tensor]


def rotate(x: Tensor, rope: Rope | None) -> Tensor:
    """Rotate-half position embedding (Su et al. 2021) of ``x [B, H, T, D]`` by the table's last T rows."""
    if rope is None:
        return x
    cos, sin = (_rows(table, x.shape[2]).to(x.dtype) for table in rope)
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def _rows(table: Tensor, count: int) -> Tensor:
    last = table[..., table.shape[-2] - count :, :]
    return last[:, None] if table.ndim == 3 else last


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    segment: int | None = None,
    rope: Rope | None = None,
    padding_mask: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Attention over a whole sequence that starts here: q ``[B, H, T, K]`` -> ``[B, H, T, V]``."""
    if padding_mask is None:
        return local_attention(
            q, k, v, window=window, segment=segment, rope=rope, compute_dtype=compute_dtype
        )
    order, rank, length = compaction(padding_mask)
    out = local_attention(
        *(take(x, order) for x in (q, k, v)),
        window=window,
        segment=segment,
        rope=compact_rope(rope, order),
        length=length,
        compute_dtype=compute_dtype,
    )
    return take(out, rank).masked_fill(~padding_mask[:, None, :, None], 0)


def compact_rope(rope: Rope | None, order: Tensor) -> Rope | None:
    """Per-row tables follow their tokens; a shared table belongs to the order of the real tokens."""
    if rope is None or rope[0].ndim == 2:
        return rope
    before = rope[0].shape[1] - order.shape[1]
    rows = torch.cat([torch.arange(before, device=order.device).expand(len(order), -1), before + order], 1)
    cos, sin = (table.gather(1, rows[..., None].expand(-1, -1, table.shape[2])) for table in rope)
    return cos, sin


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    segment: int | None = None,
    rope: Rope | None = None,
    position: Tensor | None = None,
    length: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Attention of the T queries that end a longer run of keys.

    ``k``, ``v`` ``[B, Hkv, P + T, ...]`` start with P tokens of history. ``position [B]`` is the number
    of the first query's token in its row (None: 0 and P = 0), ``length [B]`` the row's real tokens
    among the T (None: all); outputs beyond it are unspecified but finite.
    """
    reach = window or segment
    assert reach is not None
    tokens, past = q.shape[2], k.shape[2] - q.shape[2]
    one_window = past == 0 and tokens <= reach and length is None
    if one_window and compute_dtype is None:
        # In the input's own dtype: a text within the window gives the very bits of full attention.
        return F.scaled_dot_product_attention(
            rotate(q, rope), rotate(k, rope), v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
    compute = compute_dtype or torch.promote_types(q.dtype, torch.float32)
    block = min(tokens, reach)
    blocks = -(-tokens // block)
    lead = past if blocks == 1 else block
    width = lead + block
    queries = _blocks(pad_tokens(rotate(q.to(compute), rope), blocks * block), block, 0)
    keys, values = (
        _blocks(F.pad(x, (0, 0, lead - past, blocks * block - tokens)), block, lead)
        for x in (rotate(k.to(compute), rope), v.to(compute))
    )
    mask = _band(block, width, lead, reach, q.device)
    if position is not None or length is not None or window is None or lead > past:
        mask = mask & _visible(q, blocks, block, lead, position, length, segment if window is None else None)
        mask = mask | _own_key(block, width, lead, q.device)
    mask = mask.expand(q.shape[0], blocks, block, width).reshape(-1, 1, block, width)
    out = F.scaled_dot_product_attention(queries, keys, values, mask, enable_gqa=q.shape[1] != k.shape[1])
    out = out.unflatten(0, (-1, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :tokens]
    return out.to(q.dtype)


def _blocks(x: Tensor, block: int, lead: int) -> Tensor:
    """Blocks behind the ``lead`` tokens before them: ``[B, H, N, D] -> [B * blocks, H, lead + block, D]``.

    ``lead`` is 0 or one block; the only block of a short sequence may have any.
    """
    if x.shape[2] == lead + block:
        return x
    parts = x.unflatten(2, (-1, block))
    if lead:
        parts = torch.cat([parts[:, :, :-1], parts[:, :, 1:]], 3)
    return parts.transpose(1, 2).flatten(0, 1)


def _band(block: int, width: int, lead: int, reach: int, device: torch.device) -> Tensor:
    distance = _distance(block, width, lead, device)
    return (distance >= 0) & (distance < reach)


def _own_key(block: int, width: int, lead: int, device: torch.device) -> Tensor:
    # A query beyond its row's length still needs one key: softmax over nothing is NaN.
    return _distance(block, width, lead, device) == 0


def _distance(block: int, width: int, lead: int, device: torch.device) -> Tensor:
    query = torch.arange(block, device=device)[:, None] + lead
    return query - torch.arange(width, device=device)


def _visible(
    q: Tensor,
    blocks: int,
    block: int,
    lead: int,
    position: Tensor | None,
    length: Tensor | None,
    segment: int | None,
) -> Tensor:
    """Keys that exist (and lie in the query's segment): ``[B or 1, blocks, block or 1, width]``."""
    offset = torch.arange(-lead, blocks * block, device=q.device)[None]
    start = offset.new_zeros(1, 1) if position is None else position[:, None]
    end = q.shape[2] if length is None else length[:, None]
    exists = (start + offset >= 0) & (offset < end)
    keys = exists.unfold(1, lead + block, block)[:, :, None]
    if segment is None:
        return keys
    number = (start + offset).div(segment, rounding_mode="floor")
    key_segment = number.unfold(1, lead + block, block)[:, :, None]
    query_segment = number[:, lead:].unflatten(1, (blocks, block))[..., None]
    return keys & (key_segment == query_segment)
