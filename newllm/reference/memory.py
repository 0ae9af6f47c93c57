"""The associative memory of Infini-attention (Munkhdalai et al. 2024, arXiv 2404.07143).

    retrieve   A_mem = sigma(Q) M / (sigma(Q) z)                              eq. 3
    linear     M <- M + sigma(K)^T V,  z <- z + sum_t sigma(K_t)              eq. 4
    delta      M <- M + sigma(K)^T (V - eta sigma(K) M / (sigma(K) z))        eq. 5, with a guard eta
    gamma      delta's M;  z <- z + sum_t gamma_t phi(K_t)                    ARMT, arXiv 2407.04841
    decay      M and z times a factor per head before a segment is written

The guard: a correction drawn from N_prev tokens may not be subtracted N_s > N_prev times in full, or
the old content is driven past zero and inverted; eta = min(1, N_prev / N_s). Where writes are of unequal
strength, by a write gate or decay, the sums of z and of what is added to it count in place of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from newllm.reference.features import feature_map, feature_width, key_features
from newllm.reference.layout import compaction, pad_tokens, take
from newllm.types import FeatureMap, MemoryState, Rule

Step = Callable[[MemoryState], MemoryState]


class Segments(NamedTuple):
    """Keys and values cut into segments, zero where no real token stands.

    ``features [B, H, N, S, F]``, ``values [B, H, N, S, V]``, ``tokens [B, N]`` real tokens of each;
    ``gated``: they are written with unequal strength.
    """

    features: Tensor
    values: Tensor
    tokens: Tensor
    gated: bool = False


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """States are float32, and float64 under the float64 oracle."""
    return torch.promote_types(dtype, torch.float32)


def empty_memory(k: Tensor, v: Tensor, feature: FeatureMap | None = None) -> MemoryState:
    """The empty memory for keys ``k [B, H, T, K]`` and values ``v [B, H, T, V]``."""
    batch, heads, _, width = k.shape
    features = feature_width(feature, width)
    dtype = state_dtype(k.dtype)
    return MemoryState(
        k.new_zeros(batch, heads, features, v.shape[-1], dtype=dtype),
        k.new_zeros(batch, heads, features, dtype=dtype),
        torch.zeros(batch, dtype=torch.int64, device=k.device),
    )


def memory_retrieve(
    q: Tensor,
    state: MemoryState,
    *,
    feature: FeatureMap | None = None,
    eps: float = 1e-6,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Read ``q [B, H, T, K]`` from ``state``: ``[B, H, T, V]`` in q's dtype, zeros from an empty memory."""
    compute = compute_dtype or state_dtype(q.dtype)
    features = feature_map(q.to(compute), feature)
    kv_heads, columns = state.matrix.shape[1], state.matrix.shape[3]
    grouped = features.unflatten(1, (kv_heads, q.shape[1] // kv_heads)).flatten(2, 3)
    return read(grouped, state.matrix, state.norm, eps).view(*q.shape[:3], columns).to(q.dtype)


def read(features: Tensor, matrix: Tensor, norm: Tensor, eps: float) -> Tensor:
    """Eq. 3 for features ``[..., T, F]`` of a memory ``[..., F, V]``, ``[..., F]``."""
    weight = features @ norm.to(features.dtype)[..., None]
    return features @ matrix.to(features.dtype) / weight.clamp(min=eps)


def memory_update(
    k: Tensor,
    v: Tensor,
    state: MemoryState | None = None,
    *,
    rule: Rule = "linear",
    feature: FeatureMap | None = None,
    scale: str = "none",
    padding_mask: Tensor | None = None,
    eps: float = 1e-6,
    compute_dtype: torch.dtype | None = None,
) -> MemoryState:
    """Write all tokens of ``k [B, H, T, K]``, ``v [B, H, T, V]`` as one segment.

    ``scale`` divides what is added to both matrix and norm, so that readouts keep their size:
    ``"1/T"`` by the row's real tokens, ``"1/(B*T)"`` by those of the whole batch.
    """
    state = state or empty_memory(k, v, feature)
    real = torch.ones_like(k[:, 0, :, 0], dtype=torch.bool) if padding_mask is None else padding_mask
    segments = _segments(k, v, real, k.shape[2], feature, compute_dtype)
    tokens = real.sum(1)
    shares = {"none": None, "1/T": tokens, "1/(B*T)": tokens.sum().expand_as(tokens)}[scale]
    weight = None if shares is None else shares.clamp(min=1).to(state.norm.dtype).reciprocal()[:, None]
    _, final = scan(segments, state, rule=rule, weight=weight, eps=eps)
    return final


def memory_scan(
    k: Tensor,
    v: Tensor,
    state: MemoryState | None = None,
    *,
    segment: int,
    rule: Rule = "linear",
    feature: FeatureMap | None = None,
    segment_weight: Tensor | None = None,
    decay: Tensor | None = None,
    padding_mask: Tensor | None = None,
    eps: float = 1e-6,
    bptt_segments: int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[MemoryState, MemoryState]:
    """Write ``k``, ``v`` segment by segment: the states before each ``[B, H, N, ...]``, and the last."""
    state = state or empty_memory(k, v, feature)
    real = torch.ones_like(k[:, 0, :, 0], dtype=torch.bool)
    if padding_mask is not None:
        order, _, length = compaction(padding_mask)
        k, v = take(k, order), take(v, order)
        real = torch.arange(k.shape[2], device=k.device) < length[:, None]
    segments = _segments(k, v, real, segment, feature, compute_dtype)
    return scan(
        segments, state, rule=rule, weight=segment_weight, decay=decay, eps=eps, bptt_segments=bptt_segments
    )


def _segments(
    k: Tensor,
    v: Tensor,
    real: Tensor,
    segment: int,
    feature: FeatureMap | None,
    compute_dtype: torch.dtype | None,
) -> Segments:
    compute = compute_dtype or state_dtype(k.dtype)
    count = -(-k.shape[2] // segment)
    k, v = (pad_tokens(x.to(compute), count * segment).unflatten(2, (count, segment)) for x in (k, v))
    written = pad_tokens(real[:, None, :, None], count * segment)[:, :, :, 0].unflatten(2, (count, segment))
    return write_segments(k, v, written[:, 0], feature)


def write_segments(k: Tensor, v: Tensor, written: Tensor | None, feature: FeatureMap | None) -> Segments:
    """Segments of keys ``k [B, H, N, S, K]``; those ``written [B, N, S]`` enter the memory (None: all)."""
    features = key_features(k, feature)
    gated = feature is not None and feature.write is not None
    if written is None:
        tokens = torch.full((k.shape[0], k.shape[2]), k.shape[3], device=k.device)
        return Segments(features, v, tokens, gated)
    # The features are masked, not the keys: sigma(0) = 1 would leak padding into the norm.
    hidden = ~written[:, None, ..., None]
    features = features.masked_fill(hidden, 0)
    return Segments(features, v.masked_fill(hidden, 0), written.sum(-1), gated)


def scan(
    segments: Segments,
    state: MemoryState,
    *,
    rule: Rule,
    weight: Tensor | None = None,
    decay: Tensor | None = None,
    eps: float = 1e-6,
    bptt_segments: int | None = None,
) -> tuple[MemoryState, MemoryState]:
    """Fold segments into ``state`` from left to right: states before each ``[B, H, N, ...]``, and the last.

    ``weight [B, N]`` scales what a segment adds (linear rule), ``decay [H]`` what was there before it.
    ``bptt_segments`` is how many segments
    back gradients flow through the memory: None all, 1 the preceding one, 0 none. It is counted within
    a call; what ``state`` itself depends on is the caller's to detach.
    """
    steps = _steps(segments, rule, weight, eps, state.norm.dtype, segments.gated or decay is not None)
    if decay is not None:
        steps = [
            partial(_decayed, *each, decay) for each in zip(steps, segments.tokens.unbind(1), strict=True)
        ]
    states = list(accumulate(steps, lambda memory, step: step(memory), initial=state))
    last = states[-1]
    if bptt_segments is not None:
        states = [_truncated(states, steps, index, bptt_segments) for index in range(len(states))]
        last = _last_written(states, (segments.tokens > 0).sum(1))
    before = states[:-1]
    counts = [s.count for s in before if s.count is not None]
    stacked = MemoryState(
        torch.stack([s.matrix for s in before], 2),
        torch.stack([s.norm for s in before], 2),
        torch.stack(counts, 1) if counts else None,
    )
    return stacked, last


def _last_written(states: list[MemoryState], written: Tensor) -> MemoryState:
    """Each row's state after its first ``written [B]`` segments.

    The empty ones behind them change no value, but each would cut a segment off the gradient's reach.
    """
    rows = torch.arange(written.shape[0], device=written.device)
    matrix, norm = (
        torch.stack(each, 1)[rows, written] for each in ([s.matrix for s in states], [s.norm for s in states])
    )
    return MemoryState(matrix, norm, states[-1].count)


def _truncated(states: list[MemoryState], steps: list[Step], index: int, reach: int) -> MemoryState:
    """State ``index`` again, with the same values, from a detached state ``reach`` segments before."""
    start = index - reach
    if start < 0:
        return states[index]
    origin = states[start]
    memory = MemoryState(origin.matrix.detach(), origin.norm.detach(), origin.count)
    for step in steps[start:index]:
        memory = step(memory)
    return memory


def _steps(
    segments: Segments, rule: Rule, weight: Tensor | None, eps: float, dtype: torch.dtype, uneven: bool
) -> list[Step]:
    """One function per segment that folds it into a memory, to which writes of ``uneven`` strength go."""
    shares = [None] * segments.tokens.shape[1] if weight is None else weight.to(dtype).unbind(1)
    tokens = segments.tokens.unbind(1)
    if rule == "linear":
        matrices = (segments.features.mT @ segments.values).to(dtype)
        norms = segments.features.sum(-2, dtype=dtype)
        added = zip(matrices.unbind(2), norms.unbind(2), tokens, shares, strict=True)
        return [partial(_add, *each) for each in added]
    written = zip(segments.features.unbind(2), segments.values.unbind(2), tokens, shares, strict=True)
    return [partial(_correct, *each, rule, eps, uneven) for each in written]


def _decayed(step: Step, tokens: Tensor, decay: Tensor, memory: MemoryState) -> MemoryState:
    """``step`` after the memory has faded, in the rows that write anything."""
    kept = torch.where(tokens[:, None] > 0, decay.to(memory.norm.dtype), 1.0)[..., None]
    return step(memory._replace(matrix=memory.matrix * kept[..., None], norm=memory.norm * kept))


def _add(
    matrix: Tensor, norm: Tensor, tokens: Tensor, share: Tensor | None, memory: MemoryState
) -> MemoryState:
    """What a segment adds, times the row's ``share [B]``."""
    if share is not None:
        matrix, norm = matrix * share[:, None, None, None], norm * share[:, None, None]
    count = None if memory.count is None else memory.count + tokens
    return MemoryState(memory.matrix + matrix, memory.norm + norm, count)


def _correct(
    features: Tensor,
    values: Tensor,
    tokens: Tensor,
    share: Tensor | None,
    rule: Rule,
    eps: float,
    uneven: bool,
    memory: MemoryState,
) -> MemoryState:
    """Delta rule: write what the memory before this segment does not yet answer (eq. 5, guarded)."""
    dtype = memory.norm.dtype
    known = read(features, memory.matrix, memory.norm, eps)
    eta: Tensor | None = None
    if uneven:
        held = memory.norm.sum(-1) / features.sum((-2, -1)).to(dtype).clamp(min=eps)
        eta = held.clamp(max=1).detach()
    elif memory.count is not None:
        eta = (memory.count.to(dtype) / tokens.clamp(min=1)).clamp(max=1)[:, None]
    if eta is not None:
        known = known * eta[..., None, None].to(known.dtype)
    matrix = (features.mT @ (values - known)).to(dtype)
    novelty = _novelty(features, memory.norm, eps) if rule == "gamma" else 1.0
    return _add(matrix, (features * novelty).sum(-2, dtype=dtype), tokens, share, memory)


def _novelty(features: Tensor, norm: Tensor, eps: float) -> Tensor:
    """ARMT's gamma_t: the share of a feature that the norm lacks, kept in [0, 1], not differentiated."""
    size = features.square().sum(-1, keepdim=True).clamp(min=eps)
    overlap = features @ norm.to(features.dtype)[..., None] / size
    return (1 - overlap).clamp(min=0).detach()
