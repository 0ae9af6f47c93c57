"""The public operator of the Infini-attention layer: whole sequences and chunks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from newllm import backend as backends
from newllm.ops import attention_fused as fused, checks
from newllm.ops.memory import RULES, weights
from newllm.ops.support import unsupported
from newllm.reference import infini as reference
from newllm.types import Detach, FeatureMap, GateKind, InfiniState, Rule

# How many segments back gradients flow through the memory.
REACH: dict[str, int | None] = {"none": None, "segment": 1, "full": 0}


def infini_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    *,
    window: int | None,
    segment: int,
    gate: GateKind = "sigmoid",
    rope: tuple[Tensor, Tensor] | None = None,
    state: InfiniState | None = None,
    rule: Rule = "linear",
    feature: FeatureMap | None = None,
    eps: float = 1e-6,
    detach: Detach = "none",
    bptt_segments: int | None = None,
    segment_weight: Tensor | None = None,
    decay: Tensor | None = None,
    padding_mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, InfiniState]:
    """Sliding-window attention beside a memory of all earlier segments (arXiv 2404.07143).

    ``out = A_dot + g (A_mem - A_dot)``: A_dot from the last ``window`` keys after RoPE, A_mem from the
    memory before the query's segment, without RoPE. Any split of a sequence into calls gives the same
    result as one call.

    Args:
        q: ``[B, H, T, K]``. k: ``[B, Hkv, T, K]``. v: ``[B, Hkv, T, V]``; raw projections.
        beta: gate parameter ``[H]``; None switches the memory off.
        window: keys a query sees, W; None attends within the query's segment only.
        segment: tokens per segment, S <= W; a segment enters the memory when it is complete.
        gate: ``sigmoid`` (the paper) or ``tanh`` (zero is exactly shut, with a live gradient).
        rope: (cos, sin), ``[N, K]`` or ``[B, N, K]``; the last T rows belong to the new tokens, the rows
            before to the tokens just before. N = T without a state, N >= T + R - 1 with one.
        state: the stream so far; None starts one. Ring length R is W, or S without a window.
        rule: ``linear``, ``delta`` or ``gamma``, see ``memory_update``.
        feature: feature map of the memory; None is the paper's ELU + 1.
        eps: least denominator of the retrieval.
        detach: ``segment`` lets gradients reach one segment back through memory, ``full`` none.
        bptt_segments: the same as a number of segments; excludes ``detach``. Both count within this
            call: detach the state between calls to cut there.
        segment_weight: ``[B, N]`` factors of what each segment adds (linear rule); column j is the j-th
            segment that the call touches, N = ceil(T / S), or ceil((T + S - 1) / S) with a state.
        decay: ``[Hkv]`` factors, from 0 to 1, of the memory before each segment is written; None keeps all.
        padding_mask: bool ``[B, T]``, True = real. A row's result is that of the row without its
            padding; zeros stand at the padding in the output.
        backend: ``reference`` or ``fused``; None chooses.

    Returns:
        Output ``[B, H, T, V]`` in q's dtype, and the state after the row's last real token.

    Raises:
        TypeError: for a wrong dtype. ValueError: for a wrong size or choice.
    """
    context, (q, k, v) = checks.without_autocast(q, k, v)
    check_layer(q, k, v, beta, state, window, segment, gate, rope, rule, feature)
    checks.denominator(eps)
    checks.choice("detach", detach, REACH)
    if bptt_segments is not None:
        checks.require(detach == "none", "detach", repr(detach), "'none' when bptt_segments is given")
        checks.require(bptt_segments >= 0, "bptt_segments", bptt_segments, "0 or more")
    checks.padding(padding_mask, k)
    weights(segment_weight, rule, reference.touched_segments(k.shape[2], segment, state is not None), k)
    checks.decay(decay, segment_weight, k)
    reason = unsupported(q.dtype, q.shape[3], v.shape[3], feature=feature, decay=decay)
    chosen = backends.resolve("infini_attention", q.device, backend, reason)
    runs: dict[str, Callable[..., tuple[Tensor, InfiniState]]] = {
        "reference": partial(reference.infini_attention, decay=decay),
        "fused": fused.infini_attention,
    }
    with context:
        return runs[chosen](
            q,
            k,
            v,
            beta,
            window=window,
            segment=segment,
            gate=gate,
            rope=rope,
            state=state,
            rule=rule,
            feature=feature,
            eps=eps,
            bptt_segments=REACH[detach] if bptt_segments is None else bptt_segments,
            segment_weight=segment_weight,
            padding_mask=padding_mask,
        )


def check_layer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    state: InfiniState | None,
    window: int | None,
    segment: int,
    gate: str,
    rope: tuple[Tensor, Tensor] | None,
    rule: str,
    feature: FeatureMap | None,
) -> None:
    """What a call of the layer has to satisfy, for whole sequences and for one token."""
    checks.attention_inputs(q, k, v)
    checks.segmentation(window, segment)
    checks.gate_and_beta(beta, gate, q)
    checks.choice("rule", rule, RULES)
    checks.feature(feature, k.shape[1], k)
    ring = window or segment
    checks.infini_state(state, k, v, ring=ring, has_memory=beta is not None, features=feature)
    checks.rope(rope, k, None if state is None else ring - 1)
