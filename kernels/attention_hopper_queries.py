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
    fetch,
    fill,
    filled,
    hide_at_edge,
    processors,
    queries_and_keys,
    release,
    ring,
    seen,
    synchronize,
    tile_of,
    tile_source,
)
from newllm.kernels.attention_layout import NO_MEMORY, Attention, Recall, Rope, rope_arguments
from newllm.kernels.attention_tiles import softmax_weights
from newllm.kernels.common import LOG2E, exponential

STAGES = 3


@gluon.jit
def _produce(q, do, keys, v, states, own, own_do, k_ring, v_ring, facts, sizes, SEGMENTED: gl.constexpr):
    H, HKV, _, _, _, _, _, _, total = sizes
    places, full, empty = own
    D: gl.constexpr = places.shape[4]
    k_step, v_step = 0, 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        visit = tile // gl.num_programs(0)
        b, h, segment, first, _, _, _, start, steps = queries_and_keys(tile, facts, sizes, SEGMENTED)
        hkv = h // (H // HKV)
        for c in gl.static_range(CONSUMERS):
            mbarrier.wait(empty.index(c), visit & 1 ^ 1)
            mbarrier.expect(full.index(c), 2 * ROWS * D * 2)
            fetch(q, b, h + c, first, full.index(c), places.index(c))
            fetch(do, b, h + c, first, full.index(c), own_do.index(c))
        if states is not None:
            # The memory's matrix is multiplied as values are.
            for part in gl.static_range(D // ROWS):
                fill(states, b, hkv, segment * D + part * ROWS, v_ring, v_step)
                v_step += 1
        for i in range(steps):
            fill(keys, b, hkv, start + i * ROWS, k_ring, k_step + i)
            fill(v, b, hkv, start + i * ROWS, v_ring, v_step + i)
        k_step += steps
        v_step += steps


@gluon.jit
def _consume(
    raw, lse, delta, pulls, shares, dq, dfeature, cos, sin, norms, scale, bias, raw_strides, own, own_do,
    k_ring, v_ring, facts, rope, sizes, C: gl.constexpr, SEGMENTED: gl.constexpr,
):  # fmt: skip
    H, HKV, T, P, _, W, N, per_head, total = sizes
    places, full, empty = own
    D: gl.constexpr = places.shape[4]
    HALF: gl.constexpr = D // 2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    PLAIN: gl.constexpr = gl.BlockedLayout([1, 4], [512 // D, D // 16], [4, 1], [1, 0])
    dtype: gl.constexpr = dq.dtype.element_ty
    k_step, v_step = 0, 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        visit = tile // gl.num_programs(0)
        b, h, segment, first, end, count, floor, start, steps = queries_and_keys(
            tile, facts, sizes, SEGMENTED
        )
        hkv = h // (H // HKV)
        h += C
        base = (b * H + h) * T + first
        line = gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        real = first + line < gl.minimum(end, count)
        level = gl.load(lse + base + line, mask=real, other=0.0)
        shift = gl.load(delta + base + line, mask=real, other=0.0)
        mbarrier.wait(full.index(C), visit & 1)
        queries, gradient = tile_of(places, C).load(LEFT), tile_of(own_do, C).load(LEFT)
        fence_async_shared()
        mbarrier.arrive(empty.index(C))
        if norms is not None:
            # The memory's share waits where the queries lay, not in registers that the window's loop needs.
            _store_recall_gradient(
                gradient, raw + b * raw_strides[0] + h * raw_strides[1], raw_strides[2],
                norms + ((b * HKV + hkv) * N + segment) * D, pulls + base, shares + base, scale, bias,
                dq + base * D, dfeature, ((b * H + h) * per_head + tile % per_head) * 2, v_ring, v_step, hkv,
                first, end, count, T,
            )  # fmt: skip
            v_step += D // ROWS
        view = (first, start, steps, floor, P, W)
        acc = _attend_backward(queries, gradient, level, shift, k_ring, v_ring, k_step, v_step, view)
        k_step += steps
        v_step += steps
        left, right = (acc * D**-0.5).reshape([ROWS, 2, HALF]).permute([0, 2, 1]).split()
        left, right = gl.convert_layout(left, PLAIN), gl.convert_layout(right, PLAIN)
        line = gl.arange(0, ROWS, gl.SliceLayout(1, PLAIN))
        element = gl.arange(0, HALF, gl.SliceLayout(0, PLAIN))
        if cos is not None:
            at = gl.minimum(first + line, T - 1).to(gl.int64)
            place = (b * rope[0] + at * rope[1])[:, None] + element[None, :]
            x, y = left, right
            left = x * gl.load(cos + place) + y * gl.load(sin + place + HALF)
            right = y * gl.load(cos + place + HALF) - x * gl.load(sin + place)
        target = dq + base * D + line[:, None] * D + element[None, :]
        stored, kept = (first + line < end)[:, None], (first + line < count)[:, None]
        if norms is not None:
            # Stored by other threads.
            synchronize()
            left += gl.load(target, mask=stored, other=0.0).to(gl.float32)
            right += gl.load(target + HALF, mask=stored, other=0.0).to(gl.float32)
        gl.store(target, gl.where(kept, left, 0.0).to(dtype), mask=stored)
        gl.store(target + HALF, gl.where(kept, right, 0.0).to(dtype), mask=stored)


@gluon.jit
def _store_recall_gradient(
    gradient, raw, raw_row, norm, pulls, shares, scale, bias, dq, dfeature, place, v_ring, v_step, hkv, first,
    end, count, T,
):  # fmt: skip
    """Store the gradient of raw queries through the memory, and their shares of scale's and bias's."""
    D: gl.constexpr = gradient.shape[1]
    SCORES: gl.constexpr = gradient.type.layout.parent
    line = gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    element = gl.arange(0, ROWS, gl.SliceLayout(0, SCORES))
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
        slope = warpgroup_mma_wait(0, [_begin_product(gradient, filled(v_ring, v_step + part))])
        release(v_ring, v_step + part)
        slope = slope - pull * gl.load(norm + part * ROWS + element)[None, :]
        slope = slope * share * exponential(gl.minimum(x * a + o, 0.0), False)
        if scale is not None:
            by_bias += gl.sum(slope, 1)
            by_scale += gl.sum(slope * x, 1)
        target = dq + line[:, None] * D + (part * ROWS + element)[None, :]
        gl.store(target, (slope * a).to(dq.dtype.element_ty), mask=(first + line < end)[:, None])
    if scale is not None:
        gl.store(dfeature + place, gl.sum(by_scale, 0))
        gl.store(dfeature + place + 1, gl.sum(by_bias, 0))


@gluon.jit
def _begin_product(rows, others):
    """Begin the products of ``rows`` with those of a tile: [ROWS, ROWS]."""
    SCORES: gl.constexpr = rows.type.layout.parent
    none = gl.zeros([ROWS, ROWS], gl.float32, SCORES)
    return warpgroup_mma(rows, others.permute((1, 0)), none, use_acc=False, is_async=True)


@gluon.jit
def _attend_backward(queries, gradient, level, shift, k_ring, v_ring, k_step, v_step, view):
    """The gradient of rotated queries by the window's exponents, times the square root of D.

    A step's scores are begun before the last step's slopes meet its keys, as in the forward pass.
    """
    first, start, steps, floor, P, W = view
    D: gl.constexpr = queries.shape[1]
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    SLOPES: gl.constexpr = gl.DotOperandLayout(0, RESULT, 2)
    full = gl.maximum(floor, first + ROWS + P - W)
    acc = gl.zeros([ROWS, D], gl.float32, RESULT)
    scores = _begin_product(queries, filled(k_ring, k_step))
    slopes = _begin_product(gradient, filled(v_ring, v_step))
    scores = warpgroup_mma_wait(1, [scores])
    weights = _weigh(scores, level, first, start, floor, P, W, True, D)
    slopes = warpgroup_mma_wait(0, [slopes])
    release(v_ring, v_step)
    ready = gl.convert_layout((weights * (slopes - shift[:, None])).to(queries.dtype), SLOPES)
    for i in range(1, steps):
        at = start + i * ROWS
        scores = _begin_product(queries, filled(k_ring, k_step + i))
        slopes = _begin_product(gradient, filled(v_ring, v_step + i))
        acc = warpgroup_mma(ready, seen(k_ring, k_step + i - 1), acc, is_async=True)
        scores = warpgroup_mma_wait(2, [scores])
        edge = (at < full) | (at + ROWS > first + P + 1)
        weights = _weigh(scores, level, first, at, floor, P, W, edge, D)
        slopes = warpgroup_mma_wait(1, [slopes])
        release(v_ring, v_step + i)
        following = gl.convert_layout((weights * (slopes - shift[:, None])).to(queries.dtype), SLOPES)
        acc = warpgroup_mma_wait(0, [acc])
        release(k_ring, k_step + i - 1)
        ready = following
    acc = warpgroup_mma(ready, seen(k_ring, k_step + steps - 1), acc, is_async=True)
    acc = warpgroup_mma_wait(0, [acc])
    release(k_ring, k_step + steps - 1)
    return acc


@gluon.jit
def _weigh(scores, level, first, start, floor, P, W, edge, D: gl.constexpr):
    """A tile's weights."""
    weights = softmax_weights(scores, D**-0.5 * LOG2E, level[:, None], False)
    return hide_at_edge(weights, first, start, floor, P, W, edge)


@gluon.jit(do_not_specialize=["H", "HKV", "T", "P", "S", "W", "N", "per_head", "total"])
def _infini_attention_backward_queries_hopper_kernel(
    q, do, keys, v, states, raw, lse, delta, pulls, shares, dq, dfeature, cos, sin, norms, scale, bias,
    position, length, raw_strides, rope_batch, rope_row, H, HKV, T, P, S, W, N, per_head, total,
    D: gl.constexpr, SEGMENTED: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    own = ring(q, CONSUMERS, ROWS, D, 1)
    # Filled along with the queries.
    own_do = gl.allocate_shared_memory(do.dtype, [CONSUMERS, 1, 1, ROWS, D], do.layout)
    k_ring, v_ring = ring(keys, STAGES, ROWS, D), ring(v, STAGES, ROWS, D)
    fence_async_shared()
    facts, rope, sizes = (position, length), (rope_batch, rope_row), (H, HKV, T, P, S, W, N, per_head, total)
    gl.warp_specialize(
        [
            (_consume, (
                raw, lse, delta, pulls, shares, dq, dfeature, cos, sin, norms, scale, bias, raw_strides, own,
                own_do, k_ring, v_ring, facts, rope, sizes, 0, SEGMENTED,
            )),
            (_consume, (
                raw, lse, delta, pulls, shares, dq, dfeature, cos, sin, norms, scale, bias, raw_strides, own,
                own_do, k_ring, v_ring, facts, rope, sizes, 1, SEGMENTED,
            )),
            (_produce, (q, do, keys, v, states, own, own_do, k_ring, v_ring, facts, sizes, SEGMENTED)),
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
    states = None if recall.states is None else tile_source(recall.states.flatten(2, 3))
    dfeature = None
    if recall.scale is not None:
        dfeature = ready.delta.new_empty(batch, kv_heads, heads // kv_heads * per_head, 2)
    cos, sin, rope_strides = rope_arguments(rope, tokens)
    _infini_attention_backward_queries_hopper_kernel[(min(processors(q.device), total),)](
        tile_source(rotated), tile_source(do), tile_source(k), tile_source(v), states, q, lse,
        ready.delta, ready.pull, ready.share, dq, dfeature, cos, sin, recall.norms, recall.scale, recall.bias,
        layout.position, layout.length,
        q.stride()[:3], *rope_strides, heads, kv_heads, tokens, slots - tokens, layout.segment, layout.reach,
        layout.segments(tokens), per_head, total,
        D=width, SEGMENTED=layout.segmented, STAGES=STAGES, REGISTERS=REGISTERS, num_warps=4, maxnreg=LIMIT,
    )  # fmt: skip
    return None if dfeature is None else dfeature.sum((0, 2)).T
