"""Gradients of what segments add to the memory: to keys, values, scale and bias."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from newllm.kernels.common import (
    cast,
    dot,
    features,
    features_slope,
    fusion,
    memory_dtype,
    novelty,
    padded,
    product_types,
)
from newllm.kernels.memory_fold import state_precision
from newllm.kernels.memory_layout import (
    Layout,
    contiguous,
    load_matrix,
    load_tokens,
    memory_tiles,
    past_tokens,
    segment_bounds,
    store_tokens,
    unit_stride,
)
from newllm.kernels.tiles import CHUNK


class Gradients(NamedTuple):
    """Of the memory after each segment, ``matrix [B, HKV, N, K, V]``, ``norm [B, HKV, N, K]``, and at first.

    ``curvature [B, HKV, N, K, K]`` is the delta rule's: ``-(G M^T + M G^T)``, with G this gradient and M
    the memory before the segment.
    """

    matrix: Tensor
    norm: Tensor
    initial_matrix: Tensor
    initial_norm: Tensor
    curvature: Tensor | None = None


class TokenGradients(NamedTuple):
    """Of keys, values, earlier keys and values, scale and bias; None for what is not there."""

    k: Tensor
    v: Tensor
    past_k: Tensor | None
    past_v: Tensor | None
    scale: Tensor | None
    bias: Tensor | None


@triton.jit
def fold_feature_gradient(v, gradient, df, PRECISION: tl.constexpr):
    """``df + v G^T`` for values ``v [BT, BV]`` and the memory's gradient ``G [BK, BV]``: ``[BT, BK]``."""
    return dot(v, tl.trans(gradient), df, PRECISION)


@triton.jit
def fold_value_gradient(f, gradient, PRECISION: tl.constexpr):
    """``f G`` for features ``f [BT, BK]`` and the memory's gradient ``G [BK, BV]``: ``[BT, BV]``."""
    return dot(cast(f, gradient.dtype), gradient, None, PRECISION)


@triton.jit
def correction_weights(f, y, z, factor, eps):
    """1 / d, d = max(f z, eps), and the gradient of f z, each ``[BT]``; ``y = f curvature [BT, BK]``."""
    weight = tl.sum(f * z[None, :], 1)
    inverse = 1 / tl.maximum(weight, eps)
    # Each pair of tokens stands twice in the symmetric curvature.
    slope = tl.where(weight >= eps, -0.5 * factor * tl.sum(f * y, 1) * inverse * inverse, 0.0)
    return inverse, slope


@triton.jit
def correction_feature_gradient(f, y, z, factor, eps):
    """What the delta rule adds to the gradient of features ``f [BT, BK]``; see ``correction_weights``."""
    inverse, slope = correction_weights(f, y, z, factor, eps)
    return y * (inverse * factor)[:, None] + slope[:, None] * z[None, :]


