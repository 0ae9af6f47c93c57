"""Where a row's segments lie in its tokens, for launchers and for kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from newllm.kernels.common import cast, padded
from newllm.kernels.tiles import Tiles, tiles_of


class Layout(NamedTuple):
    """How the T tokens of a call are cut into segments.

    Token n of row b lies in ``k [B, HKV, T, K]`` for n >= 0 and, with a ``position``, in
    ``past_k [B, HKV, P, K]`` at P + n for n < 0. Segment j covers n in [j S - phase, (j + 1) S - phase),
    phase = position mod S, as far as the row has tokens.
    """

    segment: int
    position: Tensor | None = None  # [B] int64, tokens before this call; None = 0
    length: Tensor | None = None  # [B] int64, real tokens of this call; None = T
    past_k: Tensor | None = None  # [B, HKV, P, K], P >= segment - 1
    past_v: Tensor | None = None  # [B, HKV, P, V]
    partial: bool = False  # whether a segment that is not full is written too

    def count(self, tokens: int) -> int:
        """N, the most segments that ``tokens`` tokens can touch."""
        behind = 0 if self.position is None else self.segment - 1
        return -(-(tokens + behind) // self.segment)

    def written(self, batch: int, tokens: int, device: torch.device) -> Tensor:
        """How many segments of each row ``[B]`` are written."""
        end = torch.full((batch,), tokens, device=device) if self.length is None else self.length
        if self.position is not None:
            end = end + self.position % self.segment
        return (end + self.segment - 1 if self.partial else end) // self.segment

    def whole(self, tokens: int) -> bool:
        """Whether every row's segments are written and full."""
        return self.position is None and self.length is None and tokens % self.segment == 0


def unit_stride(x: Tensor) -> Tensor:
    """``x`` with neighbouring columns side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    """``x`` without gaps; None stays None."""
    return None if x is None else x.contiguous()


def past_tokens(layout: Layout) -> tuple[Tensor | None, Tensor | None, int]:
    """Earlier keys and values without gaps, None where no segment can reach them, and their number."""
    if layout.position is None or layout.past_k is None or layout.past_k.shape[2] == 0:
        return None, None, 0
    return layout.past_k.contiguous(), contiguous(layout.past_v), layout.past_k.shape[2]


def memory_tiles(kernel: str, device: torch.device, dtype: torch.dtype, *, width: int, columns: int) -> Tiles:
    """Tiles of ``kernel`` for rows of ``width`` elements; BV no more than ``columns`` need."""
    sizes = tiles_of(kernel, device, width, dtype.itemsize)
    return {**sizes, "BV": min(sizes["BV"], padded(columns))}


def even_chunk(tokens: int, heads: int, programs: int) -> int:
    """Tokens of a part when ``tokens`` of each of ``heads`` are cut into parts for so many programs."""
    parts = max(1, programs // max(1, heads))
    return -(-tokens // (64 * parts)) * 64


@triton.jit
def segment_bounds(position, length, b, j, S, T, PARTIAL: tl.constexpr):
    """First token of segment j of row b, and the end of what is written of it (the first, if nothing is)."""
    phase, end = row_bounds(position, length, b, S, T)
    return bounds_in_row(j, phase, end, S, PARTIAL)


@triton.jit
def row_bounds(position, length, b, S, T):
    """How many tokens row b's first segment begins before the call, and the end of the row's tokens."""
    phase, end = 0, T
    if position is not None:
        phase = (tl.load(position + b) % S).to(tl.int32)
    if length is not None:
        end = tl.load(length + b).to(tl.int32)
    return phase, end


@triton.jit
def bounds_in_row(j, phase, end, S, PARTIAL: tl.constexpr):
    """``segment_bounds`` of segment j in a row with these ``row_bounds``."""
    lo = tl.cast(j * S, tl.int32) - phase
    hi = tl.minimum(lo + S, end)
    if not PARTIAL:
        hi = tl.where(lo + S <= end, hi, lo)
    return lo, tl.maximum(hi, lo)


@triton.jit
def load_tokens(base, t0, hi, stride, c0, WIDTH: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """Tokens t0 .. t0 + BT - 1, columns c0 .. c0 + BC - 1; zero from token hi and from column WIDTH on."""
    rows = tl.arange(0, BT)
    columns = c0 + tl.arange(0, BC)
    mask = rows[:, None] < hi - t0
    if WIDTH % BC != 0:
        mask = mask & (columns[None, :] < WIDTH)
    # [BT, BC]
    return tl.load(
        base + t0.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :], mask, other=0.0
    )


@triton.jit
def store_tokens(base, x, t0, hi, stride, c0, WIDTH: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """Store ``x [BT, BC]`` at the places from which ``load_tokens`` would load it."""
    rows = tl.arange(0, BT)
    columns = c0 + tl.arange(0, BC)
    mask = rows[:, None] < hi - t0
    if WIDTH % BC != 0:
        mask = mask & (columns[None, :] < WIDTH)
    at = base + t0.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    tl.store(at, cast(x, base.dtype.element_ty), mask)


@triton.jit
def load_matrix(base, r0, c0, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """Rows r0 .. r0 + BR - 1, columns c0 .. c0 + BC - 1 of a contiguous matrix, zero outside."""
    rows = r0 + tl.arange(0, BR)
    columns = c0 + tl.arange(0, BC)
    at = base + rows[:, None] * COLUMNS + columns[None, :]
    # [BR, BC]
    if ROWS % BR == 0 and COLUMNS % BC == 0:
        return tl.load(at)
    return tl.load(at, (rows[:, None] < ROWS) & (columns[None, :] < COLUMNS), other=0.0)


@triton.jit
def store_matrix(
    base, x, r0, c0, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):
    """Store ``x [BR, BC]`` where ``load_matrix`` would load it from."""
    rows = r0 + tl.arange(0, BR)
    columns = c0 + tl.arange(0, BC)
    at = base + rows[:, None] * COLUMNS + columns[None, :]
    tl.store(at, cast(x, base.dtype.element_ty), (rows[:, None] < ROWS) & (columns[None, :] < COLUMNS))
