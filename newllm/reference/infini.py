"""The Infini-attention layer: a sliding window beside an associative memory of whole segments.

Order within a segment: retrieve with the state before it, attend locally, gate, then write. So a token
never sees its own segment through the memory, and the layer is causal. The memory reads the raw
projections; the window reads the same projections after RoPE.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from newllm.reference.features import feature_map, feature_width
from newllm.reference.layout import (
    behind_ring,
    compaction,
    pad_tokens,
    past_slots,
    ring_append,
    ring_start,
    take,
)
from newllm.reference.memory import Segments, empty_memory, read, scan, state_dtype, write_segments
from newllm.reference.window import Rope, compact_rope, local_attention
from newllm.types import FeatureMap, GateKind, InfiniState, MemoryState, Rule


def gate_value(beta: Tensor, gate: GateKind) -> Tensor:
    """g of ``out = A_dot + g (A_mem - A_dot)`` per query head: the paper's sigmoid, or tanh, shut at zero."""
    return beta.sigmoid() if gate == "sigmoid" else beta.tanh()


def empty_state(
    k: Tensor, v: Tensor, *, ring: int, memory: bool, feature: FeatureMap | None = None
) -> InfiniState:
    """State before a stream's first token, for keys ``[B, Hkv, T, K]`` and values ``[B, Hkv, T, V]``."""
    batch, heads, _, width = k.shape
    features, dtype = feature_width(feature, width), state_dtype(k.dtype)
    return InfiniState(
        matrix=k.new_zeros(batch, heads, features, v.shape[-1], dtype=dtype) if memory else None,
        norm=k.new_zeros(batch, heads, features, dtype=dtype) if memory else None,
        keys=k.new_zeros(batch, heads, ring, width),
        values=v.new_zeros(batch, heads, ring, v.shape[-1]),
        position=torch.zeros(batch, dtype=torch.int64, device=k.device),
    )


def memory_of(state: InfiniState) -> MemoryState:
    """The memory of a layer that has one; whole segments need no guard, so no token count."""
    assert state.matrix is not None
    assert state.norm is not None
    return MemoryState(state.matrix, state.norm)


