"""The delta rule's gradient of its corrections, and through them of the norms before each segment."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from newllm.kernels.common import dot, features, padded
from newllm.kernels.memory_fold import state_precision
from newllm.kernels.memory_fold_backward import correction_weights, curved, whole_curvature
from newllm.kernels.memory_layout import (
    Layout,
    contiguous,
    load_matrix,
    load_tokens,
    memory_tiles,
    past_tokens,
    segment_bounds,
    store_matrix,
    unit_stride,
)
from newllm.kernels.tiles import CHUNK


@triton.jit(do_not_specialize=["HKV", "N"])
def _memory_fold_backward_curvature_kernel(
    gradients, states, curvatures, g_b, g_h, g_j, m_b, m_h, m_j, HKV, N, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program writes BT rows and BT columns of ``-(G M^T + M G^T)`` of one segment."""
    parts: tl.constexpr = (K + BT - 1) // BT
    pid = tl.program_id(0).to(tl.int64)
    part, segment = (pid % (parts * parts)).to(tl.int32), pid // (parts * parts)
    r0, c0 = part // parts * BT, part % parts * BT
    j, head = segment % N, segment // N
    b, h = head // HKV, head % HKV
    gradient = gradients + b * g_b + h * g_h + j * g_j
    state = states + b * m_b + h * m_h + j * m_j
    total = tl.zeros((BT, BT), tl.float32)
    for i in tl.range(0, (V + BV - 1) // BV):
        # [BT, BV]
        rows = load_matrix(gradient, r0, i * BV, K, V, BT, BV).to(tl.float32)
        columns = load_matrix(state, c0, i * BV, K, V, BT, BV).to(tl.float32)
        total = dot(rows, tl.trans(columns), total, PRECISION)
        # [BT, BV]
        rows = load_matrix(state, r0, i * BV, K, V, BT, BV).to(tl.float32)
        columns = load_matrix(gradient, c0, i * BV, K, V, BT, BV).to(tl.float32)
        total = dot(rows, tl.trans(columns), total, PRECISION)
    store_matrix(curvatures + segment * K * K, -total, r0, c0, K, K, BT, BT)


def curvature(gradients: Tensor, states: Tensor, inputs: torch.dtype) -> Tensor:
    """``-(G M^T + M G^T) [B, HKV, N, K, K]``, twice the symmetric part of the gradient of A'.

    ``gradients`` G of the memory after each segment and ``states`` M before it, ``[B, HKV, N, K, V]``;
    ``inputs`` is the dtype of the keys.
    """
    batch, heads, count, width, columns = gradients.shape
    out = gradients.new_empty(batch, heads, count, width, width, dtype=torch.float32)
    tile = min(64, padded(width))
    _memory_fold_backward_curvature_kernel[(batch * heads * count * (-(-width // tile)) ** 2,)](
        gradients, states, out, *gradients.stride()[:3], *states.stride()[:3], heads, count,
        K=width, V=columns, BT=tile, BV=32, PRECISION=state_precision(inputs), num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _norm_of_tokens(
    k, lo, hi, stride, curvature, whole, z, factor, eps, a, c, sums,
    K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the slopes of tokens lo .. hi - 1 times their features to ``sums [BT, BK]``."""
    rows = tl.arange(0, BT)
    for i in tl.range(0, tl.cdiv(hi - lo, BT)):
        t0 = lo + i * BT
        # [BT, BK]
        f = tl.where(
            rows[:, None] < hi - t0, features(load_tokens(k, t0, hi, stride, 0, K, BT, BK), a, c), 0.0
        )
        y = curved(f, k, t0, hi, stride, a, c, curvature, whole, K, BT, BK, BV, PRECISION)
        _, slope = correction_weights(f, y, z, factor, eps)
        sums += f * slope[:, None]
    return sums


@triton.jit(do_not_specialize=["HKV", "T", "N", "S", "P"])
def _memory_fold_backward_norm_kernel(
    k, past_k, scale, bias, position, length, curvatures, norms, factors, out, eps,
    k_b, k_h, k_t, c_b, c_h, c_j, n_b, n_h, n_j, HKV, T, N, S, P,
    K: tl.constexpr, PARTIAL: tl.constexpr, CHUNK: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program sums what CHUNK tokens of one segment give to the gradient of the norm before it."""
    chunks = tl.cdiv(S, CHUNK)
    pid = tl.program_id(0).to(tl.int64)
    segment = pid // chunks
    j, head = segment % N, segment // N
    b, h = head // HKV, head % HKV
    lo, hi = segment_bounds(position, length, b, j, S, T, PARTIAL)
    lo += (pid % chunks).to(tl.int32) * CHUNK
    hi = tl.minimum(hi, lo + CHUNK)
    a = 1.0 if scale is None else tl.load(scale + h).to(tl.float32)
    c = 0.0 if bias is None else tl.load(bias + h).to(tl.float32)
    factor = 1.0 if factors is None else tl.load(factors + b * N + j)
    columns = tl.arange(0, BK)
    # [BK]
    z = tl.load(norms + b * n_b + h * n_h + j * n_j + columns, columns < K, other=0.0)
    curvature = curvatures + b * c_b + h * c_h + j * c_j
    whole = whole_curvature(curvature, K, BK, BV)
    sums = tl.zeros((BT, BK), tl.float32)
    if past_k is not None:
        old = past_k + (head * P + P) * K
        sums = _norm_of_tokens(
            old,
            lo,
            tl.minimum(hi, 0),
            K,
            curvature,
            whole,
            z,
            factor,
            eps,
            a,
            c,
            sums,
            K,
            BT,
            BK,
            BV,
            PRECISION,
        )
        lo = tl.maximum(lo, 0)
    new = k + b * k_b + h * k_h
    sums = _norm_of_tokens(
        new, lo, hi, k_t, curvature, whole, z, factor, eps, a, c, sums, K, BT, BK, BV, PRECISION
    )
    tl.store(out + pid * K + columns, tl.sum(sums, 0), columns < K)


def norm_gradients(
    k: Tensor,
    curvatures: Tensor,
    norms: Tensor,
    layout: Layout,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    factor: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Gradient ``[B, HKV, N, K]`` that ``fold_correction`` hands to the norms before each segment."""
    batch, heads, tokens, width = k.shape
    count, k = layout.count(tokens), unit_stride(k)
    scale, bias = contiguous(scale), contiguous(bias)
    past_k, _, past = past_tokens(layout)
    chunks = -(-layout.segment // CHUNK)
    out = k.new_empty(batch, heads, count, chunks, width, dtype=torch.float32)
    sizes = memory_tiles("_memory_fold_backward_norm_kernel", k.device, k.dtype, width=width, columns=width)
    _memory_fold_backward_norm_kernel[(batch * heads * count * chunks,)](
        k, past_k, scale, bias, layout.position, layout.length, curvatures, norms, contiguous(factor), out,
        eps, *k.stride()[:3], *curvatures.stride()[:3], *norms.stride()[:3],
        heads, tokens, count, layout.segment, past,
        K=width, PARTIAL=layout.partial, CHUNK=CHUNK, BK=padded(width),
        PRECISION=state_precision(k.dtype), **sizes,
    )  # fmt: skip
    return out.sum(3)
