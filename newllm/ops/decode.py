"""The public operator of the Infini-attention layer for one token, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from newllm import backend as backends
from newllm.ops import checks
from newllm.ops.infini import check_layer
from newllm.ops.infini_decode_fused import declined, infini_decode as fused
from newllm.reference import decode as reference
from newllm.types import FeatureMap, GateKind, InfiniState, Rule


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
    rope: tuple[Tensor, Tensor] | None = None,
    rule: Rule = "linear",
    feature: FeatureMap | None = None,
    eps: float = 1e-6,
    decay: Tensor | None = None,
    active: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``infini_attention`` for one new token per row, **writing into** ``state``; inference only.

    Args:
        q: ``[B, H, 1, K]``. k: ``[B, Hkv, 1, K]``. v: ``[B, Hkv, 1, V]``.
        state: the stream so far, updated in place; its addresses never change.
        rope: (cos, sin) of at least R rows, the last of which belongs to the new token.
        active: bool ``[B]``; rows where it is False are left alone and give zeros.
        beta, window, segment, gate, rule, feature, eps, decay, backend: as in ``infini_attention``.

    Returns:
        Output ``[B, H, 1, V]`` in q's dtype.

    Raises:
        RuntimeError: when gradients are enabled and an input requires one.
        TypeError: for a wrong dtype. ValueError: for a wrong size or choice.
    """
    context, (q, k, v) = checks.without_autocast(q, k, v)
    checks.kind("state", state, InfiniState, "an InfiniState")
    check_layer(q, k, v, beta, state, window, segment, gate, rope, rule, feature)
    checks.require(q.shape[2] == 1, "q's tokens", q.shape[2], "1")
    if active is not None:
        checks.boolean("active", active, (k.shape[0],), k)
    learned = (None, None) if feature is None else (feature.scale, feature.bias)
    checks.decay(decay, None, k)
    checks.denominator(eps)
    inputs = (q, k, v, beta, *state, *(feature or ()), decay)
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        raise RuntimeError("infini_decode writes into its state and has no gradient: use torch.no_grad()")
    chosen = backends.resolve("infini_decode", q.device, backend, declined(q, v, state, feature, decay))
    if chosen == "fused":
        cos, sin = (None, None) if rope is None else rope
        return fused(
            q,
            k,
            v,
            beta,
            *state[:5],
            cos,
            sin,
            *learned,
            active,
            local=window is None,
            segment=segment,
            tanh=gate == "tanh",
            rule=rule,
            eps=eps,
        )
    with context:
        return reference.infini_decode(
            q,
            k,
            v,
            beta,
            state,
            window=window,
            segment=segment,
            gate=gate,
            rope=rope,
            rule=rule,
            feature=feature,
            eps=eps,
            decay=decay,
            active=active,
        )
