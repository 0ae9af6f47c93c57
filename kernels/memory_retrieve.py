"""Reading queries from the memory, and the gradients of what was read."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from newllm.kernels.common import cast, dot, features, features_slope, memory_dtype, padded, product_types
from newllm.kernels.memory_layout import (
    contiguous,
    even_chunk,
    load_matrix,
    load_tokens,
    memory_tiles,
    store_matrix,
    store_tokens,
    unit_stride,
)
from newllm.kernels.tiles import READERS


class Retrieved(NamedTuple):
    """Gradients of queries, memory, scale and bias; None for what is not there."""

    q: Tensor
    matrix: Tensor
    norm: Tensor
    scale: Tensor | None
    bias: Tensor | None


@triton.jit
def _chunk(T, H, HKV, CHUNK):
    """A program's query head (b H + h), key/value head (b HKV + h'), h', and its tokens."""
    chunks = tl.cdiv(T, CHUNK)
    pid = tl.program_id(0).to(tl.int64)
    head = pid // chunks
    kv = head % H // (H // HKV)
    lo = (pid % chunks).to(tl.int32) * CHUNK
    return head, head // H * HKV + kv, kv, lo, tl.minimum(lo + CHUNK, T)


@triton.jit(do_not_specialize=["H", "HKV", "T", "CHUNK"])
def _memory_retrieve_forward_kernel(
    q, matrix, norm, scale, bias, out, eps, q_b, q_h, q_t, H, HKV, T, CHUNK,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program reads CHUNK queries of one head."""
    parts: tl.constexpr = (V + BV - 1) // BV
    head, memory, kv, lo, hi = _chunk(T, H, HKV, CHUNK)
    a = 1.0 if scale is None else tl.load(scale + kv).to(tl.float32)
    c = 0.0 if bias is None else tl.load(bias + kv).to(tl.float32)
    columns = tl.arange(0, BK)
    q += head // H * q_b + head % H * q_h
    # [BK]
    z = tl.load(norm + memory * K + columns, columns < K, other=0.0)
    # [BK, BV]
    m = cast(load_matrix(matrix + memory * K * V, 0, 0, K, V, BK, BV), DTYPE)
    for i in tl.range(0, tl.cdiv(hi - lo, BT)):
        t0 = lo + i * BT
        # [BT, BK]
        f = features(load_tokens(q, t0, hi, q_t, 0, K, BT, BK), a, c)
        inverse = 1 / tl.maximum(tl.sum(f * z[None, :], 1), eps)
        for part in tl.range(0, parts):
            if parts > 1:
                # [BK, BV]
                m = cast(load_matrix(matrix + memory * K * V, 0, part * BV, K, V, BK, BV), DTYPE)
            read = dot(cast(f, DTYPE), m, None, PRECISION) * inverse[:, None]
            store_tokens(out + head * T * V, read, t0, hi, V, part * BV, V, BT, BV)


def retrieve(
    q: Tensor,
    matrix: Tensor,
    norm: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """``sigma(q) M / max(sigma(q) z, eps)`` for ``q [B, H, T, K]``: ``[B, H, T, V]`` in q's dtype.

    ``matrix [B, HKV, K, V]`` and ``norm [B, HKV, K]`` are float32, ``scale`` and ``bias`` ``[HKV]``.
    """
    batch, heads, tokens, width = q.shape
    columns, q = matrix.shape[3], unit_stride(q)
    out = q.new_empty(batch, heads, tokens, columns)
    chunk = even_chunk(tokens, batch * heads, READERS)
    sizes = memory_tiles(
        "_memory_retrieve_forward_kernel",
        q.device,
        memory_dtype(q.dtype),
        width=max(width, columns),
        columns=columns,
    )
    _memory_retrieve_forward_kernel[(batch * heads * -(-tokens // chunk),)](
        q, matrix.contiguous(), norm.contiguous(), contiguous(scale), contiguous(bias), out, eps,
        *q.stride()[:3], heads, norm.shape[1], tokens, chunk,
        K=width, V=columns, BK=padded(width), **product_types(q.dtype), **sizes,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["H", "HKV", "T", "CHUNK"])
def _memory_retrieve_backward_queries_kernel(
    q, gradient, matrix, norm, scale, bias, dq, dnorm, dscale, dbias, eps,
    q_b, q_h, q_t, g_b, g_h, g_t, H, HKV, T, CHUNK,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program writes the gradients of CHUNK queries, and what they give to norm, scale and bias."""
    parts: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0).to(tl.int64)
    head, memory, kv, lo, hi = _chunk(T, H, HKV, CHUNK)
    a = 1.0 if scale is None else tl.load(scale + kv).to(tl.float32)
    c = 0.0 if bias is None else tl.load(bias + kv).to(tl.float32)
    columns = tl.arange(0, BK)
    q += head // H * q_b + head % H * q_h
    gradient += head // H * g_b + head % H * g_h
    # [BK]
    z = tl.load(norm + memory * K + columns, columns < K, other=0.0)
    # [BK, BV]
    m = cast(load_matrix(matrix + memory * K * V, 0, 0, K, V, BK, BV), DTYPE)
    sums = tl.zeros((BT, BK), tl.float32)
    scales, biases = tl.zeros((BT,), tl.float32), tl.zeros((BT,), tl.float32)
    for i in tl.range(0, tl.cdiv(hi - lo, BT)):
        t0 = lo + i * BT
        # [BT, BK]
        x = load_tokens(q, t0, hi, q_t, 0, K, BT, BK)
        f = features(x, a, c)
        weight = tl.sum(f * z[None, :], 1)
        # The plain quotient may be off by two units, and squared by four.
        inverse = tl.div_rn(1.0, tl.maximum(weight, eps))
        y = tl.zeros((BT, BK), tl.float32)
        for part in tl.range(0, parts):
            if parts > 1:
                # [BK, BV]
                m = cast(load_matrix(matrix + memory * K * V, 0, part * BV, K, V, BK, BV), DTYPE)
            # [BT, BV]
            g = load_tokens(gradient, t0, hi, g_t, part * BV, V, BT, BV).to(DTYPE)
            y = dot(g, tl.trans(m), y, PRECISION)
        # The gradient of the weight: the result, f y / weight, shrinks as the weight grows.
        fall = tl.where(weight >= eps, -tl.sum(f * y, 1) * inverse * inverse, 0.0)
        sums += f * fall[:, None]
        slope = (y * inverse[:, None] + fall[:, None] * z[None, :]) * features_slope(f)
        store_tokens(dq + head * T * K, slope * a, t0, hi, K, 0, K, BT, BK)
        scales += tl.sum(slope * x.to(tl.float32), 1)
        biases += tl.sum(slope, 1)
    tl.store(dnorm + pid * K + columns, tl.sum(sums, 0), columns < K)
    if dscale is not None:
        tl.store(dscale + pid, tl.sum(scales, 0))
    if dbias is not None:
        tl.store(dbias + pid, tl.sum(biases, 0))


