"""Tiles of queries and keys, shared by the attention kernels.

A *slot* counts keys from the first one that a call is given: the P keys before the first query, then T.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from newllm.kernels.common import INTERPRETED, LN2, dot, padded
from newllm.kernels.tiles import capability


def rows_contiguous(x: Tensor) -> Tensor:
    """``x``, copied if the elements of a row are not neighbours."""
    return x if x.stride(-1) == 1 else x.contiguous()


def two_halves(width: int) -> int:
    """Columns of a tile for rows of ``width`` elements, each half of which has a power of two for itself."""
    return max(32, padded(width))


def tiled(x: Tensor, rows: int, width: int) -> tuple[Tensor | TensorDescriptor, bool]:
    """``x [B, H, T, D]`` for :func:`load_rows` in tiles ``[rows, width]``, and whether as a descriptor."""
    if not _has_copy_engine(x) or not _is_copied(x, width):
        return x, False
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, width]), True


def _is_copied(x: Tensor, width: int) -> bool:
    """Whether a copy engine takes rows of ``x``: there are some, and each has ``width`` elements."""
    aligned = x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 for s in x.stride()[:-1])
    return aligned and x.shape[3] == width and x.numel() > 0


def warp_specialised(window: int | None, widths: tuple[int, ...], *tensors: Tensor) -> bool:
    """Whether the kernels for Hopper take ``[B, H, T, D]`` tensors: bfloat16, one of ``widths``, a window."""
    if INTERPRETED.value or window is None or tensors[0].shape[3] not in widths:
        return False
    return capability(tensors[0].device) == (9, 0) and all(
        x.dtype == torch.bfloat16 and _is_copied(x, tensors[0].shape[3]) and all(x.stride()[:-1])
        for x in tensors
    )


def _has_copy_engine(x: Tensor) -> bool:
    return INTERPRETED.value or capability(x.device) >= (9, 0)


@triton.jit
def wide(x):
    """An integer as int64; the interpreter counts loops in Python's own."""
    return tl.zeros((), tl.int64) + x


