"""What the attention's gradients need of each query before anything else: one pass over out, do and q."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from newllm.kernels.attention_layout import NO_MEMORY, Attention, Recall, Rope, rope_arguments
from newllm.kernels.attention_tiles import (
    elements,
    load_clamped,
    load_rope,
    load_state,
    query_tile,
    row_facts,
    two_halves,
)
from newllm.kernels.common import cast, dot, features, fusion, padded, precision
from newllm.kernels.tiles import tiles_of


@triton.jit(do_not_specialize=["HKV", "GROUP", "T", "P", "S", "W", "N", "tiles"])
def _infini_attention_backward_prepare_kernel(
    q, v, out, do, queries, delta, pulls, shares, sums, cos, sin, states, norms, gate, scale, bias,
    position, length, q_strides, v_strides, out_strides, do_strides, rope_strides,
    HKV, GROUP, T, P, S, W, N, tiles, eps,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
    LOCAL: tl.constexpr, SEGMENTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program takes a tile of all query heads that share a memory, and with it matrix and tables."""
    program = tl.program_id(0)
    head = (program // tiles).to(tl.int64)
    b, hkv = head // HKV, head % HKV
    before, count, floor = row_facts(position, length, b, T, P)
    segment, border, first, end = query_tile(program % tiles, before, T, count, S, N, BT, SEGMENTED)
    row = first + tl.arange(0, BT)
    real = row < tl.minimum(end, count)
    if LOCAL:
        floor = tl.maximum(floor, border + P)
    single = (row + P == floor) | (W == 1)
    lower, upper, value = elements(0, 2, K, BK), elements(1, 2, K, BK), tl.arange(0, BV)
    if states is not None:
        state = head * N + segment
        a, o = 1.0, 0.0
        if scale is not None:
            a, o = tl.load(scale + hkv), tl.load(bias + hkv)
        # [BK/2]; features beyond K meet zeros, in the norm and in the matrix
        z = tl.load(norms + state * K + lower, mask=lower < K, other=0.0)
        z2 = tl.load(norms + state * K + upper, mask=upper < K, other=0.0)
        if BS == BV:
            # [BK/2, BV]
            matrix = load_state(states, state, lower, value, K, V, BK, BV)
            matrix2 = load_state(states, state, upper, value, K, V, BK, BV)
    for h in tl.range(hkv * GROUP, hkv * GROUP + GROUP):
        rows = (b * HKV * GROUP + h) * T + row
        # [BT, BV]
        gradient = load_clamped(do, do_strides, b, h, first, T, value, V, BT, BV)
        results = load_clamped(out, out_strides, b, h, first, T, value, V, BT, BV).to(tl.float32)
        shift = tl.sum(results * gradient.to(tl.float32), 1)
        own = _own_products(
            gradient, v, v_strides, b, hkv, row, first, T, P, W, floor, value, V, BT, BV, PRECISION
        )
        if (cos is not None) or (states is not None):
            # [BT, BK/2]
            raw = load_clamped(q, q_strides, b, h, first, T, lower, K, BT, BK)
            raw2 = load_clamped(q, q_strides, b, h, first, T, upper, K, BT, BK)
        if cos is not None:
            left, right = raw.to(tl.float32), raw2.to(tl.float32)
            # [BT, BK/2]
            c, s = load_rope(cos, sin, rope_strides, b, first, T, lower, K, BT)
            _store_queries(queries, left * c - right * s, rows, row < end, lower, K)
            c, s = load_rope(cos, sin, rope_strides, b, first, T, upper, K, BT)
            _store_queries(queries, right * c + left * s, rows, row < end, upper, K)
        if states is not None:
            f, f2 = features(raw, a, o), features(raw2, a, o)
            weight = tl.maximum(tl.sum(f * z[None, :], 1) + tl.sum(f2 * z2[None, :], 1), eps)
            if BS == BV:
                answer = tl.sum(f * dot(gradient.to(matrix.dtype), matrix.T, None, PRECISION), 1)
                answer += tl.sum(f2 * dot(gradient.to(matrix.dtype), matrix2.T, None, PRECISION), 1)
            else:
                answer = tl.zeros((BT,), tl.float32)
                for start in tl.range(0, BV, BS, num_stages=1):
                    column = start + tl.arange(0, BS)
                    # [BT, BS]
                    block = load_clamped(do, do_strides, b, h, first, T, column, V, BT, BV)
                    # [BK/2, BS]
                    matrix = load_state(states, state, lower, column, K, V, BK, BV)
                    matrix2 = load_state(states, state, upper, column, K, V, BK, BV)
                    answer += tl.sum(f * dot(block.to(matrix.dtype), matrix.T, None, PRECISION), 1)
                    answer += tl.sum(f2 * dot(block.to(matrix.dtype), matrix2.T, None, PRECISION), 1)
            answer = tl.where(real, answer / weight, 0.0)
            g = tl.load(gate + h)
            tl.store(pulls + rows, tl.where(weight > eps, answer, 0.0), mask=row < end)
            tl.store(shares + rows, tl.where(real, g / weight, 0.0), mask=row < end)
            place = sums + (b * HKV * GROUP + h) * tiles + program % tiles
            excess = tl.where(single, (1 - g) * (answer - own), answer - shift)
            # Nothing is the window's where g is one, however A_mem and out were rounded.
            tl.store(place, tl.where(g == 1, 0.0, tl.sum(tl.where(real, excess, 0.0))))
            # From that very difference: for float32 what it lacks is found in the slopes' sums, for both.
            shift = tl.where(g == 1, 0.0, shift - g / (1 - g) * excess)
        shift = tl.where(single, own, shift)
        tl.store(delta + rows, tl.where(real, shift, 0.0), mask=row < end)


@triton.jit
def _own_products(
    gradient, v, v_strides, b, hkv, row, first, T, P, W, floor, value,
    V: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of queries that see a single key, do times their own value [BT]: zeros in tiles that have none.

    A single key has no slope: that takes the very product it is subtracted from, not a rounded out.
    """
    own = tl.zeros((BT,), tl.float32)
    if (W == 1) | (first + P <= floor):
        # [BT, BV]
        values = load_clamped(v, v_strides, b, hkv, first + P, T + P, value, V, BT, BV)
        products = dot(gradient, values.T, None, PRECISION)
        own = tl.sum(tl.where(row[:, None] == row[None, :], products, 0.0), 1)
    return own


@triton.jit
def _store_queries(queries, x, rows, real, element, K: tl.constexpr):
    """Store half of a tile of rotated queries."""
    mask = real[:, None] & (element < K)[None, :]
    tl.store(queries + rows[:, None] * K + element[None, :], cast(x, queries.dtype.element_ty), mask=mask)


class Prepared(NamedTuple):
    """What is known of each query, ``[B, H, T]`` in float32.

    ``delta`` = sum(do * A_dot), ``pull`` = sum(do * A_mem) where the denominator is not clamped, and
    ``share`` = g over the denominator; ``gates [H]`` are the sums of do * (A_mem - out). Without a memory
    there is only ``delta``.
    """

    delta: Tensor
    pull: Tensor | None
    share: Tensor | None
    gates: Tensor | None


def prepare(
    q: Tensor,
    v: Tensor,
    out: Tensor,
    do: Tensor,
    layout: Attention,
    rope: Rope | None,
    memory: Recall | None,
    queries: Tensor,
) -> Prepared:
    """One pass over q ``[B, H, T, K]``, ``out`` and ``do [B, H, T, V]``; v is ``[B, HKV, P + T, V]``.

    With ``rope`` it writes the rotated q to ``queries``.
    """
    batch, heads, tokens, key_width = q.shape
    recall = memory or NO_MEMORY
    kv_heads, slots, value_width = v.shape[1:]
    bk, bv = two_halves(key_width), padded(value_width)
    sizes = tiles_of("_infini_attention_backward_prepare_kernel", q.device, max(bk, bv), q.element_size())
    sizes = {**sizes, "BS": min(sizes["BS"], bv)}
    tiles = layout.query_tiles(tokens, sizes["BT"])
    delta = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    pull = share = sums = None
    if recall.states is not None:
        pull, share = torch.empty_like(delta), torch.empty_like(delta)
        sums = delta.new_empty(batch, heads, tiles)
    cos, sin, rope_strides = rope_arguments(rope, tokens)
    _infini_attention_backward_prepare_kernel[(batch * kv_heads * tiles,)](
        q, v, out, do, queries, delta, pull, share, sums, cos, sin, recall.states, recall.norms, recall.gate,
        recall.scale, recall.bias, layout.position, layout.length,
        q.stride()[:3], v.stride()[:3], out.stride()[:3], do.stride()[:3], rope_strides,
        kv_heads, heads // kv_heads, tokens, slots - tokens, layout.segment, layout.reach,
        layout.segments(tokens), tiles, recall.eps,
        K=key_width, V=value_width, BK=bk, BV=bv,
        LOCAL=layout.window is None, SEGMENTED=layout.segmented, PRECISION=precision(q.dtype),
        **fusion(min(bk // 2, value_width)), **sizes,
    )  # fmt: skip
    return Prepared(delta, pull, share, None if sums is None else sums.sum((0, 2)))
