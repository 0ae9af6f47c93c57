"""The norms before each segment by the rule gamma: each depends on all earlier ones, token by token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from newllm.kernels.common import features, novelty, padded
from newllm.kernels.memory_layout import (
    Layout,
    bounds_in_row,
    contiguous,
    load_tokens,
    past_tokens,
    row_bounds,
    unit_stride,
)
from newllm.kernels.tiles import tiles_of


@triton.jit
def _novel_features(
    k, t0, hi, stride, a, c, z, eps, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Of the features of tokens t0 .. t0 + BT - 1, zero from hi on, what ``z`` lacks: ``[BT, BK]``."""
    # [BT, BK]
    x = load_tokens(k, t0, hi, stride, 0, K, BT, BK)
    f = tl.where(tl.arange(0, BT)[:, None] < hi - t0, features(x, a, c), 0.0)
    return f * novelty(f, z, eps, K, BK)[:, None]


@triton.jit(do_not_specialize=["HKV", "T", "N", "S", "P"])
def _memory_scan_gamma_kernel(
    k, past_k, scale, bias, position, length, initial, norms, last, eps,
    k_b, k_h, k_t, HKV, T, N, S, P,
    K: tl.constexpr, PARTIAL: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program carries the norm of one head through all segments."""
    head = tl.program_id(0).to(tl.int64)
    b, h = head // HKV, head % HKV
    phase, end = row_bounds(position, length, b, S, T)
    a = 1.0 if scale is None else tl.load(scale + h).to(tl.float32)
    c = 0.0 if bias is None else tl.load(bias + h).to(tl.float32)
    columns = tl.arange(0, BK)
    z = tl.zeros((BK,), tl.float32)
    if initial is not None:
        # [BK]
        z += tl.load(initial + head * K + columns, columns < K, other=0.0)
    sums = tl.zeros((BT, BK), tl.float32)
    if past_k is not None:
        # Earlier tokens belong to the first segment.
        old = past_k + (head * P + P) * K
        lo, hi = bounds_in_row(0, phase, end, S, PARTIAL)
        hi = tl.minimum(hi, 0)
        for i in tl.range(0, tl.cdiv(hi - lo, BT)):
            sums += _novel_features(old, lo + i * BT, hi, K, a, c, z, eps, K, BT, BK)
    k += b * k_b + h * k_h
    parts = tl.cdiv(S, BT)
    # One loop over the tiles of all segments: the next segment's keys are under way while this one ends.
    for i in tl.range(0, N * parts, num_stages=STAGES):
        j, part = i // parts, i % parts
        lo, hi = bounds_in_row(j, phase, end, S, PARTIAL)
        t0 = tl.maximum(lo, 0) + part * BT
        sums += _novel_features(k, t0, hi, k_t, a, c, z, eps, K, BT, BK)
        if part == parts - 1:
            tl.store(norms + (head * N + j) * K + columns, z, columns < K)
            # Rows are added up where a segment ends, as a tree.
            z += tl.sum(sums, 0)
            sums = tl.zeros((BT, BK), tl.float32)
    tl.store(last + head * K + columns, z, columns < K)


def scan_novel_norms(
    k: Tensor,
    layout: Layout,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The norms before each segment ``[B, HKV, N, K]`` and after the last ``[B, HKV, K]``, float32.

    To ``norm [B, HKV, K]`` (None: zeros) each segment adds ``sum_t gamma_t sigma(k_t)``, gamma_t the share of
    sigma(k_t) that the norm before the segment lacks (ARMT, arXiv 2407.04841).
    """
    batch, heads, tokens, width = k.shape
    count = layout.count(tokens)
    k, scale, bias = unit_stride(k), contiguous(scale), contiguous(bias)
    norms = k.new_empty(batch, heads, count, width, dtype=torch.float32)
    last = k.new_empty(batch, heads, width, dtype=torch.float32)
    past_k, _, past = past_tokens(layout)
    sizes = tiles_of("_memory_scan_gamma_kernel", k.device, width, k.element_size())
    _memory_scan_gamma_kernel[(batch * heads,)](
        k, past_k, scale, bias, layout.position, layout.length, contiguous(norm), norms, last, eps,
        *k.stride()[:3], heads, tokens, count, layout.segment, past,
        K=width, PARTIAL=layout.partial, BK=padded(width),
        **{**sizes, "BT": min(sizes["BT"], padded(layout.segment))},
    )  # fmt: skip
    return norms, last
