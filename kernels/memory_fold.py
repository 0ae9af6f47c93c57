"""What segments add to the memory: sums over their tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from newllm.kernels.common import cast, dot, features, novelty, padded, precision, start_next_kernel
from newllm.kernels.memory_layout import (
    Layout,
    contiguous,
    load_tokens,
    memory_tiles,
    past_tokens,
    segment_bounds,
    store_matrix,
    unit_stride,
)
from newllm.kernels.tiles import dependent_launch


def state_precision(dtype: torch.dtype) -> str:
    """The precision of products of two float32 states, for inputs of ``dtype``."""
    return "tf32" if dtype == torch.bfloat16 else precision(dtype)


@triton.jit
def _fold_tokens(
    k, v, lo, hi, stride_k, stride_v, v0, a, c, z, eps, added, sums,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Add tokens lo .. hi - 1 to ``added [BK, BV]``, and their features to ``sums [BT, BK]``.

    Of the features only what the norm ``z [BK]`` lacks, unless it is None.
    """
    rows = tl.arange(0, BT)
    for i in tl.range(0, tl.cdiv(hi - lo, BT)):
        t0 = lo + i * BT
        # [BT, BK]
        x = load_tokens(k, t0, hi, stride_k, 0, K, BT, BK)
        # [BT, BV]
        values = load_tokens(v, t0, hi, stride_v, v0, V, BT, BV)
        f = tl.where(rows[:, None] < hi - t0, features(x, a, c), 0.0)
        # Sums side by side, added up as a tree afterwards: as exact as the reference's, no reduction here.
        sums += f if z is None else f * novelty(f, z, eps, K, BK)[:, None]
        added = dot(tl.trans(cast(f, values.dtype)), values, added, PRECISION="ieee")
    return added, sums


