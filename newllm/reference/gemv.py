"""Matrices times a few vectors, with what stands around such a product in a decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from newllm.reference.norm import rms_norm


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
    with torch.autocast(x.device.type, enabled=False):
        if norm is not None:
            x = rms_norm(x, norm, eps)
        parts = [F.linear(x, weight) for weight in weights]
        out = F.silu(parts[0]) * parts[1] if swiglu else torch.cat(parts, -1)
        return out if residual is None else residual + out
