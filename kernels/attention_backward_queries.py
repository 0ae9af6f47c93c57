"""Gradients of the queries, through the window and through the memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from newllm.kernels.attention_backward_prepare import Prepared
from newllm.kernels.attention_layout import NO_MEMORY, Attention, Recall, Rope, rope_arguments
from newllm.kernels.attention_tiles import (
    elements,
    load_clamped,
    load_rows,
    matrix_slope,
    query_tile,
    rotate_back,
    row_facts,
    score_slopes,
    tiled,
    two_halves,
    visible_slots,
    warp_specialised,
)
from newllm.kernels.common import LOG2E, cast, dot, exponential, memory_dtype, padded, precision
from newllm.kernels.tiles import tiles_of

# Of a memory's matrix in a step.
TILE_BYTES = 32768


@triton.jit(do_not_specialize=["H", "HKV", "T", "P", "S", "W", "N", "tiles"])
def _infini_attention_backward_queries_kernel(
    q, rotated, k, v, do, lse, delta, pulls, shares, dq, dfeature,
    cos, sin, states, norms, scale, bias, position, length,
    q_strides, rotated_strides, k_strides, v_strides, do_strides, rope_strides,
    H, HKV, T, P, S, W, N, tiles,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
    BC: tl.constexpr, LOCAL: tl.constexpr, SEGMENTED: tl.constexpr,
    K_TMA: tl.constexpr, V_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = (program // tiles).to(tl.int64)
    b, h = head // H, head % H
    hkv = h // (H // HKV)
    before, count, floor = row_facts(position, length, b, T, P)
    segment, border, first, end = query_tile(program % tiles, before, T, count, S, N, BT, SEGMENTED)
    row = first + tl.arange(0, BT)
    real = row < tl.minimum(end, count)
    if LOCAL:
        floor = tl.maximum(floor, border + P)

    key_element, value_element = elements(0, 1, K, BK), tl.arange(0, BV)
    # [BT, BK]
    queries = load_clamped(rotated, rotated_strides, b, h, first, T, key_element, K, BT, BK)
    # [BT, BV]
    gradient = load_clamped(do, do_strides, b, h, first, T, value_element, V, BT, BV)
    level = tl.load(lse + head * T + row, mask=real, other=0.0)
    shift = tl.load(delta + head * T + row, mask=real, other=0.0)
    acc = tl.zeros((BT, BK), tl.float32)
    base = dq + (head * T + first) * K + tl.arange(0, BT)[:, None] * K
    if states is not None:
        # The memory's share waits where the queries lay, not in registers that the window's loop needs.
        _store_recall_gradient(
            gradient, q, do, states, norms, pulls, shares, scale, bias, base, dfeature, q_strides, do_strides,
            b, h, H, hkv, (b * HKV + hkv) * N + segment, program, first, end, real, T,
            K, V, BT, BK, BV, BC, PRECISION,
        )  # fmt: skip
    low, full, stop = visible_slots(first, end, count, floor, P, W, BT)
    FACTOR: tl.constexpr = K**-0.5 * LOG2E
    PRECISE: tl.constexpr = lse.dtype.element_ty == tl.float64
    for start in tl.range(low // BS * BS, stop, BS):
        # [BS, BK]
        keys = load_rows(k, k_strides, b, hkv, start, T + P, key_element, K, BS, BK, K_TMA)
        # [BS, BV]
        values = load_rows(v, v_strides, b, hkv, start, T + P, value_element, V, BS, BV, V_TMA)
        slopes = score_slopes(
            queries, gradient, keys, values, level, shift, row, first, start, full, floor, P, W,
            BS, FACTOR, PRECISE, PRECISION,
        )  # fmt: skip
        acc = dot(cast(slopes, keys.dtype), keys, acc, PRECISION)

    tl.debug_barrier()
    left, right = (acc * K**-0.5).reshape(BT, 2, BK // 2).permute(0, 2, 1).split()
    if cos is not None:
        left, right = rotate_back(left, right, cos, sin, rope_strides, b, first, T, K, BT, BK)
    for part in tl.static_range(0, 2):
        element = elements(part, 2, K, BK)
        place, held = base + element[None, :], (row < end)[:, None] & (element < K)[None, :]
        result = left if part == 0 else right
        if states is not None:
            # [BT, BK/2]
            result += tl.load(place, mask=held, other=0.0).to(tl.float32)
        tl.store(place, cast(tl.where(real[:, None], result, 0.0), dq.dtype.element_ty), mask=held)


@triton.jit
def _store_recall_gradient(
    gradient, q, do, states, norms, pulls, shares, scale, bias, base, dfeature, q_strides, do_strides,
    b, h, H, hkv, state, program, first, end, real, T,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the gradient of raw queries through the memory, and their shares of scale's and bias's."""
    a, o = 1.0, 0.0
    if scale is not None:
        a, o = tl.load(scale + hkv), tl.load(bias + hkv)
    element = elements(0, 1, K, BK)
    at = (b * H + h) * T + first + tl.arange(0, BT)
    pull = tl.load(pulls + at, mask=real, other=0.0)[:, None]
    share = tl.load(shares + at, mask=real, other=0.0)[:, None]
    slope = matrix_slope(
        gradient, do, states, do_strides, b, h, state, first, T, K, V, BT, BK, BV, BC, PRECISION
    )
    # [BT, BK]
    x = load_clamped(q, q_strides, b, h, first, T, element, K, BT, BK).to(tl.float32)
    # [BK]
    z = tl.load(norms + state * K + element, mask=element < K, other=0.0)
    PRECISE: tl.constexpr = q.dtype.element_ty == tl.float32
    slope = (slope - pull * z[None, :]) * share * exponential(tl.minimum(x * a + o, 0.0), PRECISE)
    if scale is not None:
        tl.store(dfeature + program * 2, tl.sum(slope * x))
        tl.store(dfeature + program * 2 + 1, tl.sum(slope))
    held = (first + tl.arange(0, BT) < end)[:, None] & (element < K)[None, :]
    # Other threads' part of the queries may still be on its way from there.
    tl.debug_barrier()
    tl.store(base + element[None, :], cast(slope * a, q.dtype.element_ty), mask=held)


