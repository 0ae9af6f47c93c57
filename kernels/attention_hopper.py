"""What the attention kernels for Hopper share: rings of tiles, filled by one warp and read by warp groups.

A kernel's partitions are a *producer* of one warp, whose copies fill the rings, and two *consumers* of four
warps, whose products and softmax get out of step, so that one keeps the tensor cores busy while the other
takes exponentials (Shah et al., FlashAttention-3, section 3.1). Plain Triton has no such thing; Gluon, its
lower level, has.
"""

from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from newllm.kernels.attention_tiles import hide, query_tile, row_facts

# Rows of a consumer, and rows of a tile in a ring: one step of warp-group products.
ROWS = gl.constexpr(64)
CONSUMERS = gl.constexpr(2)
# Registers: a launch's threads have LIMIT each until consumers take REGISTERS and leave the producer 24.
LIMIT, REGISTERS = 168, 240

# Triton renamed both.
synchronize = getattr(gl, "barrier", None) or gl.thread_barrier
_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


def tile_source(x: Tensor, rows: int = ROWS.value) -> TensorDescriptor:
    """``x [B, H, T, D]`` in bfloat16, in tiles of so many rows."""
    block = [1, 1, rows, x.shape[3]]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, _tile_layout(*block))


@cache
def _tile_layout(*block: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16)


def number_source(x: Tensor, rows: int) -> TensorDescriptor:
    """``x [B, H, T]`` in float32, in tiles of so many numbers; T is a multiple of 4."""
    block = [1, 1, rows]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


@gluon.jit
def barriers(N: gl.constexpr, COUNT: gl.constexpr):
    """N barriers that wait for COUNT arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(bars.index(i), count=COUNT)
    return bars


@gluon.jit
def ring(source, N: gl.constexpr, BT: gl.constexpr, D: gl.constexpr, READERS: gl.constexpr = CONSUMERS):
    """Place for N tiles ``[BT, D]``, and barriers: one filled by copies, one freed by so many readers."""
    places = gl.allocate_shared_memory(source.dtype, [N, 1, 1, BT, D], source.layout)
    return places, barriers(N, 1), barriers(N, READERS)


@gluon.jit
def tile_of(places, place):
    """One of the tiles ``[BT, D]`` of a ring, or of places that are filled along with one."""
    return places.index(place).reshape([places.shape[3], places.shape[4]])


@gluon.jit
def seen(ring, step):
    """The ring's tile of a step that has been waited for: ``[BT, D]``."""
    places, _, _ = ring
    return tile_of(places, step % places.shape[0])


@gluon.jit
def filled(ring, step):
    """The same, once it is there."""
    places, full, _ = ring
    N: gl.constexpr = places.shape[0]
    mbarrier.wait(full.index(step % N), step // N & 1)
    return seen(ring, step)


@gluon.jit
def release(ring, step):
    """This reader is done with the ring's tile of this step."""
    places, _, empty = ring
    mbarrier.arrive(empty.index(step % places.shape[0]))


@gluon.jit
def fetch(source, b, h, row, bar, place):
    """Begin to copy a tile from ``row`` on, zeros behind the last, and count its bytes at ``bar``."""
    _copy(source, [b.to(gl.int32), h.to(gl.int32), row, 0], bar, place)


@gluon.jit
def fetch_numbers(source, b, h, row, bar, place):
    """The same for :func:`number_source`."""
    _copy(source, [b.to(gl.int32), h.to(gl.int32), row], bar, place)


@gluon.jit
def await_place(ring, step, BYTES: gl.constexpr):
    """The ring's barrier for so many bytes of this step, once its place is free."""
    places, full, empty = ring
    N: gl.constexpr = places.shape[0]
    mbarrier.wait(empty.index(step % N), step // N & 1 ^ 1)
    mbarrier.expect(full.index(step % N), BYTES)
    return full.index(step % N)


@gluon.jit
def fill(source, b, h, row, ring, step):
    """Begin to fill the ring's place for this step with a tile from ``row`` on."""
    places, _, _ = ring
    N: gl.constexpr = places.shape[0]
    bar = await_place(ring, step, places.shape[3] * places.shape[4] * 2)
    fetch(source, b, h, row, bar, places.index(step % N))


@gluon.jit
def queries_and_keys(tile, facts, sizes, SEGMENTED: gl.constexpr):
    """Where a tile of queries lies, and which tiles of keys its rows see.

    Returns the row's index in the batch, the first of its CONSUMERS heads, the segment, the first query, the
    one behind the last, the number of real ones, the first slot with a key, the first slot of the first tile
    of keys and the number of tiles, at least one. ``facts`` are position and length of the rows.
    """
    position, length = facts
    H, _, T, P, S, W, N, per_head, _ = sizes
    head = (tile // per_head).to(gl.int64) * CONSUMERS
    b, h = head // H, head % H
    before, count, floor = row_facts(position, length, b, T, P)
    segment, _, first, end = query_tile(tile % per_head, before, T, count, S, N, ROWS, SEGMENTED)
    last = gl.minimum(first + ROWS, gl.minimum(end, count))
    start = gl.maximum(floor, first + P - W + 1) // ROWS * ROWS
    # A tile without real rows takes a single step, since all partitions have to count some.
    steps = gl.where(first < last, (last + P - start + ROWS - 1) // ROWS, 1)
    return b, h, segment, first, end, count, floor, start, steps


@gluon.jit
def hide_at_edge(weights, first, start, floor, P, W, edge):
    """A tile's weights, zero where a query does not see a key, as happens at an ``edge`` alone."""
    SCORES: gl.constexpr = weights.type.layout
    if edge:
        row = first + P + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        weights = hide(weights, row, start + gl.arange(0, ROWS, gl.SliceLayout(0, SCORES)), floor, W, 0.0)
    return weights


@cache
def processors(device: torch.device) -> int:
    """A device's multiprocessors, each of which holds one program."""
    return torch.cuda.get_device_properties(device).multi_processor_count
