"""Matrices times a few vectors, with what stands around such a product in a decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (arXiv 1910.07467) of the last axis, in at least float32, rounded before the weight (Llama)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def gemv(
    x: Tensor,
    weights: Sequence[Tensor],
    *,
    norm: Tensor | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """``x [B, K]`` -> ``[B, N]``, see ``newllm.ops.gemv``."""
    if norm is not None:
        x = rms_norm(x, norm, eps)
    parts = [F.linear(x, weight) for weight in weights]
    out = F.silu(parts[0]) * parts[1] if swiglu else torch.cat(parts, -1)
    return out if residual is None else residual + out
