"""Public operators of the associative memory."""

from __future__ import annotations

from torch import Tensor

from newllm import backend as backends
from newllm.ops import checks
from newllm.reference import memory as reference
from newllm.reference.features import feature_width
from newllm.types import FeatureMap, MemoryState, Rule

RULES = ("linear", "delta", "gamma")
SCALES = ("none", "1/T", "1/(B*T)")


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
    backends.resolve("memory_update", k.device, backend)
    with context:
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
    checks.require(
        state.matrix.ndim == 4, "state.matrix", list(state.matrix.shape), "of shape [B, Hkv, F, V]"
    )
    heads = state.matrix.shape[1]
    checks.require(q.shape[1] % heads == 0, "q's heads", q.shape[1], f"a multiple of the memory's {heads}")
    checks.feature(feature, heads, q)
    features = feature_width(feature, q.shape[3])
    checks.memory(state.matrix, state.norm, (q.shape[0], heads, features, state.matrix.shape[3]), q)
    backends.resolve("memory_retrieve", q.device, backend)
    with context:
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
    backends.resolve("memory_scan", k.device, backend)
    with context:
        return reference.memory_scan(
            k,
            v,
            state,
            segment=segment,
            rule=rule,
            feature=feature,
            segment_weight=segment_weight,
            padding_mask=padding_mask,
        )


def weights(segment_weight: Tensor | None, rule: Rule, segments: int, k: Tensor) -> None:
    """Check ``segment_weight [B, N]``."""
    if segment_weight is not None:
        checks.require(rule == "linear", "rule", repr(rule), "'linear' when segment_weight is given")
        checks.parameter("segment_weight", segment_weight, (k.shape[0], segments), k)
