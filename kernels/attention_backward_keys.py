"""Gradients of the window's keys and values: a tile of keys meets all queries that see it."""

import triton
import triton.language as tl
from torch import Tensor

from newllm.kernels.attention_layout import Attention
from newllm.kernels.attention_tiles import (
    elements,
    load_clamped,
    load_rows,
    row_facts,
    softmax_weights,
    tiled,
    two_halves,
    warp_specialised,
)
from newllm.kernels.common import LOG2E, cast, dot, padded, precision
from newllm.kernels.tiles import tiles_of


@triton.jit(do_not_specialize=["H", "HKV", "T", "P", "S", "W", "tiles"])
def _infini_attention_backward_keys_kernel(
    q, k, v, do, lse, delta, dk, dv, position, length,
    q_strides, k_strides, v_strides, do_strides,
    H, HKV, T, P, S, W, tiles,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
    LOCAL: tl.constexpr,
    Q_TMA: tl.constexpr, DO_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = (program // tiles).to(tl.int64)
    b, hkv = head // HKV, head % HKV
    group = H // HKV
    before, count, floor = row_facts(position, length, b, T, P)
    first = (program % tiles) * BS
    slot = first + tl.arange(0, BS)
    slots = T + P

    stored = (slot < slots)[:, None]
    element, value = elements(0, 1, K, BK), tl.arange(0, BV)
    at_k = (head * slots + first) * K + tl.arange(0, BS)[:, None] * K + element[None, :]
    at_v = (head * slots + first) * V + tl.arange(0, BS)[:, None] * V + value[None, :]

    # [BS, BK]
    keys = load_clamped(k, k_strides, b, hkv, first, slots, element, K, BS, BK)
    # [BS, BV]
    values = load_clamped(v, v_strides, b, hkv, first, slots, value, V, BS, BV)

    # The tile's keys are seen by the rows from its first one to the one before `end`.
    end = first + BS - 1 - P + W
    if LOCAL:
        border = _segment_end(slot, P, S, before)
        end = _segment_end(first + BS - 1, P, S, before)
    low = tl.maximum(first - P, 0) // BT * BT
    steps = tl.cdiv(tl.maximum(tl.minimum(end, count) - low, 0), BT)
    FACTOR: tl.constexpr = K**-0.5 * LOG2E
    PRECISE: tl.constexpr = lse.dtype.element_ty == tl.float64
    acc_k = tl.zeros((BS, BK), tl.float32)
    acc_v = tl.zeros((BS, BV), tl.float32)
    for step in tl.range(0, steps * group):
        h = hkv * group + step // steps
        start = low + step % steps * BT
        row = start + tl.arange(0, BT)
        # [BT, BK]
        queries = load_rows(q, q_strides, b, h, start, T, element, K, BT, BK, Q_TMA)
        # [BT, BV]
        gradient = load_rows(do, do_strides, b, h, start, T, value, V, BT, BV, DO_TMA)
        rows = (b * H + h) * T + row
        # Rows without a token see nothing.
        level = tl.load(lse + rows, mask=row < count, other=1e30)
        shift = tl.load(delta + rows, mask=row < count, other=0.0)
        scores = dot(keys, queries.T, None, PRECISION)
        weights = softmax_weights(scores, FACTOR, level[None, :], PRECISE)
        if (start + P < first + BS - 1) | (start + BT + P - first > W):
            distance = ((row + P)[None, :] - slot[:, None]).to(tl.uint32, bitcast=True)
            weights = tl.where(distance < W, weights, 0.0)
            if PRECISE:
                # A lone key's weight is one, in whichever order its score was summed up here.
                weights = tl.where((W == 1) & (weights > 0.5), 1.0, weights)
        if LOCAL:
            weights = tl.where(row[None, :] < border[:, None], weights, 0.0)
        slopes = dot(values, gradient.T, None, PRECISION)
        acc_v = dot(cast(weights, gradient.dtype), gradient, acc_v, PRECISION)
        slopes = weights * (slopes - shift[None, :])
        acc_k = dot(cast(slopes, queries.dtype), queries, acc_k, PRECISION)

    # Slots before the row's first token hold no key.
    held = (slot >= floor)[:, None]
    tl.store(
        dv + at_v, tl.where(held, acc_v, 0.0).to(dv.dtype.element_ty), mask=stored & (value < V)[None, :]
    )
    acc_k = tl.where(held, acc_k * K**-0.5, 0.0)
    tl.store(dk + at_k, cast(acc_k, dk.dtype.element_ty), mask=stored & (element < K)[None, :])


@triton.jit
def _segment_end(slot, P, S, before):
    """The first row behind the segment of the key in ``slot``."""
    phase = (before % S).to(tl.int32)
    # Never negative: at most S - 1 keys stand before the queries.
    return (slot - P + phase + S) // S * S - phase


def key_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    lse: Tensor,
    delta: Tensor,
    layout: Attention,
) -> tuple[Tensor, Tensor]:
    """Gradients ``[B, HKV, P + T, ...]`` of keys and values, both contiguous; q and k are rotated.

    ``lse [B, H, T]`` makes the weights, ``delta`` is what the softmax takes off the output's gradient.
    """
    (batch, heads, tokens, key_width), (kv_heads, slots) = q.shape, k.shape[1:3]
    # Lines of the copy engine begin at multiples of 16 bytes.
    if tokens % 4 == 0 and warp_specialised(layout.window, (64, 128), q, k, v, do):
        import newllm.kernels.attention_hopper_keys as hopper

        return hopper.key_gradients(q, k, v, do, lse, delta, layout)
    value_width = v.shape[3]
    bk, bv = two_halves(key_width), padded(value_width)
    sizes = tiles_of("_infini_attention_backward_keys_kernel", q.device, max(bk, bv), q.element_size())
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    tiles = -(-slots // sizes["BS"])
    (queries, q_tma), (gradient, do_tma) = tiled(q, sizes["BT"], bk), tiled(do, sizes["BT"], bv)
    _infini_attention_backward_keys_kernel[(batch * kv_heads * tiles,)](
        queries, k, v, gradient, lse, delta, dk, dv, layout.position, layout.length,
        q.stride()[:3], k.stride()[:3], v.stride()[:3], do.stride()[:3],
        heads, kv_heads, tokens, slots - tokens, layout.segment, layout.reach, tiles,
        K=key_width, V=value_width, BK=bk, BV=bv,
        LOCAL=layout.window is None, Q_TMA=q_tma, DO_TMA=do_tma, PRECISION=precision(q.dtype),
        **sizes,
    )  # fmt: skip
    return dk, dv
