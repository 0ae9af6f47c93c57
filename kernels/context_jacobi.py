"""A layer of a Jacobi sweep of the context cell beside its matrix products: one pass over all tokens."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from newllm.kernels.common import padded

# Tokens that a program takes, one after the other: forwards, and backwards, where each leaves a sum.
TOKENS, TOKENS_BACK = 8, 32


class Entering(NamedTuple):
    """The contexts that a layer reads: ``rows [B, T, C]`` (None: zeros) and ``products``, W times them.

    With ``start [B, C]`` and ``start_products`` each token reads the row of the token before it, the first
    one the start.
    """

    rows: Tensor | None
    products: Tensor | None
    start: Tensor | None = None
    start_products: Tensor | None = None


@triton.jit
def _entering(rows, start, token, row, T, C, columns, inside):
    """What token ``row`` reads, of float32; zeros without rows, and the row itself without a start."""
    found = tl.zeros(columns.shape, tl.float32)
    if start is None:
        # [C]
        found = tl.load(rows + row * C + columns, mask=inside, other=0.0).to(tl.float32)
    else:
        if token == 0:
            found = tl.load(start + row // T * C + columns, mask=inside, other=0.0).to(tl.float32)
        elif rows is not None:
            found = tl.load(rows + (row - 1) * C + columns, mask=inside, other=0.0).to(tl.float32)
    return found


@triton.jit
def _gelu_and_slope(x):
    """GELU of float32 numbers and its derivative."""
    normal = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
    return x * normal, normal + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def _normed(
    rows, products, start, start_products, drive, token, row, T, EPS: tl.constexpr, C: tl.constexpr, columns,
    inside,
):  # fmt: skip
    """A token's update through the layer norm alone, one over its deviation, and the slope of its GELU."""
    context = _entering(rows, start, token, row, T, C, columns, inside)
    product = _entering(products, start_products, token, row, T, C, columns, inside)
    # [C]
    added = tl.load(drive + columns, mask=inside, other=0.0).to(tl.float32)
    change, slope = _gelu_and_slope(product + added)
    update = context + change
    mean = tl.sum(tl.where(inside, update, 0.0), 0) / C
    centred = tl.where(inside, update - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / C + EPS)
    return centred * rstd, rstd, slope


