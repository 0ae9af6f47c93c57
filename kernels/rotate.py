"""Rotation of keys and queries ahead of the window, which visits each of them many times."""

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

# Heads of a program, which share the tables' rows.
HEADS = 8


@triton.jit
def _rotate_kernel(
    x, out, cos, sin, x_strides, rope_strides, H, T, tiles,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, HEADS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    blocks = tl.cdiv(H, HEADS)
    b = wide(program // (tiles * blocks))
    first = (program % tiles) * BT
    lower, upper = elements(0, 2, D, BD), elements(1, 2, D, BD)
    # [BT, BD/2]; a table serves all heads
    c, s = load_rope(cos, sin, rope_strides, b, first, T, lower, D, BT)
    c2, s2 = load_rope(cos, sin, rope_strides, b, first, T, upper, D, BT)
    row = tl.arange(0, BT)
    real = (first + row < T)[:, None]
    begin = program // tiles % blocks * HEADS
    for h in tl.range(begin, tl.minimum(begin + HEADS, H)):
        # [BT, BD/2]
        left = load_clamped(x, x_strides, b, h, first, T, lower, D, BT, BD).to(tl.float32)
        right = load_clamped(x, x_strides, b, h, first, T, upper, D, BT, BD).to(tl.float32)
        if BACK:
            turned, other = left * c + right * s2, right * c2 - left * s
        else:
            turned, other = left * c - right * s, right * c2 + left * s2
        pointers = out + ((b * H + h) * T + first) * D + row[:, None] * D
        tl.store(
            pointers + lower[None, :], cast(turned, out.dtype.element_ty), mask=real & (lower < D)[None, :]
        )
        tl.store(
            pointers + upper[None, :], cast(other, out.dtype.element_ty), mask=real & (upper < D)[None, :]
        )


def rotated(x: Tensor, rope: Rope | None, out: Tensor | None = None, *, back: bool = False) -> Tensor:
    """``x [B, H, T, D]`` rotated (``back``: backwards) by the tables' last T rows; itself without tables.

    Into ``out`` if that is given, which may be ``x``.
    """
    if rope is None:
        return x
    x = rows_contiguous(x)
    batch, heads, tokens, width = x.shape
    out = x.new_empty(x.shape) if out is None else out
    cos, sin, strides = rope_arguments(rope, tokens)
    tiles = triton.cdiv(tokens, 32)
    _rotate_kernel[(batch * triton.cdiv(heads, HEADS) * tiles,)](
        x, out, cos, sin, x.stride()[:3], strides, heads, tokens, tiles,
        D=width, BD=two_halves(width), BT=32, HEADS=HEADS, BACK=back,
    )  # fmt: skip
    return out
