"""Gradients of the queries on Hopper: two heads of a group share each tile of keys."""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from newllm.kernels.attention_backward_prepare import Prepared
from newllm.kernels.attention_hopper import (
    CONSUMERS,
    LIMIT,
    REGISTERS,
    ROWS,
    await_filled,
    barriers,
    fetch,
    fill,
    processors,
    queries_and_keys,
    release,
    rows_of,
    synchronize,
    tiles,
)
from newllm.kernels.attention_layout import NO_MEMORY, Attention, Recall, Rope, rope_arguments
from newllm.kernels.attention_tiles import hide, softmax_weights
from newllm.kernels.common import LOG2E, exponential

STAGES = 3


@gluon.jit
def _produce(
    q, do, keys, v, states, position, length, q_tiles, do_tiles, k_ring, v_ring, q_full, q_empty, k_full,
    k_empty, v_full, v_empty, H, HKV, T, P, S, W, N, tiles, total,
    D: gl.constexpr, SEGMENTED: gl.constexpr, MEMORY: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    k_step, v_step = 0, 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        visit = tile // gl.num_programs(0)
        b, h, segment, first, _, _, _, start, steps = queries_and_keys(
            tile, tiles, position, length, H, T, P, S, W, N, SEGMENTED
        )
        hkv = h // (H // HKV)
        for c in gl.static_range(CONSUMERS):
            bar = q_full.index(c)
            mbarrier.wait(q_empty.index(c), visit & 1 ^ 1)
            mbarrier.expect(bar, 2 * ROWS * D * 2)
            fetch(q, b, h + c, first, bar, q_tiles.index(c))
            fetch(do, b, h + c, first, bar, do_tiles.index(c))
        if MEMORY:
            # The memory's matrix is multiplied as values are.
            for part in gl.static_range(D // ROWS):
                row = segment * D + part * ROWS
                fill(states, b, hkv, row, v_ring, v_full, v_empty, v_step, D, STAGES)
                v_step += 1
        for i in range(steps):
            fill(keys, b, hkv, start + i * ROWS, k_ring, k_full, k_empty, k_step + i, D, STAGES)
            fill(v, b, hkv, start + i * ROWS, v_ring, v_full, v_empty, v_step + i, D, STAGES)
        k_step += steps
        v_step += steps


@gluon.jit
def _consume(
    raw, lse, delta, pulls, shares, dq, dfeature, cos, sin, norms, scale, bias, position, length, raw_strides,
    q_tiles, do_tiles, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty, rope_batch,
    rope_row, H, HKV, T, P, S, W, N, tiles, total,
    C: gl.constexpr, D: gl.constexpr, SEGMENTED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    HALF: gl.constexpr = D // 2
    PLAIN: gl.constexpr = gl.BlockedLayout([1, 4], [512 // D, D // 16], [4, 1], [1, 0])
    dtype: gl.constexpr = dq.dtype.element_ty
    k_step, v_step = 0, 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        visit = tile // gl.num_programs(0)
        b, h, segment, first, end, count, floor, start, steps = queries_and_keys(
            tile, tiles, position, length, H, T, P, S, W, N, SEGMENTED
        )
        hkv = h // (H // HKV)
        h += C
        own = gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        base = (b * H + h) * T + first
        real = first + own < gl.minimum(end, count)
        level = gl.load(lse + base + own, mask=real, other=0.0)
        shift = gl.load(delta + base + own, mask=real, other=0.0)
        mbarrier.wait(q_full.index(C), visit & 1)
        queries, gradient = rows_of(q_tiles, C, D).load(LEFT), rows_of(do_tiles, C, D).load(LEFT)
        fence_async_shared()
        mbarrier.arrive(q_empty.index(C))
        if norms is not None:
            # The memory's share waits where the queries lay, not in registers that the window's loop needs.
            _store_recall_gradient(
                gradient, raw + b * raw_strides[0] + h * raw_strides[1], raw_strides[2],
                norms + ((b * HKV + hkv) * N + segment) * D, pulls + base, shares + base, scale, bias,
                dq + base * D, dfeature, ((b * H + h) * tiles + tile % tiles) * 2, v_ring, v_full, v_empty,
                v_step, hkv, first, end, count, T, D, STAGES,
            )  # fmt: skip
            v_step += D // ROWS
        acc = _attend_backward(
            queries, gradient, level, shift, k_ring, v_ring, k_full, k_empty, v_full, v_empty, k_step, v_step,
            first, start, steps, floor, P, W, D, STAGES,
        )  # fmt: skip
        k_step += steps
        v_step += steps
        left, right = (acc * D**-0.5).reshape([ROWS, 2, HALF]).permute([0, 2, 1]).split()
        left, right = gl.convert_layout(left, PLAIN), gl.convert_layout(right, PLAIN)
        line, element = (
            gl.arange(0, ROWS, gl.SliceLayout(1, PLAIN)),
            gl.arange(0, HALF, gl.SliceLayout(0, PLAIN)),
        )
        if cos is not None:
            at = gl.minimum(first + line, T - 1)
            row = (b * rope_batch + at * rope_row)[:, None] + element[None, :]
            x, y = left, right
            left = x * gl.load(cos + row) + y * gl.load(sin + row + HALF)
            right = y * gl.load(cos + row + HALF) - x * gl.load(sin + row)
        places = dq + base * D + line[:, None] * D + element[None, :]
        stored, kept = (first + line < end)[:, None], (first + line < count)[:, None]
        if norms is not None:
            synchronize()
            left += gl.load(places, mask=stored, other=0.0).to(gl.float32)
            right += gl.load(places + HALF, mask=stored, other=0.0).to(gl.float32)
        gl.store(places, gl.where(kept, left, 0.0).to(dtype), mask=stored)
        gl.store(places + HALF, gl.where(kept, right, 0.0).to(dtype), mask=stored)


@gluon.jit
def _store_recall_gradient(
    gradient, raw, raw_row, norm, pulls, shares, scale, bias, dq, dfeature, place, v_ring, v_full, v_empty,
    v_step, hkv, first, end, count, T, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Store the gradient of raw queries through the memory, and their shares of scale's and bias's."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    line, element = (
        gl.arange(0, ROWS, gl.SliceLayout(1, SCORES)),
        gl.arange(0, ROWS, gl.SliceLayout(0, SCORES)),
    )
    real = first + line < gl.minimum(end, count)
    pull = gl.load(pulls + line, mask=real, other=0.0)[:, None]
    share = gl.load(shares + line, mask=real, other=0.0)[:, None]
    a, o = 1.0, 0.0
    if scale is not None:
        a, o = gl.load(scale + hkv), gl.load(bias + hkv)
    none = gl.zeros([ROWS, ROWS], gl.float32, SCORES)
    by_bias, by_scale = gl.sum(none, 1), gl.sum(none, 1)
    at = gl.minimum(first + line, T - 1).to(gl.int64)
    for part in gl.static_range(D // ROWS):
        # [ROWS, ROWS]
        x = gl.load(raw + (at * raw_row)[:, None] + (part * ROWS + element)[None, :]).to(gl.float32)
        await_filled(v_full, v_step + part, STAGES)
        matrix = rows_of(v_ring, (v_step + part) % STAGES, D)
        slope = warpgroup_mma(gradient, matrix.permute((1, 0)), none, use_acc=False, is_async=True)
        slope = warpgroup_mma_wait(0, [slope])
        release(v_empty, v_step + part, STAGES)
        slope = slope - pull * gl.load(norm + part * ROWS + element)[None, :]
        slope = slope * share * exponential(gl.minimum(x * a + o, 0.0), False)
        if scale is not None:
            by_bias += gl.sum(slope, 1)
            by_scale += gl.sum(slope * x, 1)
        places = dq + line[:, None] * D + (part * ROWS + element)[None, :]
        gl.store(places, (slope * a).to(dq.dtype.element_ty), mask=(first + line < end)[:, None])
    if scale is not None:
        gl.store(dfeature + place, gl.sum(by_scale, 0))
        gl.store(dfeature + place + 1, gl.sum(by_bias, 0))


@gluon.jit
def _begin_product(rows, ring, full, step, D: gl.constexpr, STAGES: gl.constexpr):
    """Begin the products of ``rows`` with those of a ring's tile: [ROWS, ROWS]."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    none = gl.zeros([ROWS, ROWS], gl.float32, SCORES)
    await_filled(full, step, STAGES)
    others = rows_of(ring, step % STAGES, D)
    return warpgroup_mma(rows, others.permute((1, 0)), none, use_acc=False, is_async=True)


@gluon.jit
def _attend_backward(
    queries, gradient, level, shift, k_ring, v_ring, k_full, k_empty, v_full, v_empty, k_step, v_step, first,
    start, steps, floor, P, W, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The gradient of rotated queries by the window's exponents, times the square root of D.

    A step's scores are begun before the last step's slopes meet its keys, as in the forward pass.
    """
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    SLOPES: gl.constexpr = gl.DotOperandLayout(0, RESULT, 2)
    full = gl.maximum(floor, first + ROWS + P - W)
    acc = gl.zeros([ROWS, D], gl.float32, RESULT)
    scores = _begin_product(queries, k_ring, k_full, k_step, D, STAGES)
    slopes = _begin_product(gradient, v_ring, v_full, v_step, D, STAGES)
    scores = warpgroup_mma_wait(1, [scores])
    weights = _weigh(scores, level, first, start, floor, P, W, True, D)
    slopes = warpgroup_mma_wait(0, [slopes])
    release(v_empty, v_step, STAGES)
    ready = gl.convert_layout((weights * (slopes - shift[:, None])).to(queries.dtype), SLOPES)
    for i in range(1, steps):
        at = start + i * ROWS
        scores = _begin_product(queries, k_ring, k_full, k_step + i, D, STAGES)
        slopes = _begin_product(gradient, v_ring, v_full, v_step + i, D, STAGES)
        acc = warpgroup_mma(ready, rows_of(k_ring, (k_step + i - 1) % STAGES, D), acc, is_async=True)
        scores = warpgroup_mma_wait(2, [scores])
        edge = (at < full) | (at + ROWS > first + P + 1)
        weights = _weigh(scores, level, first, at, floor, P, W, edge, D)
        slopes = warpgroup_mma_wait(1, [slopes])
        release(v_empty, v_step + i, STAGES)
        following = gl.convert_layout((weights * (slopes - shift[:, None])).to(queries.dtype), SLOPES)
        acc = warpgroup_mma_wait(0, [acc])
        release(k_empty, k_step + i - 1, STAGES)
        ready = following
    acc = warpgroup_mma(ready, rows_of(k_ring, (k_step + steps - 1) % STAGES, D), acc, is_async=True)
    acc = warpgroup_mma_wait(0, [acc])
    release(k_empty, k_step + steps - 1, STAGES)
    return acc


@gluon.jit
def _weigh(scores, level, first, start, floor, P, W, edge, D: gl.constexpr):
    SCORES: gl.constexpr = scores.type.layout
    weights = softmax_weights(scores, D**-0.5 * LOG2E, level[:, None], False)
    if edge:
        row, slot = (
            gl.arange(0, ROWS, gl.SliceLayout(1, SCORES)),
            gl.arange(0, ROWS, gl.SliceLayout(0, SCORES)),
        )
        weights = hide(weights, first + P + row, start + slot, floor, W, 0.0)
    return weights


@gluon.jit(do_not_specialize=["H", "HKV", "T", "P", "S", "W", "N", "tiles", "total"])
def _infini_attention_backward_queries_hopper_kernel(
    q, do, keys, v, states, raw, lse, delta, pulls, shares, dq, dfeature, cos, sin, norms, scale, bias,
    position, length, raw_strides, rope_batch, rope_row, H, HKV, T, P, S, W, N, tiles, total,
    D: gl.constexpr, SEGMENTED: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    q_tiles = gl.allocate_shared_memory(q.dtype, [CONSUMERS, 1, 1, ROWS, D], q.layout)
    do_tiles = gl.allocate_shared_memory(do.dtype, [CONSUMERS, 1, 1, ROWS, D], do.layout)
    k_ring = gl.allocate_shared_memory(keys.dtype, [STAGES, 1, 1, ROWS, D], keys.layout)
    v_ring = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, ROWS, D], v.layout)
    q_full, q_empty = barriers(CONSUMERS, 1), barriers(CONSUMERS, 1)
    k_full, k_empty = barriers(STAGES, 1), barriers(STAGES, CONSUMERS)
    v_full, v_empty = barriers(STAGES, 1), barriers(STAGES, CONSUMERS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                raw, lse, delta, pulls, shares, dq, dfeature, cos, sin, norms, scale, bias, position, length,
                raw_strides, q_tiles, do_tiles, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full,
                v_empty, rope_batch, rope_row, H, HKV, T, P, S, W, N, tiles, total, 0, D, SEGMENTED, STAGES,
            )),
            (_consume, (
                raw, lse, delta, pulls, shares, dq, dfeature, cos, sin, norms, scale, bias, position, length,
                raw_strides, q_tiles, do_tiles, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full,
                v_empty, rope_batch, rope_row, H, HKV, T, P, S, W, N, tiles, total, 1, D, SEGMENTED, STAGES,
            )),
            (_produce, (
                q, do, keys, v, states, position, length, q_tiles, do_tiles, k_ring, v_ring, q_full, q_empty,
                k_full, k_empty, v_full, v_empty, H, HKV, T, P, S, W, N, tiles, total,
                D, SEGMENTED, states is not None, STAGES,
            )),
        ],
        [4, 1], [REGISTERS, 24],
    )  # fmt: skip


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
    """:func:`newllm.kernels.attention_backward_queries.query_gradients`."""
    (batch, heads, tokens, width), (kv_heads, slots) = q.shape, k.shape[1:3]
    per_head = layout.query_tiles(tokens, ROWS.value)
    total = batch * heads // CONSUMERS.value * per_head
    recall = memory or NO_MEMORY
    states = None if recall.states is None else tiles(recall.states.flatten(2, 3))
    dfeature = None
    if recall.scale is not None:
        dfeature = ready.delta.new_empty(batch, kv_heads, heads // kv_heads * per_head, 2)
    cos, sin, rope_strides = rope_arguments(rope, tokens)
    _infini_attention_backward_queries_hopper_kernel[(min(processors(q.device), total),)](
        tiles(rotated), tiles(do), tiles(k), tiles(v), states, q, lse, ready.delta, ready.pull, ready.share,
        dq, dfeature, cos, sin, recall.norms, recall.scale, recall.bias, layout.position, layout.length,
        q.stride()[:3], *rope_strides, heads, kv_heads, tokens, slots - tokens, layout.segment, layout.reach,
        layout.segments(tokens), per_head, total,
        D=width, SEGMENTED=layout.segmented, STAGES=STAGES, REGISTERS=REGISTERS, num_warps=4, maxnreg=LIMIT,
    )  # fmt: skip
    return None if dfeature is None else dfeature.sum((0, 2)).T
