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
    await_place,
    barriers,
    fetch,
    fetch_numbers,
    filled,
    number_source,
    release,
    ring,
    tile_of,
    tile_source,
)
from newllm.kernels.attention_layout import Attention
from newllm.kernels.attention_tiles import row_facts, softmax_weights
from newllm.kernels.common import LOG2E

# Queries of a tile and places of the ring, by width.
SIZES = {64: {"BT": 64, "STAGES": 4}, 128: {"BT": 64, "STAGES": 2}}


@gluon.jit
def _tile_of_keys(facts, sizes, BT: gl.constexpr):
    """Where the program's tiles of keys lie, and which tiles of queries see them.

    Returns the row's index in the batch, the keys' head, the number of real queries, the first slot with a
    key, the program's first slot, the first query of the first tile and the number of tiles.
    """
    position, length = facts
    _, HKV, T, P, W, per_head = sizes
    head = (gl.program_id(0) // per_head).to(gl.int64)
    b, hkv = head // HKV, head % HKV
    _, count, floor = row_facts(position, length, b, T, P)
    first = gl.program_id(0) % per_head * (ROWS * CONSUMERS)
    begin = gl.maximum(first - P, 0) // BT * BT
    end = gl.minimum(first + ROWS * CONSUMERS - 1 - P + W, count)
    return b, hkv, count, floor, first, begin, gl.maximum((end - begin + BT - 1) // BT, 0)


@gluon.jit
def _produce(q, do, k, v, lse, delta, own_k, own_v, q_ring, do_places, levels, shifts, facts, sizes):
    H, HKV, _, _, _, _ = sizes
    places, _, _ = q_ring
    N: gl.constexpr = places.shape[0]
    BT: gl.constexpr = places.shape[3]
    D: gl.constexpr = places.shape[4]
    b, hkv, _, _, first, begin, steps = _tile_of_keys(facts, sizes, BT)
    k_places, full = own_k
    for c in gl.static_range(CONSUMERS):
        mbarrier.expect(full.index(c), 2 * ROWS * D * 2)
        fetch(k, b, hkv, first + c * ROWS, full.index(c), k_places.index(c))
        fetch(v, b, hkv, first + c * ROWS, full.index(c), own_v.index(c))
    group = H // HKV
    for step in range(group * steps):
        h = hkv * group + step // steps
        row = begin + step % steps * BT
        place = step % N
        bar = await_place(q_ring, step, 2 * BT * D * 2 + 2 * BT * 4)
        fetch(q, b, h, row, bar, places.index(place))
        fetch_numbers(lse, b, h, row, bar, levels.index(place))
        fetch(do, b, h, row, bar, do_places.index(place))
        fetch_numbers(delta, b, h, row, bar, shifts.index(place))


@gluon.jit
def _consume(dk, dv, own_k, own_v, q_ring, do_places, levels, shifts, facts, sizes, C: gl.constexpr):
    H, HKV, T, P, W, _ = sizes
    places, _, _ = q_ring
    N: gl.constexpr = places.shape[0]
    BT: gl.constexpr = places.shape[3]
    D: gl.constexpr = places.shape[4]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, RESULT, 2)
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    FACTOR: gl.constexpr = D**-0.5 * LOG2E
    dtype: gl.constexpr = dk.dtype.element_ty
    _, _, count, _, first, begin, steps = _tile_of_keys(facts, sizes, BT)
    first += ROWS * C
    base = first - P
    queries = gl.arange(0, BT, gl.SliceLayout(0, SCORES))
    # The tiles of queries that see this consumer's keys; none if they lie behind the last one.
    low = gl.minimum((gl.maximum(base, 0) - begin) // BT, steps)
    end = gl.minimum(base + ROWS - 1 + W, count)
    high = gl.maximum((end - begin + BT - 1) // BT, low)
    none = gl.zeros([ROWS, BT], gl.float32, SCORES)
    acc_k, acc_v = gl.zeros([ROWS, D], gl.float32, RESULT), gl.zeros([ROWS, D], gl.float32, RESULT)
    k_places, full = own_k
    keys, values = tile_of(k_places, C), tile_of(own_v, C)
    mbarrier.wait(full.index(C), 0)
    for h in range(H // HKV):
        at = h * steps
        for i in range(low):
            filled(q_ring, at + i)
            release(q_ring, at + i)
        for i in range(low, high):
            start = begin + i * BT
            place = (at + i) % N
            q, do = filled(q_ring, at + i), tile_of(do_places, place)
            scores = warpgroup_mma(keys, q.permute((1, 0)), none, use_acc=False, is_async=True)
            slopes = warpgroup_mma(values, do.permute((1, 0)), none, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(1, [scores])
            level = levels.index(place).reshape([BT]).load(gl.SliceLayout(0, SCORES))
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
            shift = shifts.index(place).reshape([BT]).load(gl.SliceLayout(0, SCORES))
            if start + BT > count:
                # Nothing has been written for rows without a token.
                shift = gl.where(start + queries < count, shift, 0.0)
            slopes = weights * (slopes - shift[None, :])
            acc_k = warpgroup_mma(gl.convert_layout(slopes.to(dtype), WEIGHTS), q, acc_k, is_async=True)
            acc_k, acc_v = warpgroup_mma_wait(0, [acc_k, acc_v])
            release(q_ring, at + i)
        for i in range(high, steps):
            filled(q_ring, at + i)
            release(q_ring, at + i)
    # Not kept in registers meanwhile.
    b, hkv, _, floor, first, _, _ = _tile_of_keys(facts, sizes, BT)
    first += ROWS * C
    line, column = gl.arange(0, ROWS, gl.SliceLayout(1, FLAT)), gl.arange(0, D, gl.SliceLayout(0, FLAT))
    target = ((b * HKV + hkv) * (T + P) + first) * D + line[:, None] * D + column[None, :]
    stored = (first + line < T + P)[:, None]
    # Slots before the row's first token hold no key.
    held = (first + line >= floor)[:, None]
    result = gl.where(held, gl.convert_layout(acc_v.to(dtype), FLAT), 0.0)
    gl.store(dv + target, result, mask=stored)
    result = gl.where(held, gl.convert_layout((acc_k * D**-0.5).to(dtype), FLAT), 0.0)
    gl.store(dk + target, result, mask=stored)


@gluon.jit(do_not_specialize=["H", "HKV", "T", "P", "W", "per_head"])
def _infini_attention_backward_keys_hopper_kernel(
    q, do, k, v, lse, delta, dk, dv, position, length, H, HKV, T, P, W, per_head,
    D: gl.constexpr, BT: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    # Filled once. A barrier for places that are free again would be dead at once, and a tile take its memory:
    # where a device changes between processes, it writes what a barrier was made with once more.
    own_k = gl.allocate_shared_memory(k.dtype, [CONSUMERS, 1, 1, ROWS, D], k.layout), barriers(CONSUMERS, 1)
    q_ring = ring(q, STAGES, BT, D)
    # Filled along with keys and queries.
    own_v = gl.allocate_shared_memory(v.dtype, [CONSUMERS, 1, 1, ROWS, D], v.layout)
    do_places = gl.allocate_shared_memory(do.dtype, [STAGES, 1, 1, BT, D], do.layout)
    levels = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 1, BT], lse.layout)
    shifts = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 1, BT], delta.layout)
    fence_async_shared()
    facts, sizes = (position, length), (H, HKV, T, P, W, per_head)
    gl.warp_specialize(
        [
            (_consume, (dk, dv, own_k, own_v, q_ring, do_places, levels, shifts, facts, sizes, 0)),
            (_consume, (dk, dv, own_k, own_v, q_ring, do_places, levels, shifts, facts, sizes, 1)),
            (_produce, (
                q, do, k, v, lse, delta, own_k, own_v, q_ring, do_places, levels, shifts, facts, sizes,
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
        tile_source(q, rows), tile_source(do, rows), tile_source(k), tile_source(v),
        number_source(lse, rows), number_source(delta, rows),
        dk, dv, layout.position, layout.length, heads, kv_heads, tokens, slots - tokens, layout.reach,
        per_head, D=width, **sizes, REGISTERS=REGISTERS, num_warps=4, maxnreg=LIMIT,
    )  # fmt: skip
    return dk, dv