def infini_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    *,
    window: int | None,
    segment: int,
    gate: GateKind = "sigmoid",
    rope: Rope | None = None,
    state: InfiniState | None = None,
    rule: Rule = "linear",
    feature: FeatureMap | None = None,
    eps: float = 1e-6,
    bptt_segments: int | None = None,
    segment_weight: Tensor | None = None,
    decay: Tensor | None = None,
    padding_mask: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, InfiniState]:
    """One layer over T new tokens: q ``[B, H, T, K]`` -> (``[B, H, T, V]``, state after them)."""
    position = None if state is None else state.position

    def layer(
        q: Tensor, keys: Tensor, values: Tensor, rope: Rope | None, length: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        out = local_attention(
            q,
            keys,
            values,
            window=window,
            segment=segment,
            rope=rope,
            position=position,
            length=length,
            compute_dtype=compute_dtype,
        )
        if beta is None:
            return out, None, None
        compute = compute_dtype or state_dtype(q.dtype)
        past = keys.shape[2] - q.shape[2]
        segments = _aligned_segments(keys, values, past, position, length, segment, feature, compute)
        start = (
            empty_memory(keys, values, feature)._replace(count=None) if state is None else memory_of(state)
        )
        before, (matrix, norm, _) = scan(
            segments,
            start,
            rule=rule,
            weight=segment_weight,
            decay=decay,
            eps=eps,
            bptt_segments=bptt_segments,
        )
        recalled = recall(q.to(compute), before, position, segment, feature, eps)
        return mix(out, recalled, beta, gate), matrix, norm

    return streamed(layer, q, k, v, ring=window or segment, rope=rope, state=state, padding_mask=padding_mask)


# q [B, H, T, K], keys and values [B, Hkv, P + T, ...] behind their history, tables, the row's real tokens
# -> out [B, H, T, V], matrix and norm of the memory after them.
Layer = Callable[
    [Tensor, Tensor, Tensor, Rope | None, Tensor | None], tuple[Tensor, Tensor | None, Tensor | None]
]


def streamed(
    layer: Layer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ring: int,
    rope: Rope | None,
    state: InfiniState | None,
    padding_mask: Tensor | None,
) -> tuple[Tensor, InfiniState]:
    """A ``layer`` over the next tokens of a stream: without their padding, behind the state's ring."""
    length = None
    if padding_mask is not None:
        order, rank, length = compaction(padding_mask)
        q, k, v = (take(x, order) for x in (q, k, v))
        rope = compact_rope(rope, order)
    keys, values = _with_history(k, v, state, ring)
    out, matrix, norm = layer(q, keys, values, rope, length)
    if padding_mask is not None:
        out = take(out, rank).masked_fill(~padding_mask[:, None, :, None], 0)
    if state is None and length is None:
        position = torch.full((k.shape[0],), k.shape[2], device=k.device)
        return out, InfiniState(matrix, norm, ring_start(k, ring), ring_start(v, ring), position)
    start = state or empty_state(k, v, ring=ring, memory=False)
    tokens = k.shape[2] if length is None else length
    rings = (start.keys, k), (start.values, v)
    new_keys, new_values = ring_append(rings, start.position, tokens)
    return out, InfiniState(matrix, norm, new_keys, new_values, start.position + tokens)


def mix(local: Tensor, recalled: Tensor, beta: Tensor, gate: GateKind) -> Tensor:
    """``A_dot + g (A_mem - A_dot)`` in A_mem's dtype, returned in A_dot's."""
    g = gate_value(beta.to(recalled.dtype), gate)[:, None, None]
    wide = local.to(recalled.dtype)
    return (wide + g * (recalled - wide)).to(local.dtype)


def _with_history(k: Tensor, v: Tensor, state: InfiniState | None, ring: int) -> tuple[Tensor, Tensor]:
    """Keys and values behind the ``ring - 1`` tokens before them, all that a window can reach."""
    if state is None:
        return k, v
    slots = past_slots(state.position, ring - 1, ring)
    return behind_ring(state.keys, k, slots), behind_ring(state.values, v, slots)


def touched_segments(tokens: int, segment: int, streaming: bool) -> int:
    """Most segments that a call of ``tokens`` tokens touches, the open one of a continued stream included."""
    return -(-(tokens + (segment - 1 if streaming else 0)) // segment)


def _aligned_segments(
    k: Tensor,
    v: Tensor,
    past: int,
    position: Tensor | None,
    length: Tensor | None,
    segment: int,
    feature: FeatureMap | None,
    compute: torch.dtype,
) -> Segments:
    """Keys and values from the start of each row's open segment on; only completed segments are written."""
    batch, tokens = k.shape[0], k.shape[2] - past
    count = touched_segments(tokens, segment, position is not None)
    phase = torch.zeros(1, dtype=torch.int64, device=k.device) if position is None else position % segment
    if position is None:
        k, v = pad_tokens(k, count * segment), pad_tokens(v, count * segment)
    else:
        index = past - phase[:, None] + torch.arange(count * segment, device=k.device)
        index = index.clamp(max=k.shape[2] - 1)
        k, v = take(k, index), take(v, index)
    k, v = (x.to(compute).unflatten(2, (count, segment)) for x in (k, v))
    if position is None and length is None and tokens % segment == 0:
        return write_segments(k, v, None, feature)
    end = phase + (tokens if length is None else length)
    complete = torch.arange(1, count + 1, device=k.device) * segment <= end[:, None]
    return write_segments(k, v, complete[..., None].expand(batch, count, segment), feature)


def recall(
    q: Tensor,
    before: MemoryState,
    position: Tensor | None,
    segment: int,
    feature: FeatureMap | None,
    eps: float,
) -> Tensor:
    """Each query reads the state before its own segment: ``[B, H, T, K] -> [B, H, T, V]``."""
    batch, heads, tokens, _ = q.shape
    kv_heads, count = before.norm.shape[1:3]
    features = feature_map(q, feature)
    if position is None:
        features = pad_tokens(features, count * segment)
    else:
        phase = (position % segment)[:, None]
        index = torch.arange(count * segment, device=q.device) - phase
        features = take(features, index.clamp(0, tokens - 1))
    group, columns = heads // kv_heads, before.matrix.shape[-1]
    split = features.view(batch, kv_heads, group, count, segment, features.shape[-1])
    out = read(split.transpose(2, 3).flatten(3, 4), before.matrix, before.norm, eps)
    out = out.unflatten(3, (group, segment)).transpose(2, 3)
    out = out.reshape(batch, heads, count * segment, columns)
    if position is None:
        return out[:, :, :tokens]
    return take(out, phase + torch.arange(tokens, device=q.device))
