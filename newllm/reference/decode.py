"""One new token per row, written into the state it is given."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from newllm.reference.infini import memory_of, mix
from newllm.reference.layout import take
from newllm.reference.memory import memory_retrieve, scan, state_dtype, write_segments
from newllm.reference.window import Rope, rotate
from newllm.types import FeatureMap, GateKind, InfiniState, MemoryState, Rule


def infini_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    state: InfiniState,
    *,
    window: int | None,
    segment: int,
    gate: GateKind = "sigmoid",
    rope: Rope | None = None,
    rule: Rule = "linear",
    feature: FeatureMap | None = None,
    eps: float = 1e-6,
    decay: Tensor | None = None,
    active: Tensor | None = None,
) -> Tensor:
    """Attend with one token per row, q ``[B, H, 1, K]`` -> ``[B, H, 1, V]``, writing into ``state``."""
    if active is None:
        active = torch.ones_like(state.position, dtype=torch.bool)
    for ring, new in ((state.keys, k), (state.values, v)):
        _put(ring, new, state.position, active)
    out = _attend(q, state, window, segment, rope)
    if beta is not None:
        memory = memory_of(state)
        recalled = memory_retrieve(q.to(state_dtype(q.dtype)), memory, feature=feature, eps=eps)
        out = mix(out, recalled, beta, gate)
        _fold(memory, state, segment, rule, feature, eps, decay, active)
    state.position.add_(active)
    return out.masked_fill(~active[:, None, None, None], 0)


def _put(ring: Tensor, new: Tensor, position: Tensor, active: Tensor) -> None:
    rows = torch.arange(len(position), device=ring.device)
    slot = position % ring.shape[2]
    ring[rows, :, slot] = torch.where(active[:, None, None], new[:, :, 0].to(ring.dtype), ring[rows, :, slot])


def _attend(q: Tensor, state: InfiniState, window: int | None, segment: int, rope: Rope | None) -> Tensor:
    """Softmax over the ring in slot order: attention does not mind the order, so nothing is moved."""
    ring = state.keys.shape[2]
    filled = _filled(state.position, ring)
    age = (state.position[:, None] - torch.arange(filled, device=q.device)) % ring
    visible = age <= state.position[:, None]
    if window is None:
        visible = visible & (age <= (state.position % segment)[:, None])
    compute = state_dtype(q.dtype)
    keys = rotate(state.keys[:, :, :filled].to(compute), _rope_by_age(rope, age))
    return F.scaled_dot_product_attention(
        rotate(q.to(compute), rope),
        keys,
        state.values[:, :, :filled].to(compute),
        visible[:, None, None],
        enable_gqa=q.shape[1] != keys.shape[1],
    ).to(q.dtype)


def _filled(position: Tensor, ring: int) -> int:
    """The first slots, which hold all that was read; all of them where asking would cost a wait."""
    if position.device.type != "cpu" or torch.compiler.is_compiling():
        return ring
    return min(ring, max(position.tolist(), default=0) + 1)


def _rope_by_age(rope: Rope | None, age: Tensor) -> Rope | None:
    if rope is None:
        return None
    rows = rope[0].shape[-2] - 1 - age
    if rope[0].ndim == 2:
        return rope[0][rows], rope[1][rows]
    cos, sin = (table.gather(1, rows[..., None].expand(-1, -1, table.shape[2])) for table in rope)
    return cos, sin


def _fold(
    memory: MemoryState,
    state: InfiniState,
    segment: int,
    rule: Rule,
    feature: FeatureMap | None,
    eps: float,
    decay: Tensor | None,
    active: Tensor,
) -> None:
    """Write the segment that the new token completes, in the rows where it completes one."""
    complete = active & ((state.position + 1) % segment == 0)
    # Compiled code may not ask; in eager mode nearly every token is spared the work.
    if not torch.compiler.is_compiling() and not complete.any():
        return
    index = (state.position[:, None] - torch.arange(segment, device=complete.device)) % state.keys.shape[2]
    compute = state_dtype(state.keys.dtype)
    k, v = (take(ring, index).to(compute)[:, :, None] for ring in (state.keys, state.values))
    segments = write_segments(k, v, complete[:, None, None].expand(-1, 1, segment), feature)
    _, after = scan(segments, memory, rule=rule, decay=decay, eps=eps)
    memory.matrix.copy_(after.matrix)
    memory.norm.copy_(after.norm)
