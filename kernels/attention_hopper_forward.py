"""The Infini-attention layer's forward pass on Hopper: two heads of a group share each tile of keys."""

import torch
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
    fetch,
    fill,
    filled,
    hide_at_edge,
    processors,
    queries_and_keys,
    release,
    ring,
    tile_of,
    tile_source,
)
from newllm.kernels.attention_layout import NO_MEMORY, Attention, Recall, Rope, rope_arguments
from newllm.kernels.attention_tiles import hide, softmax_weights
from newllm.kernels.common import LOG2E, features
from newllm.kernels.rotate import ROWS as MEASURED, Keys

STAGES = 4
SAFE = gl.constexpr(90.0)


@gluon.jit
def _produce(q, keys, v, states, own, k_ring, v_ring, facts, sizes, SEGMENTED: gl.constexpr):
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
            mbarrier.expect(full.index(c), ROWS * D * 2)
            fetch(q, b, h + c, first, full.index(c), places.index(c))
        for i in range(steps):
            fill(keys, b, hkv, start + i * ROWS, k_ring, k_step + i)
            fill(v, b, hkv, start + i * ROWS, v_ring, v_step + i)
        k_step += steps
        v_step += steps
        if states is not None:
            # The memory's matrix is more values, weighed by features.
            for part in gl.static_range(D // ROWS):
                fill(states, b, hkv, segment * D + part * ROWS, v_ring, v_step)
                v_step += 1


@gluon.jit
def _consume(
    out, lse, squares, cos, sin, norms, gate, scale, bias, own, k_ring, v_ring, facts, rope, sizes, eps,
    C: gl.constexpr, SEGMENTED: gl.constexpr, MEASURED: gl.constexpr,
):  # fmt: skip
    H, HKV, T, P, _, W, N, _, total = sizes
    places, full, empty = own
    D: gl.constexpr = places.shape[4]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = out.dtype.element_ty
    k_step, v_step = 0, 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        visit = tile // gl.num_programs(0)
        b, h, segment, first, end, count, floor, start, steps = queries_and_keys(
            tile, facts, sizes, SEGMENTED
        )
        hkv = h // (H // HKV)
        h += C
        mbarrier.wait(full.index(C), visit & 1)
        raw = tile_of(places, C)
        left, right = _rotated(raw, cos, sin, b, first, T, rope, SCORES)
        x, y = left.to(gl.float32), right.to(gl.float32)
        square = gl.max(gl.sum(x * x, 1) + gl.sum(y * y, 1), 0)
        known = squares + (b * HKV + hkv) * ((T + P + MEASURED - 1) // MEASURED)
        longest = _longest_key(known, start, gl.minimum(start + steps * ROWS, T + P), MEASURED)
        view = (first, start, steps, floor, P, W)
        if square * longest * LOG2E * LOG2E < SAFE * SAFE * D:
            highest, sums, acc = _attend_bounded(left, right, k_ring, v_ring, k_step, v_step, view)
        else:
            highest, sums, acc = _attend(left, right, k_ring, v_ring, k_step, v_step, view)
        k_step += steps
        v_step += steps
        base = (b * H + h) * T + first
        line = gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        real = first + line < gl.minimum(end, count)
        # Padding too: what is done with all of lse reads it.
        level = gl.where(real, highest + gl.log2(sums), 0.0)
        gl.store(lse + base + line, level, mask=first + line < end)
        factor = 1.0 / sums
        if gate is not None:
            factor *= 1 - gl.load(gate + h)
        acc *= gl.convert_layout(factor, gl.SliceLayout(1, RESULT))[:, None]
        if gate is not None:
            norm = norms + ((b * HKV + hkv) * N + segment) * D
            acc = _add_recalled(
                acc, raw, norm, gl.load(gate + h), scale, bias, hkv, eps, v_ring, v_step, SCORES
            )
            v_step += 2
        fence_async_shared()
        mbarrier.arrive(empty.index(C))
        line, column = gl.arange(0, ROWS, gl.SliceLayout(1, FLAT)), gl.arange(0, D, gl.SliceLayout(0, FLAT))
        result = gl.convert_layout(acc.to(dtype), FLAT)
        result = gl.where((first + line < count)[:, None], result, 0.0)
        target = out + base * D + line[:, None] * D + column[None, :]
        gl.store(target, result, mask=(first + line < end)[:, None])


@gluon.jit
def _rotated(raw, cos, sin, b, first, T, rope, SCORES: gl.constexpr):
    """A tile of queries after rotation, in halves ``[ROWS, D/2]``, as they are multiplied with keys."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    HALF: gl.constexpr = raw.shape[1] // 2
    left, right = raw.slice(0, HALF, 1).load(LEFT), raw.slice(HALF, HALF, 1).load(LEFT)
    if cos is not None:
        at = gl.minimum(first + gl.arange(0, ROWS, gl.SliceLayout(1, LEFT)), T - 1).to(gl.int64)
        element = gl.arange(0, HALF, gl.SliceLayout(0, LEFT))
        place = (b * rope[0] + at * rope[1])[:, None] + element[None, :]
        x, y = left.to(gl.float32), right.to(gl.float32)
        # [ROWS, D/2]
        left = (x * gl.load(cos + place) - y * gl.load(sin + place)).to(raw.dtype)
        right = (y * gl.load(cos + place + HALF) + x * gl.load(sin + place + HALF)).to(raw.dtype)
    return left, right


@gluon.jit
def _add_recalled(acc, raw, norm, share, scale, bias, hkv, eps, v_ring, v_step, SCORES: gl.constexpr):
    """``acc + share A_mem`` of a query tile; the memory's matrix is the ring's next two tiles."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    HALF: gl.constexpr = raw.shape[1] // 2
    gl.static_assert(HALF == ROWS)
    a, o = 1.0, 0.0
    if scale is not None:
        a, o = gl.load(scale + hkv), gl.load(bias + hkv)
    norm += gl.arange(0, HALF, gl.SliceLayout(0, LEFT))
    # [ROWS, D/2]
    f = features(raw.slice(0, HALF, 1).load(LEFT), a, o)
    f2 = features(raw.slice(HALF, HALF, 1).load(LEFT), a, o)
    weight = gl.sum(f * gl.load(norm)[None, :], 1) + gl.sum(f2 * gl.load(norm + HALF)[None, :], 1)
    share = (share / gl.maximum(weight, eps))[:, None]
    acc = warpgroup_mma((f * share).to(raw.dtype), filled(v_ring, v_step), acc, is_async=True)
    acc = warpgroup_mma((f2 * share).to(raw.dtype), filled(v_ring, v_step + 1), acc, is_async=True)
    acc = warpgroup_mma_wait(0, [acc])
    release(v_ring, v_step)
    release(v_ring, v_step + 1)
    return acc


@gluon.jit
def _longest_key(squares, low, stop, MEASURED: gl.constexpr):
    """The largest squared length of the keys in slots ``low`` .. ``stop - 1``, and some beside them."""
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    longest = gl.zeros([128], gl.float32, LINE)
    end = (stop + MEASURED - 1) // MEASURED
    for start in range(low // MEASURED, end, 128):
        tile = start + gl.arange(0, 128, LINE)
        # [128]
        longest = gl.maximum(longest, gl.load(squares + tile, mask=tile < end, other=0.0))
    return gl.max(longest, 0)


@gluon.jit
def _begin_scores(left, right, keys):
    """Begin the products of queries, in halves, and a tile of keys: [ROWS, ROWS]."""
    SCORES: gl.constexpr = left.type.layout.parent
    HALF: gl.constexpr = left.shape[1]
    none = gl.zeros([ROWS, ROWS], gl.float32, SCORES)
    scores = warpgroup_mma(left, keys.slice(0, HALF, 1).permute((1, 0)), none, use_acc=False, is_async=True)
    return warpgroup_mma(right, keys.slice(HALF, HALF, 1).permute((1, 0)), scores, is_async=True)


@gluon.jit
def _weigh(scores, first, start, floor, P, W, edge, D: gl.constexpr):
    """A tile's weights where no exponent needs a largest one taken off, and their sums eight apart."""
    weights = softmax_weights(scores, D**-0.5 * LOG2E, 0.0, False)
    weights = hide_at_edge(weights, first, start, floor, P, W, edge)
    # Neighbours of a row lie in different threads, elements eight apart in one.
    return weights, gl.sum(weights.reshape([ROWS, ROWS // 8, 8]), 1)


@gluon.jit
def _attend_bounded(left, right, k_ring, v_ring, k_step, v_step, view):
    """The softmax's largest exponent (0), its sum and the values it weighs.

    A step's scores are begun before the last step's values are weighed, so that the tensor cores have the
    one while this warp group has the other's exponentials to take.
    """
    first, start, steps, floor, P, W = view
    D: gl.constexpr = 2 * left.shape[1]
    SCORES: gl.constexpr = left.type.layout.parent
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, RESULT, 2)
    dtype: gl.constexpr = left.dtype
    full = gl.maximum(floor, first + ROWS + P - W)
    acc = gl.zeros([ROWS, D], gl.float32, RESULT)
    scores = warpgroup_mma_wait(0, [_begin_scores(left, right, filled(k_ring, k_step))])
    release(k_ring, k_step)
    weights, sums = _weigh(scores, first, start, floor, P, W, True, D)
    ready = gl.convert_layout(weights.to(dtype), WEIGHTS)
    for i in range(1, steps):
        at = start + i * ROWS
        scores = _begin_scores(left, right, filled(k_ring, k_step + i))
        acc = warpgroup_mma(ready, filled(v_ring, v_step + i - 1), acc, is_async=True)
        scores = warpgroup_mma_wait(1, [scores])
        release(k_ring, k_step + i)
        edge = (at < full) | (at + ROWS > first + P + 1)
        weights, more = _weigh(scores, first, at, floor, P, W, edge, D)
        sums += more
        following = gl.convert_layout(weights.to(dtype), WEIGHTS)
        acc = warpgroup_mma_wait(0, [acc])
        release(v_ring, v_step + i - 1)
        ready = following
    acc = warpgroup_mma(ready, filled(v_ring, v_step + steps - 1), acc, is_async=True)
    acc = warpgroup_mma_wait(0, [acc])
    release(v_ring, v_step + steps - 1)
    total = gl.convert_layout(gl.sum(sums, 1), gl.SliceLayout(1, SCORES))
    return gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES)), total, acc


@gluon.jit
def _attend(left, right, k_ring, v_ring, k_step, v_step, view):
    """The same for exponents that a running maximum has to keep in float32's range."""
    first, start, steps, floor, P, W = view
    D: gl.constexpr = 2 * left.shape[1]
    SCORES: gl.constexpr = left.type.layout.parent
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, RESULT, 2)
    FACTOR: gl.constexpr = D**-0.5 * LOG2E
    row, slot = gl.arange(0, ROWS, gl.SliceLayout(1, SCORES)), gl.arange(0, ROWS, gl.SliceLayout(0, SCORES))
    highest = gl.full([ROWS], -1e30, gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
    acc = gl.zeros([ROWS, D], gl.float32, RESULT)
    for i in range(steps):
        scores = warpgroup_mma_wait(0, [_begin_scores(left, right, filled(k_ring, k_step + i))])
        release(k_ring, k_step + i)
        scores = hide(scores, first + P + row, start + i * ROWS + slot, floor, W, float("-inf"))
        peak = gl.maximum(highest, gl.max(scores, 1) * FACTOR)
        weights = softmax_weights(scores, FACTOR, peak[:, None], False)
        decay = gl.exp2(highest - peak)
        total = total * decay + gl.sum(weights, 1)
        acc *= gl.convert_layout(decay, gl.SliceLayout(1, RESULT))[:, None]
        highest = peak
        ready = gl.convert_layout(weights.to(left.dtype), WEIGHTS)
        acc = warpgroup_mma(ready, filled(v_ring, v_step + i), acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc])
        release(v_ring, v_step + i)
    return highest, total, acc


@gluon.jit(do_not_specialize=["H", "HKV", "T", "P", "S", "W", "N", "per_head", "total"])
def _infini_attention_forward_hopper_kernel(
    q, keys, v, states, out, lse, squares, cos, sin, norms, gate, scale, bias, position, length,
    rope_batch, rope_row, H, HKV, T, P, S, W, N, per_head, total, eps,
    D: gl.constexpr, SEGMENTED: gl.constexpr, MEASURED: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    own = ring(q, CONSUMERS, ROWS, D, 1)
    k_ring, v_ring = ring(keys, STAGES, ROWS, D), ring(v, STAGES, ROWS, D)
    fence_async_shared()
    facts, rope, sizes = (position, length), (rope_batch, rope_row), (H, HKV, T, P, S, W, N, per_head, total)
    gl.warp_specialize(
        [
            (_consume, (
                out, lse, squares, cos, sin, norms, gate, scale, bias, own, k_ring, v_ring, facts, rope,
                sizes, eps, 0, SEGMENTED, MEASURED,
            )),
            (_consume, (
                out, lse, squares, cos, sin, norms, gate, scale, bias, own, k_ring, v_ring, facts, rope,
                sizes, eps, 1, SEGMENTED, MEASURED,
            )),
            (_produce, (q, keys, v, states, own, k_ring, v_ring, facts, sizes, SEGMENTED)),
        ],
        [4, 1], [REGISTERS, 24],
    )  # fmt: skip


def attend(
    q: Tensor, keys: Keys, v: Tensor, layout: Attention, rope: Rope | None, memory: Recall | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`newllm.kernels.attention_forward.attend`."""
    (batch, heads, tokens, width), (kv_heads, slots) = q.shape, keys.rotated.shape[1:3]
    out = q.new_empty(batch, heads, tokens, width)
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    per_head = layout.query_tiles(tokens, ROWS.value)
    total = batch * heads // CONSUMERS.value * per_head
    cos, sin, rope_strides = rope_arguments(rope, tokens)
    recall = memory or NO_MEMORY
    states = None if recall.states is None else tile_source(recall.states.flatten(2, 3))
    _infini_attention_forward_hopper_kernel[(min(processors(q.device), total),)](
        tile_source(q), tile_source(keys.rotated), tile_source(v), states, out, lse, keys.squares, cos, sin,
        recall.norms, recall.gate, recall.scale, recall.bias, layout.position, layout.length, *rope_strides,
        heads, kv_heads, tokens, slots - tokens, layout.segment, layout.reach, layout.segments(tokens),
        per_head, total, recall.eps,
        D=width, SEGMENTED=layout.segmented, MEASURED=MEASURED, STAGES=STAGES, REGISTERS=REGISTERS,
        num_warps=4, maxnreg=LIMIT,
    )  # fmt: skip
    return out, lse
