"""The Infini-attention layer's forward pass, and plain sliding-window attention: one kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from newllm.kernels.attention_layout import NO_MEMORY, Attention, Recall, Rope, rope_arguments
from newllm.kernels.attention_tiles import (
    elements,
    hide,
    load_clamped,
    load_rotated,
    load_rows,
    load_state,
    query_tile,
    row_facts,
    rows_contiguous,
    softmax_weights,
    tiled,
    two_halves,
    visible_slots,
    warp_specialised,
)
from newllm.kernels.common import LOG2E, cast, dot, features, memory_dtype, padded, precision
from newllm.kernels.rotate import ROWS, Keys
from newllm.kernels.tiles import capability, tiles_of

# Powers of two within these and their inverses are precise in the weights' dtype, float32 holds their sums.
SAFE, SAFE_HALF = tl.constexpr(90.0), tl.constexpr(4.0)
# Of a memory's matrix in a step.
TILE_BYTES = 65536
# Columns of a tile of values that no copy engine brings, on Hopper and later: of narrower ones ptxas 12.8
# loses the address, and the first product of a loop reads what lies anywhere.
LOADED = 64


@triton.jit(do_not_specialize=["H", "HKV", "T", "P", "S", "W", "N", "tiles"])
def _infini_attention_forward_kernel(
    q, keys, v, out, lse, squares, cos, sin, states, norms, gate, scale, bias, position, length,
    q_strides, k_strides, v_strides, rope_strides,
    H, HKV, T, P, S, W, N, tiles, eps,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
    PARTS: tl.constexpr, LOCAL: tl.constexpr, SEGMENTED: tl.constexpr,
    K_TMA: tl.constexpr, V_TMA: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = (program // tiles).to(tl.int64)
    b, h = head // H, head % H
    hkv = h // (H // HKV)
    before, count, floor = row_facts(position, length, b, T, P)
    segment, border, first, end = query_tile(program % tiles, before, T, count, S, N, BT, SEGMENTED)
    row = first + tl.arange(0, BT)
    if LOCAL:
        floor = tl.maximum(floor, border + P)

    value_element = tl.arange(0, BV)
    # [BT, BK]
    if cos is None:
        queries = load_clamped(q, q_strides, b, h, first, T, elements(0, 1, K, BK), K, BT, BK)
    else:
        rotated = load_rotated(q, cos, sin, q_strides, rope_strides, b, h, first, T, K, BT, BK)
        queries = cast(rotated, out.dtype.element_ty)

    low, full, stop = visible_slots(first, end, count, floor, P, W, BT)
    PRECISE: tl.constexpr = lse.dtype.element_ty == tl.float64
    longest = _longest_key(squares + (b * HKV + hkv) * tl.cdiv(T + P, ROWS), low, stop, ROWS)
    own = queries.to(tl.float32)
    # Float32 takes the largest exponent off: a single key then weighs one, and its value is not rounded.
    bound: tl.constexpr = 0.0 if PRECISE else SAFE_HALF if out.dtype.element_ty == tl.float16 else SAFE
    if tl.max(tl.sum(own * own, 1)) * longest * LOG2E * LOG2E < bound * bound * K:
        highest, total, acc = _attend_window(
            queries, keys, v, k_strides, v_strides, b, hkv, row, first, low, full, stop, floor,
            T, P, W, K, V, BT, BK, BV, BS, K_TMA, V_TMA, True, PRECISE, PRECISION,
        )  # fmt: skip
    else:
        highest, total, acc = _attend_window(
            queries, keys, v, k_strides, v_strides, b, hkv, row, first, low, full, stop, floor,
            T, P, W, K, V, BT, BK, BV, BS, K_TMA, V_TMA, False, PRECISE, PRECISION,
        )  # fmt: skip
    real = row < tl.minimum(end, count)
    base = head * T + first
    number: tl.constexpr = lse.dtype.element_ty
    # Padding too: what is done with all of lse reads it.
    level = tl.where(real, highest.to(number) + tl.log2(total.to(number)), 0.0)
    tl.store(lse + base + tl.arange(0, BT), level, mask=row < end)
    if gate is not None:
        share = tl.load(gate + h)
        acc = acc * ((1 - share) / total)[:, None]
        acc = _add_recalled(
            acc, share, q, states, norms, scale, bias, q_strides, b, h, hkv, (b * HKV + hkv) * N + segment,
            first, T, eps, K, V, BT, BK, BV, PARTS, PRECISION,
        )  # fmt: skip
    else:
        acc = acc / total[:, None]
    result = cast(tl.where(real[:, None], acc, 0.0), out.dtype.element_ty)
    pointers = out + base * V + tl.arange(0, BT)[:, None] * V + value_element[None, :]
    tl.store(pointers, result, mask=(row < end)[:, None] & (value_element < V)[None, :])


@triton.jit
def _longest_key(squares, low, stop, ROWS: tl.constexpr):
    """The largest squared length of the keys in slots ``low`` .. ``stop - 1``, and some beside them."""
    longest = tl.zeros((16,), tl.float32)
    end = tl.cdiv(stop, ROWS)
    for start in tl.range(low // ROWS, end, 16):
        tile = start + tl.arange(0, 16)
        # [16]
        longest = tl.maximum(longest, tl.load(squares + tile, mask=tile < end, other=0.0))
    return tl.max(longest)


@triton.jit
def _attend_window(
    queries, k, v, k_strides, v_strides, b, hkv, row, first, low, full, stop, floor, T, P, W,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr,
    K_TMA: tl.constexpr, V_TMA: tl.constexpr, BOUNDED: tl.constexpr, PRECISE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The softmax's largest exponent, the sum of its weights and the values they weigh, for a query tile.

    ``BOUNDED`` exponents need no largest one taken off; then nothing waits for it, nor for the sums.
    """
    FACTOR: tl.constexpr = K**-0.5 * LOG2E
    key_element, value_element = elements(0, 1, K, BK), tl.arange(0, BV)
    highest = tl.full((BT,), 0.0 if BOUNDED else -1e30, tl.float32)
    total = tl.zeros((BT,), tl.float32)
    sums = tl.zeros((BT, 8), tl.float32)
    acc = tl.zeros((BT, BV), tl.float32)
    for start in tl.range(low // BS * BS, stop, BS):
        # [BS, BK]
        keys = load_rows(k, k_strides, b, hkv, start, T + P, key_element, K, BS, BK, K_TMA)
        scores = dot(queries, keys.T, None, PRECISION)
        if (start < full) | (start + BS > first + P + 1):
            scores = hide(scores, row + P, start + tl.arange(0, BS), floor, W, float("-inf"))
        if BOUNDED:
            weights = softmax_weights(scores, FACTOR, 0.0, PRECISE)
            # Neighbours of a row lie in different threads, elements eight apart in one.
            sums += tl.sum(weights.reshape(BT, BS // 8, 8), 1)
        else:
            peak = tl.maximum(highest, tl.max(scores, 1) * FACTOR)
            weights = softmax_weights(scores, FACTOR, peak[:, None], PRECISE)
            decay = tl.exp2(highest - peak)
            total = total * decay + tl.sum(weights, 1)
            acc *= decay[:, None]
            highest = peak
        # [BS, BV]
        values = load_rows(v, v_strides, b, hkv, start, T + P, value_element, V, BS, BV, V_TMA)
        acc = dot(cast(weights, values.dtype), values, acc, PRECISION)
    if BOUNDED:
        total = tl.sum(sums, 1)
    return highest, total, acc


@triton.jit
def _add_recalled(
    acc, share, q, states, norms, scale, bias, q_strides, b, h, hkv, state, first, T, eps,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc + share A_mem`` of a query tile, in PARTS of the features."""
    a, o = 1.0, 0.0
    if scale is not None:
        a, o = tl.load(scale + hkv), tl.load(bias + hkv)
    value = tl.arange(0, BV)
    weight = tl.zeros((BT,), tl.float32)
    for part in tl.static_range(0, PARTS):
        element = elements(part, PARTS, K, BK)
        # Features beyond K meet zeros, in the norm and in the matrix.
        f = features(load_clamped(q, q_strides, b, h, first, T, element, K, BT, BK), a, o)
        z = tl.load(norms + state * K + element, mask=element < K, other=0.0)
        weight += tl.sum(f * z[None, :], 1)
    share = share / tl.maximum(weight, eps)
    for part in tl.static_range(0, PARTS):
        element = elements(part, PARTS, K, BK)
        if PARTS > 1:
            f = features(load_clamped(q, q_strides, b, h, first, T, element, K, BT, BK), a, o)
        # [BK / PARTS, BV]
        matrix = load_state(states, state, element, value, K, V, BK, BV)
        acc = dot(cast(f * share[:, None], matrix.dtype), matrix, acc, PRECISION)
    return acc


def attend(
    q: Tensor,
    keys: Keys,
    v: Tensor,
    layout: Attention,
    rope: Rope | None,
    memory: Recall | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q ``[B, H, T, K]`` to rotated keys ``[B, HKV, P + T, K]`` and values, and the memory.

    Returns out ``[B, H, T, V]`` in q's dtype and the softmax's log2-sum-exp2 ``[B, H, T]``.
    """
    q, v, k = rows_contiguous(q), rows_contiguous(v), keys.rotated
    (batch, heads, tokens, key_width), (kv_heads, slots) = q.shape, k.shape[1:3]
    if heads // kv_heads % 2 == 0 and warp_specialised(layout.window, (128,), q, k, v):
        import newllm.kernels.attention_hopper_forward as hopper

        return hopper.attend(q, keys, v, layout, rope, memory)
    value_width = v.shape[3]
    bk, bv = two_halves(key_width), padded(value_width)
    sizes = tiles_of("_infini_attention_forward_kernel", q.device, max(bk, bv), q.element_size())
    out = q.new_empty(batch, heads, tokens, value_width)
    # A rounded sum would be the largest error of the backward pass of float32.
    lse = q.new_empty(
        batch, heads, tokens, dtype=torch.float64 if q.dtype == torch.float32 else torch.float32
    )
    tiles = layout.query_tiles(tokens, sizes["BT"])
    (key_tiles, k_tma), (values, v_tma) = tiled(k, sizes["BS"], bk), tiled(v, sizes["BS"], bv)
    if not v_tma and capability(q.device) >= (9, 0):
        bv = max(bv, LOADED)
    cos, sin, rope_strides = rope_arguments(rope, tokens)
    parts = max(-(-bk // 128), bk * bv * memory_dtype(q.dtype).itemsize // TILE_BYTES)
    recall = memory or NO_MEMORY
    _infini_attention_forward_kernel[(batch * heads * tiles,)](
        q, key_tiles, values, out, lse, keys.squares, cos, sin, recall.states, recall.norms, recall.gate,
        recall.scale, recall.bias, layout.position, layout.length,
        q.stride()[:3], k.stride()[:3], v.stride()[:3], rope_strides,
        heads, kv_heads, tokens, slots - tokens, layout.segment, layout.reach, layout.segments(tokens),
        tiles, recall.eps,
        K=key_width, V=value_width, BK=bk, BV=bv, PARTS=parts,
        LOCAL=layout.window is None, SEGMENTED=layout.segmented, K_TMA=k_tma, V_TMA=v_tma,
        ROWS=ROWS, PRECISION=precision(q.dtype),
        **sizes,
    )  # fmt: skip
    return out, lse