@triton.jit
def _context_jacobi_forward_kernel(
    rows, products, start, start_products, before, drive, gain, shift, out, rounded, last, changes, total, T,
    d_t, EPS: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One program makes TOKENS contexts, all columns of each."""
    pid = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BC)
    inside = columns < C
    # [C]
    weight = tl.load(gain + columns, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(shift + columns, mask=inside, other=0.0).to(tl.float32)
    largest = tl.zeros((BC,), tl.float32)
    for i in range(TOKENS):
        row = pid * TOKENS + i
        if row < total:
            token = row % T
            normed, _, _ = _normed(
                rows,
                products,
                start,
                start_products,
                drive + row * d_t,
                token,
                row,
                T,
                EPS,
                C,
                columns,
                inside,
            )
            result = normed * weight + bias
            tl.store(out + row * C + columns, result, mask=inside)
            if rounded is not None:
                tl.store(rounded + row * C + columns, result.to(rounded.dtype.element_ty), mask=inside)
            if token == T - 1:
                tl.store(last + row // T * C + columns, result, mask=inside)
            if before is not None:
                # [C]
                old = tl.load(before + row * C + columns, mask=inside, other=0.0).to(tl.float32)
                moved = tl.abs(result - old)
            else:
                moved = tl.abs(result)
            largest = tl.maximum(
                largest, tl.where(moved == moved, tl.where(inside, moved, 0.0), float("inf"))
            )
    tl.store(changes + pid, tl.max(largest, 0))


@triton.jit
def _context_jacobi_backward_kernel(
    rows, products, start, start_products, drive, gain, doutside, dlast, dupdate, dread, first, dgain, dshift,
    total, T, d_t, o_b, EPS: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One program makes the gradients of TOKENS tokens, and its share of those of the layer norm."""
    pid = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BC)
    inside = columns < C
    # [C]
    weight = tl.load(gain + columns, mask=inside, other=0.0).to(tl.float32)
    gain_sum = tl.zeros((BC,), tl.float32)
    shift_sum = tl.zeros((BC,), tl.float32)
    for i in range(TOKENS):
        row = pid * TOKENS + i
        if row < total:
            token = row % T
            normed, rstd, slope = _normed(
                rows,
                products,
                start,
                start_products,
                drive + row * d_t,
                token,
                row,
                T,
                EPS,
                C,
                columns,
                inside,
            )
            gradient = tl.zeros((BC,), tl.float32)
            if doutside is not None:
                gradient += tl.load(doutside + row // T * o_b + token * C + columns, mask=inside, other=0.0)
            if dlast is not None:  # noqa: SIM102 - known when the kernel is compiled
                if token == T - 1:
                    gradient += tl.load(dlast + row // T * C + columns, mask=inside, other=0.0)
            gain_sum += gradient * normed
            shift_sum += gradient
            # Chosen, so that no product is fused into the differences below: of one column they are zero.
            weighted = tl.where(inside, gradient * weight, 0.0)
            plain = tl.sum(weighted, 0) / C
            along = tl.sum(weighted * normed, 0) / C
            moved = tl.where(inside, (weighted - plain - normed * along) * rstd, 0.0)
            if start is not None:  # noqa: SIM102
                if token == 0:
                    # [2, B, C]
                    tl.store(first + row // T * C + columns, moved, mask=inside)
                    tl.store(first + (total // T + row // T) * C + columns, moved * slope, mask=inside)
            tl.store(dupdate + row * C + columns, moved, mask=inside)
            tl.store(dread + row * C + columns, (moved * slope).to(dread.dtype.element_ty), mask=inside)
    tl.store(dgain + pid * C + columns, gain_sum, mask=inside)
    tl.store(dshift + pid * C + columns, shift_sum, mask=inside)


def layer(
    entering: Entering, before: Tensor | None, drive: Tensor, gain: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Contexts ``[B, T, C]``, the same in drive's dtype, the last ones ``[B, C]`` and the largest change.

    All but the second, None where it would be the first, are of float32. ``before [B, T, C]`` (None: zeros)
    is what the change is from. Rows of ``drive [B, T, C]`` may lie apart; all else is contiguous.
    """
    batch, tokens, width = drive.shape
    total = batch * tokens
    programs = -(-total // TOKENS)
    out = gain.new_empty(drive.shape)
    rounded = None if drive.dtype == out.dtype else drive.new_empty(drive.shape)
    last, changes = gain.new_empty(batch, width), gain.new_empty(programs)
    _context_jacobi_forward_kernel[(programs,)](
        *entering, before, drive, gain, shift, out, rounded, last, changes, total, tokens, drive.stride(1),
        EPS=eps, C=width, BC=padded(width), TOKENS=TOKENS, num_warps=4,
    )  # fmt: skip
    return out, rounded, last, changes.amax()


def layer_backward(
    entering: Entering,
    drive: Tensor,
    gain: Tensor,
    dcontexts: Tensor | None,
    dlast: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of what the layer norms read, of the pre-activations in drive's dtype, both ``[B, T, C]``, of
    the first tokens' two, ``[2, B, C]``, and of the layer norm's weight and bias ``[C]``; else of float32.

    Sequences of ``dcontexts [B, T, C]`` may lie apart, rows of ``drive`` too; all else is contiguous.
    """
    batch, tokens, width = drive.shape
    programs = -(-batch * tokens // TOKENS_BACK)
    dupdate, dread = gain.new_empty(drive.shape), drive.new_empty(drive.shape)
    first = gain.new_empty(2, batch, width)
    dgain, dshift = gain.new_empty(programs, width), gain.new_empty(programs, width)
    between = 0 if dcontexts is None else dcontexts.stride(0)
    _context_jacobi_backward_kernel[(programs,)](
        *entering, drive, gain, dcontexts, dlast, dupdate, dread, first, dgain, dshift, batch * tokens,
        tokens, drive.stride(1), between,
        EPS=eps, C=width, BC=padded(width), TOKENS=TOKENS_BACK, num_warps=4,
    )  # fmt: skip
    return dupdate, dread, first, dgain.sum(0), dshift.sum(0)