def query_gradients(
    q: Tensor,
    rotated: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    lse: Tensor,
    layout: Attention,
    rope: Rope | None,
    memory: Recall | None,
    ready: Prepared,
    dq: Tensor,
) -> Tensor | None:
    """Write the gradient of q ``[B, H, T, K]`` into ``dq``, which may be where ``rotated`` lies.

    ``rotated`` is q after rotation, ``k`` are rotated keys. What is returned, ``[2, HKV]``, is the queries'
    share of the gradients of scale and bias, if there are such.
    """
    (batch, heads, tokens, key_width), (kv_heads, slots) = q.shape, k.shape[1:3]
    if heads // kv_heads % 2 == 0 and warp_specialised(layout.window, (128,), rotated, k, v, do):
        import newllm.kernels.attention_hopper_queries as hopper

        return hopper.query_gradients(q, rotated, k, v, do, lse, layout, rope, memory, ready, dq)
    value_width = v.shape[3]
    bk, bv = two_halves(key_width), padded(value_width)
    sizes = tiles_of("_infini_attention_backward_queries_kernel", q.device, max(bk, bv), q.element_size())
    tiles = layout.query_tiles(tokens, sizes["BT"])
    has_feature = memory is not None and memory.scale is not None
    dfeature = (
        q.new_empty(batch, kv_heads, heads // kv_heads * tiles, 2, dtype=torch.float32)
        if has_feature
        else None
    )
    (keys, k_tma), (values, v_tma) = tiled(k, sizes["BS"], bk), tiled(v, sizes["BS"], bv)
    cos, sin, rope_strides = rope_arguments(rope, tokens)
    recall = memory or NO_MEMORY
    columns = TILE_BYTES // (bk * memory_dtype(q.dtype).itemsize)
    _infini_attention_backward_queries_kernel[(batch * heads * tiles,)](
        q, rotated, keys, values, do, lse, ready.delta, ready.pull, ready.share, dq, dfeature,
        cos, sin, recall.states, recall.norms, recall.scale, recall.bias, layout.position, layout.length,
        q.stride()[:3], rotated.stride()[:3], k.stride()[:3], v.stride()[:3], do.stride()[:3], rope_strides,
        heads, kv_heads, tokens, slots - tokens, layout.segment, layout.reach, layout.segments(tokens),
        tiles,
        K=key_width, V=value_width, BK=bk, BV=bv, BC=min(bv, columns),
        LOCAL=layout.window is None, SEGMENTED=layout.segmented, K_TMA=k_tma, V_TMA=v_tma,
        PRECISION=precision(q.dtype),
        **sizes,
    )  # fmt: skip
    return None if dfeature is None else dfeature.sum((0, 2)).T
