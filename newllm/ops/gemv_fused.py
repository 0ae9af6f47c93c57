"""``gemv`` by its Triton kernel: what it offers, and its contract with PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from newllm.ops.support import DTYPES

# Most vectors, which tensor cores multiply where there are more than SINGLE, and the longest.
SINGLE, TOGETHER, LENGTH = 4, 16, 16384


def declined(
    x: Tensor, weights: tuple[Tensor, ...], norm: Tensor | None, residual: Tensor | None
) -> str | None:
    """Why the kernel cannot take this call; None if it can."""
    if x.dtype not in DTYPES:
        return f"its kernel takes float16, bfloat16 and float32, got {x.dtype}"
    most = SINGLE if x.dtype == torch.float32 else TOGETHER
    if not 1 <= len(x) <= most:
        return f"its kernel takes 1 to {most} vectors of {x.dtype}, got {len(x)}"
    if x.shape[1] > LENGTH:
        return f"its kernel takes vectors of up to {LENGTH} elements, got {x.shape[1]}"
    given = [tensor for tensor in (x, *weights, norm, residual) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return "its kernel has no gradient"
    if not all(weight.is_contiguous() for weight in weights):
        return "its kernel takes contiguous weights"
    return None


@torch.library.custom_op("newllm::gemv", mutates_args=())
def gemv(
    x: Tensor, weights: list[Tensor], norm: Tensor | None, residual: Tensor | None, swiglu: bool, eps: float
) -> Tensor:
    """See ``newllm.kernels.gemv.gemv``."""
    from newllm.kernels.gemv import gemv as launch

    return launch(x, weights, norm, residual, swiglu, eps, together=len(x) > SINGLE)


@gemv.register_fake
def _(x: Tensor, weights: list[Tensor], norm: object, residual: object, swiglu: bool, eps: float) -> Tensor:
    return x.new_empty(len(x), len(weights[0]) if swiglu else sum(len(weight) for weight in weights))
