"""Gradients of the window's keys and values on Hopper: two tiles of keys share each tile of queries."""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from newllm.kernels.attention_hopper import (
    CONSUMERS,
    LIMIT,
    REGISTERS,
    ROWS,
    await_filled,
    await_free,
    barriers,
    fetch,
    fetch_numbers,
    numbers,
    release,
    rows_of,
    tiles,
)
from newllm.kernels.attention_layout import Attention
from newllm.kernels.attention_tiles import row_facts, softmax_weights
from newllm.kernels.common import LOG2E

# Queries of a tile and places of the ring, by width.
SIZES = {64: {"BT": 64, "STAGES": 4}, 128: {"BT": 64, "STAGES": 2}}


@gluon.jit
def _tile_of_keys(position, length, HKV, T, P, W, tiles, BT: gl.constexpr):
    """The program's row in the batch, head, first key, first query that sees one, and tiles of queries."""
    head = (gl.program_id(0) // tiles).to(gl.int64)
    b, hkv = head // HKV, head % HKV
    _, count, floor = row_facts(position, length, b, T, P)
    first = gl.program_id(0) % tiles * (ROWS * CONSUMERS)
    begin = gl.maximum(first - P, 0) // BT * BT
    end = gl.minimum(first + ROWS * CONSUMERS - 1 - P + W, count)
    return b, hkv, count, floor, first, begin, gl.maximum((end - begin + BT - 1) // BT, 0)


@gluon.jit
def _produce(
    q, do, k, v, lse, delta, position, length, k_tiles, v_tiles, q_ring, do_ring, lse_ring, delta_ring,
    kv_full, full, empty, H, HKV, T, P, W, tiles,
    D: gl.constexpr, BT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    b, hkv, _, _, first, begin, steps = _tile_of_keys(position, length, HKV, T, P, W, tiles, BT)
    group = H // HKV
    for c in gl.static_range(CONSUMERS):
        mbarrier.expect(kv_full.index(c), 2 * ROWS * D * 2)
        fetch(k, b, hkv, first + c * ROWS, kv_full.index(c), k_tiles.index(c))
        fetch(v, b, hkv, first + c * ROWS, kv_full.index(c), v_tiles.index(c))
    for step in range(group * steps):
        h = hkv * group + step // steps
        row = begin + step % steps * BT
        place = step % STAGES
        bar = full.index(place)
        await_free(empty, step, STAGES)
        mbarrier.expect(bar, 2 * BT * D * 2 + 2 * BT * 4)
        fetch(q, b, h, row, bar, q_ring.index(place))
        fetch_numbers(lse, b, h, row, bar, lse_ring.index(place))
        fetch(do, b, h, row, bar, do_ring.index(place))
        fetch_numbers(delta, b, h, row, bar, delta_ring.index(place))


@gluon.jit
def _consume(
    dk, dv, position, length, k_tiles, v_tiles, q_ring, do_ring, lse_ring, delta_ring, kv_full, full, empty,
    H, HKV, T, P, W, tiles,
    C: gl.constexpr, D: gl.constexpr, BT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, RESULT, 2)
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    FACTOR: gl.constexpr = D**-0.5 * LOG2E
    dtype: gl.constexpr = dk.dtype.element_ty
    _, _, count, _, first, begin, steps = _tile_of_keys(position, length, HKV, T, P, W, tiles, BT)
    first += ROWS * C
    base = first - P
    queries = gl.arange(0, BT, gl.SliceLayout(0, SCORES))
    # The tiles of queries that see this consumer's keys; none if they lie behind the last one.
    low = gl.minimum((gl.maximum(first - P, 0) - begin) // BT, steps)
    end = gl.minimum(first + ROWS - 1 - P + W, count)
    high = gl.maximum((end - begin + BT - 1) // BT, low)
    none = gl.zeros([ROWS, BT], gl.float32, SCORES)
    acc_k, acc_v = gl.zeros([ROWS, D], gl.float32, RESULT), gl.zeros([ROWS, D], gl.float32, RESULT)
    keys, values = rows_of(k_tiles, C, D), rows_of(v_tiles, C, D)
    mbarrier.wait(kv_full.index(C), 0)
    for h in range(H // HKV):
        at = h * steps
        for i in range(low):
            await_filled(full, at + i, STAGES)
            release(empty, at + i, STAGES)
        for i in range(low, high):
            start = begin + i * BT
            place = (at + i) % STAGES
            await_filled(full, at + i, STAGES)
            q, do = rows_of(q_ring, place, D), rows_of(do_ring, place, D)
            scores = warpgroup_mma(keys, q.permute((1, 0)), none, use_acc=False, is_async=True)
            slopes = warpgroup_mma(values, do.permute((1, 0)), none, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(1, [scores])
            level = lse_ring.index(place).reshape([BT]).load(gl.SliceLayout(0, SCORES))
            if start + BT > count:
                # Rows without a token see nothing.
                level = gl.where(start + queries < count, level, 1e30)
            weights = softmax_weights(scores, FACTOR, level[None, :], False)
            if (start < base + ROWS - 1) | (start > base + W - BT):
                row = gl.arange(0, ROWS, gl.SliceLayout(1, SCORES)) + (base - start)
                distance = (queries[None, :] - row[:, None]).to(gl.uint32, bitcast=True)
                weights = gl.where(distance < W.to(gl.uint32), weights, 0.0)
            acc_v = warpgroup_mma(gl.convert_layout(weights.to(dtype), WEIGHTS), do, acc_v, is_async=True)
            slopes = warpgroup_mma_wait(1, [slopes])
            shift = delta_ring.index(place).reshape([BT]).load(gl.SliceLayout(0, SCORES))
            if start + BT > count:
                # Nothing has been written for rows without a token.
                shift = gl.where(start + queries < count, shift, 0.0)
            slopes = weights * (slopes - shift[None, :])
            acc_k = warpgroup_mma(gl.convert_layout(slopes.to(dtype), WEIGHTS), q, acc_k, is_async=True)
            acc_k, acc_v = warpgroup_mma_wait(0, [acc_k, acc_v])
            release(empty, at + i, STAGES)
        for i in range(high, steps):
            await_filled(full, at + i, STAGES)
            release(empty, at + i, STAGES)
    # Not kept in registers meanwhile.
    b, hkv, _, floor, first, _, _ = _tile_of_keys(position, length, HKV, T, P, W, tiles, BT)
    first += ROWS * C
    line, column = gl.arange(0, ROWS, gl.SliceLayout(1, FLAT)), gl.arange(0, D, gl.SliceLayout(0, FLAT))
    places = ((b * HKV + hkv) * (T + P) + first) * D + line[:, None] * D + column[None, :]
    stored = (first + line < T + P)[:, None]
    # Slots before the row's first token hold no key.
    held = (first + line >= floor)[:, None]
    result = gl.where(held, gl.convert_layout(acc_v.to(dtype), FLAT), 0.0)
    gl.store(dv + places, result, mask=stored)
    result = gl.where(held, gl.convert_layout((acc_k * D**-0.5).to(dtype), FLAT), 0.0)
    gl.store(dk + places, result, mask=stored)


@gluon.jit(do_not_specialize=["H", "HKV", "T", "P", "W", "tiles"])
def _infini_attention_backward_keys_hopper_kernel(
    q, do, k, v, lse, delta, dk, dv, position, length, H, HKV, T, P, W, tiles,
    D: gl.constexpr, BT: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    k_tiles = gl.allocate_shared_memory(k.dtype, [CONSUMERS, 1, 1, ROWS, D], k.layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [CONSUMERS, 1, 1, ROWS, D], v.layout)
    q_ring = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, BT, D], q.layout)
    do_ring = gl.allocate_shared_memory(do.dtype, [STAGES, 1, 1, BT, D], do.layout)
    lse_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 1, BT], lse.layout)
    delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 1, BT], delta.layout)
    kv_full, full, empty = barriers(CONSUMERS, 1), barriers(STAGES, 1), barriers(STAGES, CONSUMERS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                dk, dv, position, length, k_tiles, v_tiles, q_ring, do_ring, lse_ring, delta_ring, kv_full,
                full, empty, H, HKV, T, P, W, tiles, 0, D, BT, STAGES,
            )),
            (_consume, (
                dk, dv, position, length, k_tiles, v_tiles, q_ring, do_ring, lse_ring, delta_ring, kv_full,
                full, empty, H, HKV, T, P, W, tiles, 1, D, BT, STAGES,
            )),
            (_produce, (
                q, do, k, v, lse, delta, position, length, k_tiles, v_tiles, q_ring, do_ring, lse_ring,
                delta_ring, kv_full, full, empty, H, HKV, T, P, W, tiles, D, BT, STAGES,
            )),
        ],
        [4, 1], [REGISTERS, 24],
    )  # fmt: skip


def key_gradients(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, layout: Attention
) -> tuple[Tensor, Tensor]:
    """:func:`newllm.kernels.attention_backward_keys.key_gradients`."""
    (batch, heads, tokens, width), (kv_heads, slots) = q.shape, k.shape[1:3]
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    sizes = SIZES[width]
    rows = sizes["BT"]
    per_head = -(-slots // (ROWS.value * CONSUMERS.value))
    _infini_attention_backward_keys_hopper_kernel[(batch * kv_heads * per_head,)](
        tiles(q, rows), tiles(do, rows), tiles(k), tiles(v), numbers(lse, rows), numbers(delta, rows),
        dk, dv, layout.position, layout.length, heads, kv_heads, tokens, slots - tokens, layout.reach,
        per_head, D=width, **sizes, REGISTERS=REGISTERS, num_warps=4, maxnreg=LIMIT,
    )  # fmt: skip
    return dk, dv