@triton.jit(do_not_specialize=["H", "HKV", "T", "CHUNK"])
def _memory_retrieve_backward_memory_kernel(
    q, gradient, norm, scale, bias, dmatrix, eps, q_b, q_h, q_t, g_b, g_h, g_t, H, HKV, T, CHUNK,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program sums what CHUNK queries give to BV columns of the matrix."""
    head, memory, kv, lo, hi = _chunk(T, H, HKV, CHUNK)
    a = 1.0 if scale is None else tl.load(scale + kv).to(tl.float32)
    c = 0.0 if bias is None else tl.load(bias + kv).to(tl.float32)
    columns, v0 = tl.arange(0, BK), tl.program_id(1) * BV
    q += head // H * q_b + head % H * q_h
    gradient += head // H * g_b + head % H * g_h
    # [BK]
    z = tl.load(norm + memory * K + columns, columns < K, other=0.0)
    total = tl.zeros((BK, BV), tl.float32)
    for i in tl.range(0, tl.cdiv(hi - lo, BT)):
        t0 = lo + i * BT
        # [BT, BK]
        f = features(load_tokens(q, t0, hi, q_t, 0, K, BT, BK), a, c)
        # [BT, BV]
        g = load_tokens(gradient, t0, hi, g_t, v0, V, BT, BV).to(tl.float32)
        g = g / tl.maximum(tl.sum(f * z[None, :], 1), eps)[:, None]
        total = dot(tl.trans(cast(f, DTYPE)), cast(g, DTYPE), total, PRECISION)
    store_matrix(dmatrix + tl.program_id(0).to(tl.int64) * K * V, total, 0, v0, K, V, BK, BV)


def retrieve_backward(
    q: Tensor,
    gradient: Tensor,
    matrix: Tensor,
    norm: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Retrieved:
    """Gradients of all that ``retrieve`` reads, from that of its result ``gradient [B, H, T, V]``."""
    batch, heads, tokens, width = q.shape
    columns, kv_heads = matrix.shape[3], norm.shape[1]
    q, gradient, norm = unit_stride(q), unit_stride(gradient), norm.contiguous()
    chunk = even_chunk(tokens, batch * heads, READERS)
    shape = (batch, kv_heads, heads // kv_heads * -(-tokens // chunk))
    programs = batch * heads * -(-tokens // chunk)
    dq, dnorm, dmatrix = (
        q.new_empty(q.shape),
        norm.new_empty(*shape, width),
        norm.new_empty(*shape, width, columns),
    )
    dscale, dbias = (None if x is None else norm.new_empty(shape) for x in (scale, bias))
    strides = (*q.stride()[:3], *gradient.stride()[:3])
    learned = contiguous(scale), contiguous(bias)
    options = {"width": max(width, columns), "columns": columns}
    shared = {"K": width, "V": columns, "BK": padded(width), **product_types(q.dtype)}
    sizes = memory_tiles(
        "_memory_retrieve_backward_queries_kernel", q.device, memory_dtype(q.dtype), **options
    )
    _memory_retrieve_backward_queries_kernel[(programs,)](
        q, gradient, matrix.contiguous(), norm, *learned, dq, dnorm, dscale, dbias, eps, *strides,
        heads, kv_heads, tokens, chunk, **shared, **sizes,
    )  # fmt: skip
    sizes = memory_tiles(
        "_memory_retrieve_backward_memory_kernel", q.device, memory_dtype(q.dtype), **options
    )
    _memory_retrieve_backward_memory_kernel[(programs, -(-columns // sizes["BV"]))](
        q, gradient, norm, *learned, dmatrix, eps, *strides, heads, kv_heads, tokens, chunk, **shared, **sizes
    )
    dscale, dbias = (None if x is None else x.sum((0, 2)) for x in (dscale, dbias))
    return Retrieved(dq, dmatrix.sum(2), dnorm.sum(2), dscale, dbias)
