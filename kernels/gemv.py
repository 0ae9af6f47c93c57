"""Matrices times a few vectors, between a normalisation and a residual sum, in one kernel.

What a step of decoding mostly does. Each program asks for its rows of the weights before it waits for the
kernel that makes the vectors, so that on a device with dependent launches reading the weights, which is all
that such a product costs, goes on while other kernels still run. Very few vectors are multiplied one by one,
a few more by tensor cores.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from newllm.kernels.common import INTERPRETED, cast, padded, wait_for_previous_kernel
from newllm.kernels.tiles import dependent_launch, tiles_of


@triton.jit
def _matrix(first, second, third, first_n, second_n, third_n, BN: tl.constexpr, STACKED: tl.constexpr):
    """This program's matrix, which block of its rows, how many it has, and how many others have before it."""
    block, start = tl.program_id(0), 0
    weight, rows = first, first_n
    if second is not None and STACKED:
        blocks = tl.cdiv(first_n, BN)
        if block >= blocks:
            weight, rows, start, block = second, second_n, first_n, block - blocks
            if third is not None:
                blocks = tl.cdiv(second_n, BN)
                if block >= blocks:
                    weight, rows, start, block = third, third_n, start + second_n, block - blocks
    return weight, block, rows, start


@triton.jit
def _swiglu(gate, wide):
    return gate / (1 + tl.exp(-gate)) * wide


