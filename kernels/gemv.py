"""Matrices times a few vectors, between a normalisation and a residual sum, in one kernel.

What a step of decoding mostly does. Each program asks for its rows of the weights before it waits for the
kernel that makes the vectors, so that on a device with dependent launches reading the weights, which is all
that such a product costs, goes on while other kernels still run.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from newllm.kernels.common import cast, padded, wait_for_previous_kernel
from newllm.kernels.tiles import dependent_launch, tiles_of


@triton.jit
def _gemv_kernel(
    x, norm, first, second, third, residual, out,
    x_b, residual_b, out_b, first_n, second_n, third_n, eps,
    B: tl.constexpr, K: tl.constexpr, SWIGLU: tl.constexpr, PDL: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A program for every BN rows of a matrix, or of both under SWIGLU, and all B vectors."""
    block, start = tl.program_id(0), 0
    weight, rows = first, first_n
    if second is not None and not SWIGLU:
        blocks = tl.cdiv(first_n, BN)
        if block >= blocks:
            weight, rows, start, block = second, second_n, first_n, block - blocks
            if third is not None:
                blocks = tl.cdiv(second_n, BN)
                if block >= blocks:
                    weight, rows, start, block = third, third_n, start + second_n, block - blocks
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
            wide = tl.sum(other.to(tl.float32) * vector[None, :], 1) * factor
            product = product / (1 + tl.exp(-product)) * wide
        place = start + row
        if residual is not None:
            product += tl.load(residual + b * residual_b + place, mask=there, other=0).to(tl.float32)
        tl.store(out + b * out_b + place, cast(product, out.dtype.element_ty), mask=there)


def gemv(
    x: Tensor,
    weights: Sequence[Tensor],
    norm: Tensor | None,
    residual: Tensor | None,
    swiglu: bool,
    eps: float,
) -> Tensor:
    """``x [B, K]`` by up to three ``weights [N, K]`` -> ``[B, sum of N]``, or ``[B, N]`` if ``swiglu``."""
    x, residual = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (x, residual))
    (batch, depth), sizes = x.shape, [len(weight) for weight in weights]
    out = x.new_empty(batch, sizes[0] if swiglu else sum(sizes))
    tiles = tiles_of("_gemv_kernel", x.device, depth, x.element_size())
    blocks = [-(-size // tiles["BN"]) for size in sizes]
    first, second, third = (*weights, None, None)[:3]
    _gemv_kernel[(blocks[0] if swiglu else sum(blocks),)](
        x, norm, first, second, third, residual, out,
        x.stride(0), 0 if residual is None else residual.stride(0), out.stride(0),
        *(*sizes, 0, 0)[:3], eps,
        B=batch, K=depth, SWIGLU=swiglu, BK=padded(depth), **tiles, **dependent_launch(x.device),
    )  # fmt: skip
    return out