@triton.jit
def curved(
    f, k, t0, hi, stride, a, c, curvature, whole,
    K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``f curvature [BT, BK]``; ``whole`` is all of it where a tile of BC rows holds it."""
    y = tl.zeros((BT, BK), tl.float32)
    if BC >= BK:
        y = dot(f, whole, y, PRECISION)
    else:
        for i in tl.range(0, (K + BC - 1) // BC):
            # [BT, BC]
            part = features(load_tokens(k, t0, hi, stride, i * BC, K, BT, BC), a, c)
            # [BC, BK]
            rows = load_matrix(curvature, i * BC, 0, K, K, BC, BK)
            y = dot(part, rows, y, PRECISION)
    return y


@triton.jit
def whole_curvature(curvature, K: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr):
    """All of ``curvature [K, K]`` where it fits into a tile of BC rows, otherwise a stand-in."""
    if curvature is not None and BC >= BK:
        # [BK, BK]
        whole = load_matrix(curvature, 0, 0, K, K, BK, BK)
    else:
        whole = tl.zeros((16, 16), tl.float32)
    return whole


@triton.jit
def _backward_tokens(
    k, v, dk, dv, lo, hi, end, k_t, v_t, gradient, curvature, first, whole, gz, z, w, factor, eps, a, c,
    dscale, dbias, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, STATES: tl.constexpr, ADD: tl.constexpr,
    NOVEL: tl.constexpr,
):  # fmt: skip
    """Write the gradients of tokens lo .. end - 1, zeros from hi on; add to those of scale, bias ``[BT]``."""
    parts: tl.constexpr = (V + BV - 1) // BV
    rows = tl.arange(0, BT)
    for i in tl.range(0, tl.cdiv(end - lo, BT)):
        t0 = lo + i * BT
        # [BT, BK]
        x = load_tokens(k, t0, hi, k_t, 0, K, BT, BK)
        f = tl.where(rows[:, None] < tl.minimum(hi, end) - t0, features(x, a, c), 0.0)
        df = tl.zeros((BT, BK), tl.float32) + gz[None, :]
        if NOVEL:
            df *= novelty(f, z, eps, K, BK)[:, None]
        g = first
        for part in tl.range(0, parts):
            if parts > 1:
                # [BK, BV]
                g = _weighed(gradient, part * BV, w, K, V, BK, BV, DTYPE)
            # [BT, BV]
            values = load_tokens(v, t0, hi, v_t, part * BV, V, BT, BV).to(DTYPE)
            df = fold_feature_gradient(values, g, df, PRECISION)
            _deposit(dv, fold_value_gradient(f, g, PRECISION), t0, end, part * BV, V, BT, BV, ADD)
        if curvature is not None:
            y = curved(f, k, t0, hi, k_t, a, c, curvature, whole, K, BT, BK, BV, STATES)
            df += correction_feature_gradient(f, y, z, factor, eps)
        # Where nothing is written, or another program's tokens begin, features and so slopes are zero.
        slope = df * features_slope(f)
        _deposit(dk, slope * a, t0, end, 0, K, BT, BK, ADD)
        dscale += tl.sum(slope * x.to(tl.float32), 1)
        dbias += tl.sum(slope, 1)
    return dscale, dbias


@triton.jit
def _weighed(
    gradient, c0, w, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """``w`` times columns from c0 on of the memory's gradient ``[K, V]``, ``[BK, BV]``."""
    # Multiplied in float32: the interpreter's own products of bfloat16 are wrong.
    return cast(load_matrix(gradient, 0, c0, K, V, BK, BV).to(tl.float32) * w, DTYPE)


@triton.jit
def _deposit(base, x, t0, hi, c0, WIDTH: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, ADD: tl.constexpr):
    """Store ``x [BT, BC]`` in contiguous rows, or add it to what is there."""
    if ADD:
        x += load_tokens(base, t0, hi, WIDTH, c0, WIDTH, BT, BC).to(tl.float32)
    store_tokens(base, x, t0, hi, WIDTH, c0, WIDTH, BT, BC)


@triton.jit(do_not_specialize=["HKV", "T", "N", "S", "P", "ROWS", "FIRST", "PAST_ROWS"])
def _memory_fold_backward_kernel(
    k, v, past_k, past_v, scale, bias, position, length, gradients, norm_gradients, weight, curvatures, norms,
    factors, dk, dv, dpast_k, dpast_v, dscale, dbias, eps,
    k_b, k_h, k_t, v_b, v_h, v_t, n_b, n_h, n_j, g_b, g_h, g_j, c_b, c_h, c_j, m_b, m_h, m_j,
    HKV, T, N, S, P, ROWS, FIRST, PAST_ROWS,
    K: tl.constexpr, V: tl.constexpr, PARTIAL: tl.constexpr, CHUNK: tl.constexpr, ADD: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, STATES: tl.constexpr, NOVEL: tl.constexpr,
):  # fmt: skip
    """One program writes the gradients of CHUNK tokens of one segment of one head."""
    chunks = tl.cdiv(S, CHUNK)
    pid = tl.program_id(0).to(tl.int64)
    segment = pid // chunks
    j, head = segment % N, segment // N
    b, h = head // HKV, head % HKV
    lo, hi = segment_bounds(position, length, b, j, S, T, PARTIAL)
    end = tl.minimum(lo + S, T)
    lo += (pid % chunks).to(tl.int32) * CHUNK
    end = tl.minimum(end, lo + CHUNK)
    a = 1.0 if scale is None else tl.load(scale + h).to(tl.float32)
    c = 0.0 if bias is None else tl.load(bias + h).to(tl.float32)
    w = 1.0 if weight is None else tl.load(weight + b * N + j).to(tl.float32)
    factor = 1.0 if factors is None else tl.load(factors + b * N + j)
    columns = tl.arange(0, BK)
    # [BK]
    gz = tl.load(norm_gradients + b * n_b + h * n_h + j * n_j + columns, columns < K, other=0.0) * w
    z = gz
    curvature = curvatures
    if curvatures is not None:
        curvature = curvatures + b * c_b + h * c_h + j * c_j
        # [BK]
        z = tl.load(norms + b * m_b + h * m_h + j * m_j + columns, columns < K, other=0.0)
    gradient = gradients + b * g_b + h * g_h + j * g_j
    # [BK, BV]
    first = _weighed(gradient, 0, w, K, V, BK, BV, DTYPE)
    whole = whole_curvature(curvature, K, BK, BV)
    scales, biases = tl.zeros((BT,), tl.float32), tl.zeros((BT,), tl.float32)
    if past_k is not None:
        row, place = head * P + P, head * PAST_ROWS + P
        scales, biases = _backward_tokens(
            past_k + row * K, past_v + row * V, dpast_k + place * K, dpast_v + place * V,
            lo, tl.minimum(hi, 0), tl.minimum(end, 0), K, V, gradient, curvature,
            first, whole, gz, z, w, factor, eps, a, c,
            scales, biases, K, V, BT, BK, BV, DTYPE, PRECISION, STATES, ADD, NOVEL,
        )  # fmt: skip
        lo = tl.maximum(lo, 0)
    place = head * ROWS + FIRST
    scales, biases = _backward_tokens(
        k + b * k_b + h * k_h, v + b * v_b + h * v_h, dk + place * K, dv + place * V, lo, hi,
        end, k_t, v_t, gradient, curvature, first, whole, gz, z, w, factor, eps, a, c,
        scales, biases, K, V, BT, BK, BV, DTYPE, PRECISION, STATES, ADD, NOVEL,
    )  # fmt: skip
    if dscale is not None:
        tl.store(dscale + pid, tl.sum(scales, 0))
    if dbias is not None:
        tl.store(dbias + pid, tl.sum(biases, 0))


def fold_backward(
    k: Tensor,
    v: Tensor,
    gradients: Gradients,
    layout: Layout,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    norms: Tensor | None = None,
    factor: Tensor | None = None,
    eps: float = 1e-6,
    novel: bool = False,
    onto: tuple[Tensor, Tensor] | None = None,
) -> TokenGradients:
    """Gradients of all that ``fold`` and, given a curvature, ``fold_correction`` read; zeros if not written.

    ``weight [B, N]`` multiplied what the segments added; ``norms``, ``factor`` and ``eps`` are those of
    ``fold_correction``; ``novel``: the sums of sigma(K) were of what ``norms`` lacked. Matrices, norms and
    their gradients may be expanded along the segments. ``onto`` are contiguous gradients
    ``[B, HKV, P + T, ...]`` of all keys and values, to which these are added.
    """
    batch, heads, tokens, width = k.shape
    columns, count = v.shape[3], layout.count(tokens)
    k, v, scale, bias = unit_stride(k), unit_stride(v), contiguous(scale), contiguous(bias)
    past_k, past_v, past = past_tokens(layout)
    if onto is None:
        dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
        dpast_k, dpast_v = (None if x is None else torch.zeros_like(x) for x in (past_k, past_v))
        rows, first, past_rows = tokens, 0, past
    else:
        (dk, dv), (dpast_k, dpast_v) = onto, onto
        rows = past_rows = onto[0].shape[2]
        first = rows - tokens
    chunks = count * -(-layout.segment // CHUNK)
    dscale, dbias = (
        None if x is None else k.new_empty(batch, heads, chunks, dtype=torch.float32) for x in (scale, bias)
    )
    sizes = memory_tiles(
        "_memory_fold_backward_kernel",
        k.device,
        memory_dtype(k.dtype),
        width=max(width, columns),
        columns=columns,
    )
    # Without a curvature, pointers and strides that are not read.
    curvature = gradients.matrix if gradients.curvature is None else gradients.curvature
    z = gradients.norm if norms is None else norms
    _memory_fold_backward_kernel[(batch * heads * chunks,)](
        k, v, past_k, past_v, scale, bias, layout.position, layout.length, gradients.matrix, gradients.norm,
        contiguous(weight), gradients.curvature, z, contiguous(factor), dk, dv, dpast_k, dpast_v,
        dscale, dbias, eps, *k.stride()[:3], *v.stride()[:3], *gradients.norm.stride()[:3],
        *gradients.matrix.stride()[:3], *curvature.stride()[:3], *z.stride()[:3],
        heads, tokens, count, layout.segment, past, rows, first, past_rows,
        K=width, V=columns, PARTIAL=layout.partial, CHUNK=CHUNK, ADD=onto is not None, BK=padded(width),
        **product_types(k.dtype), STATES=state_precision(k.dtype), NOVEL=novel, **fusion(width),
        **sizes,
    )  # fmt: skip
    dscale, dbias = (None if x is None else x.sum((0, 2)) for x in (dscale, dbias))
    return TokenGradients(dk, dv, dpast_k, dpast_v, dscale, dbias)