@triton.jit
def _gemv_kernel(
    x, norm, first, second, third, residual, out,
    x_b, residual_b, out_b, first_n, second_n, third_n, eps,
    B: tl.constexpr, K: tl.constexpr, SWIGLU: tl.constexpr, PDL: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A program for every BN rows of a matrix, or of both under SWIGLU, and all B vectors."""
    weight, block, rows, start = _matrix(first, second, third, first_n, second_n, third_n, BN, not SWIGLU)
    row, column = block * BN + tl.arange(0, BN), tl.arange(0, BK)
    there, deep = row < rows, column < K
    tile = row.to(tl.int64)[:, None] * K + column[None, :]
    # [BN, BK]
    matrix = tl.load(weight + tile, mask=there[:, None] & deep[None, :], other=0)
    if SWIGLU:
        other = tl.load(second + tile, mask=there[:, None] & deep[None, :], other=0)
    if norm is not None:
        # [BK]
        scale = tl.load(norm + column, mask=deep, other=0).to(tl.float32)
    wait_for_previous_kernel(PDL)
    for b in tl.static_range(B):
        vector = tl.load(x + b * x_b + column, mask=deep, other=0).to(tl.float32)
        factor = 1.0
        if norm is not None:
            # The length of a vector is a factor of the product: both sums are taken at once.
            factor = tl.rsqrt(tl.sum(vector * vector) / K + eps)
            vector *= scale
        # [BN]
        product = tl.sum(matrix.to(tl.float32) * vector[None, :], 1) * factor
        if SWIGLU:
            product = _swiglu(product, tl.sum(other.to(tl.float32) * vector[None, :], 1) * factor)
        place = start + row
        if residual is not None:
            product += tl.load(residual + b * residual_b + place, mask=there, other=0).to(tl.float32)
        tl.store(out + b * out_b + place, cast(product, out.dtype.element_ty), mask=there)


@triton.jit
def _partial_products(matrix, vectors):
    """``[C, BN, BB]`` of ``[C, BN, BC]`` and ``[C, BC, BB]``."""
    if INTERPRETED:
        # The interpreter's own product of bfloat16 is wrong.
        matrix, vectors = matrix.to(tl.float32), vectors.to(tl.float32)
    return tl.dot(matrix, vectors)


@triton.jit
def _gemv_together_kernel(
    x, norm, first, second, third, residual, out,
    x_b, residual_b, out_b, first_n, second_n, third_n, eps, B,
    K: tl.constexpr, SWIGLU: tl.constexpr, PDL: tl.constexpr,
    C: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """The same of B <= BB vectors; each of C warps has BC elements of all rows in a step."""
    weight, block, rows, start = _matrix(first, second, third, first_n, second_n, third_n, BN, not SWIGLU)
    row, vector = block * BN + tl.arange(0, BN), tl.arange(0, BB)
    column = tl.arange(0, C)[:, None] * BC + tl.arange(0, BC)[None, :]
    there, real = (row < rows)[None, :, None], (vector < B)[None, None, :]
    tile = row.to(tl.int64)[None, :, None] * K + column[:, None, :]
    # [C, BN, BC]
    matrix = tl.load(weight + tile, mask=there & (column < K)[:, None, :], other=0)
    if SWIGLU:
        other = tl.load(second + tile, mask=there & (column < K)[:, None, :], other=0)
    wait_for_previous_kernel(PDL)
    # [C, BC, BB]
    vectors = x + vector[None, None, :] * x_b + column[:, :, None]
    if norm is not None:
        squares = tl.zeros([BB], tl.float32)
        for done in tl.static_range(0, K, C * BC):
            part = tl.load(vectors + done, mask=(done + column < K)[:, :, None] & real, other=0).to(
                tl.float32
            )
            squares += tl.sum(tl.sum(part * part, 1), 0)
        factor = tl.rsqrt(squares / K + eps)
    # [BN, BB]
    product, wide = tl.zeros([BN, BB], tl.float32), tl.zeros([BN, BB], tl.float32)
    for done in tl.static_range(0, K, C * BC):
        deep = done + column < K
        if done > 0:
            matrix = tl.load(weight + tile + done, mask=there & deep[:, None, :], other=0)
            if SWIGLU:
                other = tl.load(second + tile + done, mask=there & deep[:, None, :], other=0)
        part = tl.load(vectors + done, mask=deep[:, :, None] & real, other=0)
        if norm is not None:
            scale = tl.load(norm + done + column, mask=deep, other=0).to(tl.float32)
            part = cast(part.to(tl.float32) * factor[None, None, :] * scale[:, :, None], part.dtype)
        product += tl.sum(_partial_products(matrix, part), 0)
        if SWIGLU:
            wide += tl.sum(_partial_products(other, part), 0)
    if SWIGLU:
        product = _swiglu(product, wide)
    place, mask = start + row[:, None], (row < rows)[:, None] & (vector < B)[None, :]
    if residual is not None:
        product += tl.load(residual + vector[None, :] * residual_b + place, mask=mask, other=0).to(tl.float32)
    tl.store(out + vector[None, :] * out_b + place, cast(product, out.dtype.element_ty), mask=mask)


def gemv(
    x: Tensor,
    weights: Sequence[Tensor],
    norm: Tensor | None,
    residual: Tensor | None,
    swiglu: bool,
    eps: float,
    *,
    together: bool,
) -> Tensor:
    """``x [B, K]`` by up to three ``weights [N, K]`` -> ``[B, sum of N]``, or ``[B, N]`` if ``swiglu``.

    ``together`` takes the vectors, 16 at most, to tensor cores.
    """
    given = (x, norm, residual)
    x, norm, residual = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in given)
    (batch, depth), sizes = x.shape, [len(weight) for weight in weights]
    out = x.new_empty(batch, sizes[0] if swiglu else sum(sizes))
    kernel = _gemv_together_kernel if together else _gemv_kernel
    whole = {} if together else {"BK": padded(depth)}
    tiles = tiles_of(kernel.__name__, x.device, depth, x.element_size())
    blocks = [-(-size // tiles["BN"]) for size in sizes]
    first, second, third = (*weights, None, None)[:3]
    kernel[(blocks[0] if swiglu else sum(blocks),)](
        x, norm, first, second, third, residual, out,
        x.stride(0), 0 if residual is None else residual.stride(0), out.stride(0),
        *(*sizes, 0, 0)[:3], eps,
        B=batch, K=depth, SWIGLU=swiglu, **whole, **tiles, **dependent_launch(x.device),
    )  # fmt: skip
    return out
