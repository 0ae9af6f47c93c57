"""Public operators of the associative memory."""

from __future__ import annotations

import torch
from torch import Tensor

from newllm import backend as backends
from newllm.ops import checks, memory_fused as fused
from newllm.ops.support import unsupported
from newllm.reference import memory as reference
from newllm.reference.features import feature_width
from newllm.reference.layout import compaction, take
from newllm.types import FeatureMap, MemoryState, Rule

RULES = ("linear", "delta", "gamma")
SCALES = ("none", "1/T", "1/(B*T)")
# The least denominator of what the delta rule reads.
EPS = 1e-6


def memory_update(
    k: Tensor,
    v: Tensor,
    state: MemoryState | None = None,
    *,
    rule: Rule = "linear",
    feature: FeatureMap | None = None,
    scale: str = "none",
    padding_mask: Tensor | None = None,
    backend: str | None = None,
) -> MemoryState:
    """Write a run of tokens into an associative memory (Infini-attention, arXiv 2404.07143, eq. 4, 5).

    Args:
        k: keys ``[B, Hkv, T, K]``, raw projections, float16 to float64.
        v: values ``[B, Hkv, T, V]``.
        state: the memory so far; None is empty.
        rule: ``linear``; ``delta`` writes only what the memory does not answer yet, guarded by
            ``state.count``; ``gamma`` is delta with ARMT's norm (arXiv 2407.04841).
        feature: feature map of the keys; None is the paper's ELU + 1.
        scale: ``none``, or a divisor of all that is added: ``1/T`` the row's real tokens,
            ``1/(B*T)`` those of the batch.
        padding_mask: bool ``[B, T]``, True = real token; padding is not written.
        backend: ``reference`` or ``fused``; None chooses.

    Returns:
        The memory after the tokens: matrix ``[B, Hkv, F, V]``, norm ``[B, Hkv, F]`` in float32
        (float64 for float64 inputs), count ``[B]``.

    Raises:
        TypeError: for a wrong dtype. ValueError: for a wrong size or choice.
    """
    context, (k, v) = checks.without_autocast(k, v)
    checks.key_values(k, v)
    checks.choice("rule", rule, RULES)
    checks.choice("scale", scale, SCALES)
    checks.feature(feature, k.shape[1], k)
    checks.memory_state(state, k, v, feature)
    checks.padding(padding_mask, k)
    chosen = backends.resolve("memory_update", k.device, backend, _declined(k, v, feature, state))
    with context:
        if chosen == "fused":
            return _fused_update(k, v, state, rule, feature, scale, padding_mask)
        return reference.memory_update(
            k, v, state, rule=rule, feature=feature, scale=scale, padding_mask=padding_mask
        )


