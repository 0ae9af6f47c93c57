"""Rotation of keys and queries ahead of the window, which visits each of them many times."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from newllm.kernels.attention_layout import Rope, rope_arguments
from newllm.kernels.attention_tiles import (
    elements,
    load_clamped,
    load_rope,
    rows_contiguous,
    two_halves,
    wide,
)
from newllm.kernels.common import cast

# Rows of a tile; heads of a program, which share the tables' rows.
ROWS, HEADS = 32, 8


class Keys(NamedTuple):
    """Rotated keys ``[B, HKV, T, K]`` and the largest squared length in each ``ROWS`` of them, float32."""

    rotated: Tensor
    squares: Tensor


@triton.jit(do_not_specialize=["H", "T", "tiles"])
def _rotate_kernel(
    x, out, squares, cos, sin, x_strides, rope_strides, H, T, tiles,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, HEADS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    blocks = tl.cdiv(H, HEADS)
    b = wide(program // (tiles * blocks))
    tile = program % tiles
    first = tile * BT
    lower, upper = elements(0, 2, D, BD), elements(1, 2, D, BD)
    if cos is not None:
        # [BT, BD/2]; a table serves all heads
        c, s = load_rope(cos, sin, rope_strides, b, first, T, lower, D, BT)
        c2, s2 = load_rope(cos, sin, rope_strides, b, first, T, upper, D, BT)
        if BACK:
            s, s2 = -s2, -s
    row = tl.arange(0, BT)
    real = (first + row < T)[:, None]
    begin = program // tiles % blocks * HEADS
    for h in tl.range(begin, tl.minimum(begin + HEADS, H)):
        # [BT, BD/2]
        left = load_clamped(x, x_strides, b, h, first, T, lower, D, BT, BD).to(tl.float32)
        right = load_clamped(x, x_strides, b, h, first, T, upper, D, BT, BD).to(tl.float32)
        if cos is not None:
            left, right = left * c - right * s, right * c2 + left * s2
            pointers = out + ((b * H + h) * T + first) * D + row[:, None] * D
            kind: tl.constexpr = out.dtype.element_ty
            tl.store(pointers + lower[None, :], cast(left, kind), mask=real & (lower < D)[None, :])
            tl.store(pointers + upper[None, :], cast(right, kind), mask=real & (upper < D)[None, :])
        if squares is not None:
            square = tl.sum(left * left, 1) + tl.sum(right * right, 1)
            tl.store(squares + (b * H + h) * tiles + tile, tl.max(square))


def rotated(x: Tensor, rope: Rope | None, out: Tensor | None = None, *, back: bool = False) -> Tensor:
    """``x [B, H, T, D]`` rotated (``back``: backwards) by the tables' last T rows; itself without tables.

    Into ``out`` if that is given, which may be ``x``.
    """
    if rope is None:
        return x
    x = rows_contiguous(x)
    out = x.new_empty(x.shape) if out is None else out
    _rotate(x, rope, out, None, back=back)
    return out


def measured_keys(k: Tensor, rope: Rope | None) -> Keys:
    """Keys ``k [B, HKV, T, K]`` rotated by the tables' last T rows, with their lengths."""
    k = rows_contiguous(k)
    out = k if rope is None else k.new_empty(k.shape)
    squares = k.new_empty(*k.shape[:2], -(-k.shape[2] // ROWS), dtype=torch.float32)
    _rotate(k, rope, out, squares)
    return Keys(out, squares)


def _rotate(x: Tensor, rope: Rope | None, out: Tensor, squares: Tensor | None, *, back: bool = False) -> None:
    batch, heads, tokens, width = x.shape
    cos, sin, strides = rope_arguments(rope, tokens)
    tiles = -(-tokens // ROWS)
    _rotate_kernel[(batch * -(-heads // HEADS) * tiles,)](
        x, out, squares, cos, sin, x.stride()[:3], strides, heads, tokens, tiles,
        D=width, BD=two_halves(width), BT=ROWS, HEADS=HEADS, BACK=back,
    )  # fmt: skip