@triton.jit
def elements(part: tl.constexpr, parts: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """The elements of a row of D in one of the ``parts`` (1, 2, 4) of a tile BD wide; D stands for none.

    Each half of a row has half of the tile, so that rotation pairs a column with the one BD/2 further.
    """
    HALF: tl.constexpr = (D + 1) // 2
    WIDTH: tl.constexpr = BD // parts
    column = tl.arange(0, WIDTH)
    if D == BD:
        # Plainly consecutive, which wide loads depend on.
        element = column + part * WIDTH
    elif parts > 1:
        column += part * WIDTH % (BD // 2)
        element = tl.where(column < HALF, column + part * 2 // parts * HALF, D)
    else:
        right = column - BD // 2
        element = tl.where(right < 0, tl.where(column < HALF, column, D), right + HALF)
    return element


@triton.jit
def load_rows(
    x,
    strides,
    b,
    h,
    start,
    T,
    element,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    TMA: tl.constexpr,
):
    """Rows ``start`` .. ``start + BT - 1`` of x [B, H, T, D], zeros where there is none: [BT, BD]."""
    if TMA:
        tile = x.load([b.to(tl.int32), h.to(tl.int32), start, 0]).reshape(BT, BD)
    else:
        row = tl.arange(0, BT)
        base = x + b * strides[0] + h * strides[1] + wide(start) * strides[2]
        mask = (start + row < T)[:, None]
        if D != BD:
            mask = mask & (element < D)[None, :]
        tile = tl.load(base + row[:, None] * strides[2] + element[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def load_clamped(x, strides, b, h, start, T, element, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """Some elements of the same rows; those from T on repeat the last one, and their results are dropped."""
    pointers = (
        _clamped(x + b * strides[0] + h * strides[1], start, T, strides[2], BT)[:, None] + element[None, :]
    )
    return tl.load(pointers) if D == BD else tl.load(pointers, mask=(element < D)[None, :], other=0.0)


@triton.jit
def _clamped(base, start, T, stride, BT: tl.constexpr):
    """Pointers to the rows from ``start`` on, none of them beyond the last."""
    row = tl.minimum(tl.arange(0, BT), T - 1 - start)
    return base + wide(start) * stride + row * stride


@triton.jit
def load_state(
    states, state, row, column, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr
):
    """Some rows and columns of one of the matrices [K, V], zeros outside."""
    pointers = states + state * K * V + row[:, None] * V + column[None, :]
    if K == BK and V == BV:
        block = tl.load(pointers)
    else:
        block = tl.load(pointers, mask=(row < K)[:, None] & (column < V)[None, :], other=0.0)
    return block


@triton.jit
def matrix_slope(
    gradient, do, states, strides, b, h, state, first, T,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """do M^T in blocks of BC values: [BT, BK]."""
    element = elements(0, 1, K, BK)
    if BC == BV:
        # [BK, BV]
        matrix = load_state(states, state, element, tl.arange(0, BV), K, V, BK, BV)
        slope = dot(gradient.to(matrix.dtype), matrix.T, None, PRECISION)
    else:
        slope = tl.zeros((BT, BK), tl.float32)
        for start in tl.static_range(0, BV, BC):
            value = start + tl.arange(0, BC)
            # [BK, BC]
            matrix = load_state(states, state, element, value, K, V, BK, BV)
            # [BT, BC]
            block = load_clamped(do, strides, b, h, first, T, value, V, BT, BV)
            slope = dot(block.to(matrix.dtype), matrix.T, slope, PRECISION)
    return slope


@triton.jit
def load_rotated(
    x, cos, sin, strides, rope_strides, b, h, start, T, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Rows from ``start`` on of x [B, H, T, D] after rotation, clamped as above, in float32: [BT, BD]."""
    element = elements(0, 1, D, BD)
    # The other half of a pair is loaded a second time, which is cheaper than moving it between threads.
    partner = (element + D // 2) % D
    if D != BD:
        partner = tl.where(element < D, partner, D)
    # [BT, BD]
    own = load_clamped(x, strides, b, h, start, T, element, D, BT, BD).to(tl.float32)
    other = load_clamped(x, strides, b, h, start, T, partner, D, BT, BD).to(tl.float32)
    c, s = load_rope(cos, sin, rope_strides, b, start, T, element, D, BT)
    return own * c + other * s * tl.where(element < D // 2, -1.0, 1.0)[None, :]


@triton.jit
def rotate_back(
    left, right, cos, sin, rope_strides, b, start, T, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr
):
    """The transpose of the rotation, for gradients."""
    c, s = load_rope(cos, sin, rope_strides, b, start, T, elements(0, 2, D, BD), D, BT)
    c2, s2 = load_rope(cos, sin, rope_strides, b, start, T, elements(1, 2, D, BD), D, BT)
    return left * c + right * s2, right * c2 - left * s


@triton.jit
def load_rope(cos, sin, strides, b, start, T, element, D: tl.constexpr, BT: tl.constexpr):
    """Some columns of both tables [B or 1, T, D] in float32."""
    at = wide(b) * strides[0]
    real = (element < D)[None, :]
    c = tl.load(_clamped(cos + at, start, T, strides[1], BT)[:, None] + element[None, :], real, 0.0)
    s = tl.load(_clamped(sin + at, start, T, strides[1], BT)[:, None] + element[None, :], real, 0.0)
    return c.to(tl.float32), s.to(tl.float32)


@triton.jit
def query_tile(tile, position, T, length, S, N, BT: tl.constexpr, SEGMENTED: tl.constexpr):
    """The tile's segment, that segment's first token, the tile's first token and the one behind its last.

    Tiles start at the row's segment borders, so that none spans two segments.
    """
    if SEGMENTED:
        tiles = tl.cdiv(tl.minimum(S, T), BT)
        segment = tile // tiles
        border = segment * S - position % S
        first = tl.maximum(border, 0) + (tile % tiles) * BT
        end = tl.minimum(border + S, T)
    else:
        segment = tile * 0
        border = tile * 0
        first = tile * BT
        end = T + tile * 0
    return segment.to(tl.int32), border.to(tl.int32), first.to(tl.int32), end.to(tl.int32)


@triton.jit
def row_facts(position, length, b, T, P):
    """Row b's tokens before this call, its real tokens in this call, and the first slot that holds a key."""
    before = b * 0
    if position is not None:
        before = tl.load(position + b)
    count = T
    if length is not None:
        count = tl.load(length + b).to(tl.int32)
    floor = P - tl.minimum(before, P).to(tl.int32)
    return before, count, floor


@triton.jit
def visible_slots(first, end, count, floor, P, W, BT: tl.constexpr):
    """The first slot that any of a tile's queries sees, the first that all see, the one behind the last."""
    last = tl.minimum(first + BT, tl.minimum(end, count))
    stop = tl.where(first < last, last + P, 0)
    return tl.maximum(floor, first + P - W + 1), tl.maximum(floor, first + BT + P - W), stop


@triton.jit
def hide(scores, row, slot, floor, W, HIDDEN: tl.constexpr):
    """Scores [BT, BS] of queries in slots ``row``, with HIDDEN where a query does not see a key.

    It sees W slots up to its own, as far as they hold keys.
    """
    low = tl.maximum(row - W + 1, floor)
    # One comparison for both ends: a key before the first one is a huge unsigned distance away.
    distance = (slot[None, :] - low[:, None]).to(tl.uint32, bitcast=True)
    return tl.where(distance <= (row - low).to(tl.uint32, bitcast=True)[:, None], scores, HIDDEN)


@triton.jit
def softmax_weights(scores, FACTOR: tl.constexpr, level, PRECISE: tl.constexpr):
    """2 ** (FACTOR scores - level); PRECISE does not round the exponent, which could be the largest error."""
    if PRECISE:
        exponent = scores.to(tl.float64) * FACTOR - level
        upper = exponent.to(tl.float32)
        # Infinities have no rest.
        rest = tl.where(upper > float("-inf"), exponent - upper, 0.0).to(tl.float32)
        weights = tl.exp2(upper) * (1 + rest * LN2)
    else:
        weights = tl.exp2(scores * FACTOR - level)
    return weights


@triton.jit
def score_slopes(
    queries, gradient, keys, values, level, shift, row, first, start, full, floor, P, W,
    BS: tl.constexpr, FACTOR: tl.constexpr, PRECISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients [BT, BS] of the scores of the queries ``row`` and the keys from slot ``start`` on.

    All queries see the slots from ``full`` to that of the ``first`` one.
    """
    scores = dot(queries, keys.T, None, PRECISION)
    weights = softmax_weights(scores, FACTOR, level[:, None], PRECISE)
    if (start < full) | (start + BS > first + P + 1):
        weights = hide(weights, row + P, start + tl.arange(0, BS), floor, W, 0.0)
    slopes = dot(gradient, values.T, None, PRECISION)
    return weights * (slopes - shift[:, None])