def memory_retrieve(
    q: Tensor,
    state: MemoryState,
    *,
    feature: FeatureMap | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Read queries from an associative memory (arXiv 2404.07143, eq. 3).

    Args:
        q: queries ``[B, H, T, K]``, raw projections; H is a multiple of the memory's heads.
        state: matrix ``[B, Hkv, F, V]``, norm ``[B, Hkv, F]``.
        feature: feature map of the queries, the one the keys were written with.
        eps: least denominator; an empty memory reads exact zeros.
        backend: ``reference`` or ``fused``; None chooses.

    Returns:
        ``[B, H, T, V]`` in q's dtype.

    Raises:
        TypeError: for a wrong dtype. ValueError: for a wrong size or choice.
    """
    context, (q,) = checks.without_autocast(q)
    checks.floats("q", q)
    checks.require(q.ndim == 4, "q", list(q.shape), "of shape [B, H, T, K]")
    checks.kind("state", state, checks.MEMORIES, "a MemoryState")
    checks.kind("state.matrix", state.matrix, Tensor, "a tensor")
    checks.denominator(eps)
    checks.require(
        state.matrix.ndim == 4, "state.matrix", list(state.matrix.shape), "of shape [B, Hkv, F, V]"
    )
    heads = state.matrix.shape[1]
    checks.require(q.shape[1] % heads == 0, "q's heads", q.shape[1], "a multiple of the memory's {}", heads)
    checks.feature(feature, heads, q)
    features = feature_width(feature, q.shape[3])
    checks.memory(state.matrix, state.norm, (q.shape[0], heads, features, state.matrix.shape[3]), q)
    declined = _declined(q, state.matrix, feature, state)
    chosen = backends.resolve("memory_retrieve", q.device, backend, declined)
    with context:
        if chosen == "fused":
            return fused.memory_retrieve(q, state.matrix, state.norm, *_learned(feature), eps)
        return reference.memory_retrieve(q, state, feature=feature, eps=eps)


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
    backend: str | None = None,
) -> tuple[MemoryState, MemoryState]:
    """Write tokens segment by segment, keeping the state before each (an exclusive prefix, left to right).

    Args:
        k: keys ``[B, Hkv, T, K]``. v: values ``[B, Hkv, T, V]``.
        state: the memory before the first segment; None is empty.
        segment: tokens per segment, S; the last segment may be shorter. Borders count real tokens.
        rule: ``linear``, ``delta`` or ``gamma``, see ``memory_update``.
        feature: feature map of the keys.
        segment_weight: ``[B, N]`` factors of what each segment adds; linear rule only (with the delta
            rule a factor above 1 would subtract old content more than once).
        decay: ``[Hkv]`` factors, from 0 to 1, of the memory before each segment is written; None keeps all.
        padding_mask: bool ``[B, T]``, True = real token.
        backend: ``reference`` or ``fused``; None chooses.

    Returns:
        The states before each of the N = ceil(T / S) segments (``[B, Hkv, N, F, V]``,
        ``[B, Hkv, N, F]``, ``[B, N]``), and the state after the last token.

    Raises:
        TypeError: for a wrong dtype. ValueError: for a wrong size or choice.
    """
    context, (k, v) = checks.without_autocast(k, v)
    checks.key_values(k, v)
    checks.segmentation(None, segment)
    checks.choice("rule", rule, RULES)
    checks.feature(feature, k.shape[1], k)
    checks.memory_state(state, k, v, feature)
    checks.padding(padding_mask, k)
    weights(segment_weight, rule, -(-k.shape[2] // segment), k)
    checks.decay(decay, segment_weight, k)
    reason = _declined(k, v, feature, state, decay)
    chosen = backends.resolve("memory_scan", k.device, backend, reason)
    with context:
        if chosen == "fused":
            return _fused_scan(k, v, state, segment, rule, feature, segment_weight, padding_mask)
        return reference.memory_scan(
            k,
            v,
            state,
            segment=segment,
            rule=rule,
            feature=feature,
            segment_weight=segment_weight,
            decay=decay,
            padding_mask=padding_mask,
        )


def weights(segment_weight: Tensor | None, rule: Rule, segments: int, k: Tensor) -> None:
    """Check ``segment_weight [B, N]``."""
    if segment_weight is not None:
        checks.require(rule == "linear", "rule", repr(rule), "'linear' when segment_weight is given")
        checks.parameter("segment_weight", segment_weight, (k.shape[0], segments), k)


def _declined(
    k: Tensor,
    v: Tensor,
    feature: FeatureMap | None,
    state: MemoryState | None,
    decay: Tensor | None = None,
) -> str | None:
    """Why the kernels cannot take this call; None if they can."""
    if state is not None and state.matrix.dtype != torch.float32:
        return f"its kernels take a float32 state, got {state.matrix.dtype}"
    return unsupported(k.dtype, k.shape[3], v.shape[3], feature=feature, decay=decay)


def _learned(feature: FeatureMap | None) -> tuple[Tensor | None, Tensor | None]:
    """Scale and bias of a feature map in float32."""
    scale, bias = (None, None) if feature is None else (feature.scale, feature.bias)
    return None if scale is None else scale.float(), None if bias is None else bias.float()


def _compacted(
    k: Tensor, v: Tensor, padding_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Keys and values with the real tokens first, how many those are where rows differ, and in any case."""
    if padding_mask is None:
        return k, v, None, torch.full((k.shape[0],), k.shape[2], device=k.device)
    order, _, length = compaction(padding_mask)
    return take(k, order), take(v, order), length, length


def _initial(
    state: MemoryState | None, tokens: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Matrix, norm, and counts before each segment and after the last, for segments of ``tokens [B, N]``."""
    matrix, norm, count = (None, None, tokens.new_zeros(tokens.shape[0])) if state is None else state
    if count is None:
        return matrix, norm, None, None
    counts = count[:, None] + tokens.cumsum(1)
    return matrix, norm, counts - tokens, counts[:, -1]


def _guard(counts: Tensor | None, tokens: Tensor) -> Tensor | None:
    """eta ``[B, N]``: no more is taken away than the memory has tokens for."""
    return None if counts is None else (counts / tokens.clamp(min=1)).clamp(max=1)


def _share(tokens: Tensor, scale: str) -> Tensor | None:
    """What an update multiplies with all that it adds, ``[B]``."""
    if scale == "none":
        return None
    divisor = tokens if scale == "1/T" else tokens.sum().expand_as(tokens)
    return divisor.clamp(min=1).float().reciprocal()


def _fused_update(
    k: Tensor,
    v: Tensor,
    state: MemoryState | None,
    rule: Rule,
    feature: FeatureMap | None,
    scale: str,
    padding_mask: Tensor | None,
) -> MemoryState:
    k, v, length, tokens = _compacted(k, v, padding_mask)
    share = _share(tokens, scale)
    guard = None
    # As few operations as can be: each takes as long as a twentieth of a long update.
    if rule != "linear":
        matrix, norm, counts, last = _initial(state, tokens[:, None])
        guard = _guard(counts, tokens[:, None])
    elif state is None:
        matrix, norm, last = None, None, tokens
    else:
        matrix, norm, count = state
        last = None if count is None else count + tokens
    learned = _learned(feature)
    matrix, norm = fused.memory_update(k, v, *learned, matrix, norm, share, length, guard, rule, EPS)
    return MemoryState(matrix, norm, last)


def _fused_scan(
    k: Tensor,
    v: Tensor,
    state: MemoryState | None,
    segment: int,
    rule: Rule,
    feature: FeatureMap | None,
    segment_weight: Tensor | None,
    padding_mask: Tensor | None,
) -> tuple[MemoryState, MemoryState]:
    k, v, length, real = _compacted(k, v, padding_mask)
    starts = torch.arange(0, k.shape[2], segment, device=k.device)
    tokens = (real[:, None] - starts).clamp(0, segment)
    matrix, norm, counts, last = _initial(state, tokens)
    guard = None if rule == "linear" else _guard(counts, tokens)
    weight = None if segment_weight is None else segment_weight.float()
    learned = _learned(feature)
    before, norms, matrix, norm = fused.memory_scan(
        k, v, *learned, matrix, norm, weight, length, guard, segment, rule, EPS
    )
    return MemoryState(before, norms, counts), MemoryState(matrix, norm, last)
