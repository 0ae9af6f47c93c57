"""float32: what rounding the output took from each query's delta, found in the slopes, which must cancel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from newllm.kernels.attention_backward_prepare import Prepared
from newllm.kernels.attention_layout import Attention
from newllm.kernels.attention_tiles import (
    elements,
    load_clamped,
    load_rows,
    query_tile,
    row_facts,
    score_slopes,
    tiled,
    two_halves,
    visible_slots,
)
from newllm.kernels.common import LOG2E, padded, precision
from newllm.kernels.tiles import tiles_of


@triton.jit(do_not_specialize=["H", "HKV", "T", "P", "S", "W", "N", "tiles"])
def _infini_attention_backward_slopes_kernel(
    q, k, v, do, lse, delta, exact, gate, sums, position, length,
    q_strides, k_strides, v_strides, do_strides,
    H, HKV, T, P, S, W, N, tiles,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
    LOCAL: tl.constexpr, SEGMENTED: tl.constexpr, K_TMA: tl.constexpr, V_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = (program // tiles).to(tl.int64)
    b, h = head // H, head % H
    hkv = h // (H // HKV)
    before, count, floor = row_facts(position, length, b, T, P)
    _, border, first, end = query_tile(program % tiles, before, T, count, S, N, BT, SEGMENTED)
    row = first + tl.arange(0, BT)
    real = row < tl.minimum(end, count)
    if LOCAL:
        floor = tl.maximum(floor, border + P)

    key_element, value_element = elements(0, 1, K, BK), tl.arange(0, BV)
    # [BT, BK]
    queries = load_clamped(q, q_strides, b, h, first, T, key_element, K, BT, BK)
    # [BT, BV]
    gradient = load_clamped(do, do_strides, b, h, first, T, value_element, V, BT, BV)
    level = tl.load(lse + head * T + row, mask=real, other=0.0)
    shift = tl.load(delta + head * T + row, mask=real, other=0.0)
    low, full, stop = visible_slots(first, end, count, floor, P, W, BT)
    FACTOR: tl.constexpr = K**-0.5 * LOG2E
    residue = tl.zeros((BT,), tl.float64)
    for start in tl.range(low // BS * BS, stop, BS):
        # [BS, BK]
        keys = load_rows(k, k_strides, b, hkv, start, T + P, key_element, K, BS, BK, K_TMA)
        # [BS, BV]
        values = load_rows(v, v_strides, b, hkv, start, T + P, value_element, V, BS, BV, V_TMA)
        slopes = score_slopes(
            queries, gradient, keys, values, level, shift, row, first, start, full, floor, P, W,
            BS, FACTOR, True, PRECISION,
        )  # fmt: skip
        # Sums of float32 products would be fused with the first exchange between threads, which then differ.
        residue += tl.sum(slopes.to(tl.float64), 1)
    tl.store(exact + head * T + row, tl.where(real, shift + residue, 0.0), mask=row < end)
    if gate is not None:
        tl.store(sums + program, (1 - tl.load(gate + h)) * tl.sum(tl.where(real, residue, 0.0)))


def cancelled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    lse: Tensor,
    layout: Attention,
    gate: Tensor | None,
    ready: Prepared,
) -> Prepared:
    """``ready`` with a ``delta`` with which each query's slopes of scores cancel, as exact ones do.

    One made from a rounded out takes its error to each slope whole, however small the window's share of out.
    The sum of the slopes, weighed by that share, is also what ``gates`` lack. q ``[B, H, T, K]`` and k
    ``[B, HKV, P + T, K]`` are rotated; ``lse [B, H, T]`` (float64) is the softmax's own, of all the weight;
    ``gate [H]`` is the memory's share of out, if there is a memory.
    """
    (batch, heads, tokens, key_width), (kv_heads, slots, value_width) = q.shape, v.shape[1:]
    bk, bv = two_halves(key_width), padded(value_width)
    sizes = tiles_of("_infini_attention_backward_slopes_kernel", q.device, max(bk, bv), q.element_size())
    tiles = layout.query_tiles(tokens, sizes["BT"])
    exact = torch.empty_like(ready.delta)
    sums = None if gate is None else exact.new_empty(batch, heads, tiles)
    (keys, k_tma), (values, v_tma) = tiled(k, sizes["BS"], bk), tiled(v, sizes["BS"], bv)
    _infini_attention_backward_slopes_kernel[(batch * heads * tiles,)](
        q, keys, values, do, lse, ready.delta, exact, gate, sums, layout.position, layout.length,
        q.stride()[:3], k.stride()[:3], v.stride()[:3], do.stride()[:3],
        heads, kv_heads, tokens, slots - tokens, layout.segment, layout.reach, layout.segments(tokens), tiles,
        K=key_width, V=value_width, BK=bk, BV=bv,
        LOCAL=layout.window is None, SEGMENTED=layout.segmented, K_TMA=k_tma, V_TMA=v_tma,
        PRECISION=precision(q.dtype),
        **sizes,
    )  # fmt: skip
    if ready.gates is None or sums is None:
        return ready._replace(delta=exact)
    return ready._replace(delta=exact, gates=ready.gates - sums.sum((0, 2)))