@triton.jit(do_not_specialize=["HKV", "T", "N", "S", "P"])
def _memory_fold_forward_kernel(
    k, v, past_k, past_v, scale, bias, position, length, norms, added, added_norm, eps,
    k_b, k_h, k_t, v_b, v_h, v_t, n_b, n_h, n_j, HKV, T, N, S, P,
    K: tl.constexpr, V: tl.constexpr, PARTIAL: tl.constexpr, PDL: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One program folds one segment of one head into ``[K, BV]`` columns of what it adds."""
    start_next_kernel(PDL)
    parts: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0).to(tl.int64)
    v0 = (pid % parts).to(tl.int32) * BV
    segment = pid // parts
    j, head = segment % N, segment // N
    b, h = head // HKV, head % HKV
    lo, hi = segment_bounds(position, length, b, j, S, T, PARTIAL)
    a = 1.0 if scale is None else tl.load(scale + h).to(tl.float32)
    c = 0.0 if bias is None else tl.load(bias + h).to(tl.float32)
    columns = tl.arange(0, BK)
    z = norms
    if norms is not None:
        # [BK]
        z = tl.load(norms + b * n_b + h * n_h + j * n_j + columns, columns < K, other=0.0)
    matrix = tl.zeros((BK, BV), tl.float32)
    sums = tl.zeros((BT, BK), tl.float32)
    if past_k is not None:
        old_k, old_v = past_k + (head * P + P) * K, past_v + (head * P + P) * V
        matrix, sums = _fold_tokens(
            old_k, old_v, lo, tl.minimum(hi, 0), K, V, v0, a, c, z, eps, matrix, sums, K, V, BT, BK, BV
        )
        lo = tl.maximum(lo, 0)
    new_k, new_v = k + b * k_b + h * k_h, v + b * v_b + h * v_h
    matrix, sums = _fold_tokens(
        new_k, new_v, lo, hi, k_t, v_t, v0, a, c, z, eps, matrix, sums, K, V, BT, BK, BV
    )
    store_matrix(added + segment * K * V, matrix, 0, v0, K, V, BK, BV)
    if v0 == 0:
        tl.store(added_norm + segment * K + columns, tl.sum(sums, 0), columns < K)


def fold(
    k: Tensor,
    v: Tensor,
    layout: Layout,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norms: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """What each segment adds: ``sigma(K)^T V [B, HKV, N, K, V]`` and the sum of sigma(K) ``[B, HKV, N, K]``.

    ``k [B, HKV, T, K]``, ``v [B, HKV, T, V]``; ``scale``, ``bias`` ``[HKV]``. Given the ``norms`` before each
    segment, ``[B, HKV, N, K]`` (any strides but the last), the sum is of what they lack. Float32, and zeros
    for segments that are not written.
    """
    batch, heads, tokens, width = k.shape
    columns, count = v.shape[3], layout.count(tokens)
    k, v, scale, bias = unit_stride(k), unit_stride(v), contiguous(scale), contiguous(bias)
    added = k.new_empty(batch, heads, count, width, columns, dtype=torch.float32)
    norm = k.new_empty(batch, heads, count, width, dtype=torch.float32)
    sizes = memory_tiles(
        "_memory_fold_forward_kernel", k.device, k.dtype, width=max(width, columns), columns=columns
    )
    grid = (batch * heads * count * -(-columns // sizes["BV"]),)
    past_k, past_v, past = past_tokens(layout)
    _memory_fold_forward_kernel[grid](
        k, v, past_k, past_v, scale, bias, layout.position, layout.length, norms, added, norm, eps,
        *k.stride()[:3], *v.stride()[:3], *((0, 0, 0) if norms is None else norms.stride()[:3]),
        heads, tokens, count, layout.segment, past,
        K=width, V=columns, PARTIAL=layout.partial, PDL=dependent_launch(k.device)["PDL"],
        BK=padded(width), **sizes,
    )  # fmt: skip
    return added, norm


@triton.jit
def _correct_tokens(
    k, lo, hi, stride, v0, a, c, z, eps, matrix,
    K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add ``sigma(k)^T sigma(k) / d`` of tokens lo .. hi - 1 to ``matrix [BK, BV]``."""
    rows = tl.arange(0, BT)
    for i in tl.range(0, tl.cdiv(hi - lo, BT)):
        t0 = lo + i * BT
        # [BT, BK]
        f = features(load_tokens(k, t0, hi, stride, 0, K, BT, BK), a, c)
        # Each factor takes the root of 1 / d, so that the sum is symmetric with eigenvalues of at least 0.
        root = tl.sqrt(tl.maximum(tl.sum(f * z[None, :], 1), eps))
        root = tl.where(rows < hi - t0, 1 / root, 0.0)
        left = f * root[:, None]
        if BV == BK:
            right = left
        else:
            # [BT, BV]
            part = load_tokens(k, t0, hi, stride, v0, K, BT, BV)
            right = features(part, a, c) * root[:, None]
        matrix = dot(tl.trans(left), right, matrix, PRECISION)
    return matrix


@triton.jit(do_not_specialize=["HKV", "T", "N", "S", "P"])
def _memory_fold_forward_correction_kernel(
    k, past_k, scale, bias, position, length, norms, factor, corrections, eps,
    k_b, k_h, k_t, n_b, n_h, n_j, HKV, T, N, S, P,
    K: tl.constexpr, PARTIAL: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program sums ``[K, BV]`` columns of one segment's correction."""
    parts: tl.constexpr = (K + BV - 1) // BV
    pid = tl.program_id(0).to(tl.int64)
    v0 = (pid % parts).to(tl.int32) * BV
    segment = pid // parts
    j, head = segment % N, segment // N
    b, h = head // HKV, head % HKV
    lo, hi = segment_bounds(position, length, b, j, S, T, PARTIAL)
    a = 1.0 if scale is None else tl.load(scale + h).to(tl.float32)
    c = 0.0 if bias is None else tl.load(bias + h).to(tl.float32)
    columns = tl.arange(0, BK)
    # [BK]
    z = tl.load(norms + b * n_b + h * n_h + j * n_j + columns, columns < K, other=0.0)
    matrix = tl.zeros((BK, BV), tl.float32)
    if past_k is not None:
        old = past_k + (head * P + P) * K
        matrix = _correct_tokens(
            old, lo, tl.minimum(hi, 0), K, v0, a, c, z, eps, matrix, K, BT, BK, BV, PRECISION
        )
        lo = tl.maximum(lo, 0)
    new = k + b * k_b + h * k_h
    matrix = _correct_tokens(new, lo, hi, k_t, v0, a, c, z, eps, matrix, K, BT, BK, BV, PRECISION)
    if factor is not None:
        matrix *= tl.load(factor + b * N + j)
    store_matrix(corrections + segment * K * K, matrix, 0, v0, K, K, BK, BV)


def fold_correction(
    k: Tensor,
    norms: Tensor,
    layout: Layout,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    factor: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """What the delta rule takes away: A' of ``M <- M - A' M + sigma(K)^T V``, ``[B, HKV, N, K, K]`` float32.

    ``A' = factor sigma(K)^T D^-1 sigma(K)``, ``D = max(sigma(K) z, eps)``, with z the norm before the
    segment, ``norms [B, HKV, N, K]`` (any strides but the last), and the guard ``factor [B, N]``.
    """
    batch, heads, tokens, width = k.shape
    count = layout.count(tokens)
    k, scale, bias = unit_stride(k), contiguous(scale), contiguous(bias)
    out = k.new_empty(batch, heads, count, width, width, dtype=torch.float32)
    sizes = memory_tiles(
        "_memory_fold_forward_correction_kernel", k.device, k.dtype, width=width, columns=width
    )
    past_k, _, past = past_tokens(layout)
    _memory_fold_forward_correction_kernel[(batch * heads * count * -(-width // sizes["BV"]),)](
        k, past_k, scale, bias, layout.position, layout.length, norms, contiguous(factor), out, eps,
        *k.stride()[:3], *norms.stride()[:3], heads, tokens, count, layout.segment, past,
        K=width, PARTIAL=layout.partial, BK=padded(width),
        PRECISION=state_precision(k.dtype), **sizes,
    )  # fmt: skip
    return out
