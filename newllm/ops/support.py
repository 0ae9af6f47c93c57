"""What the fused implementations offer; everything else is the reference's."""

from __future__ import annotations

import torch
from torch import Tensor

from newllm.types import FeatureMap

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_WIDTH = 256


def unsupported(
    dtype: torch.dtype,
    *widths: int,
    feature: FeatureMap | None = None,
    decay: Tensor | None = None,
) -> str | None:
    """Why the Triton kernels cannot take this call; None if they can."""
    if dtype not in DTYPES:
        return f"its kernels take float16, bfloat16 and float32, got {dtype}"
    if max(widths) > MAX_WIDTH:
        return f"its kernels take widths up to {MAX_WIDTH}, got {max(widths)}"
    if feature is not None and feature.kind != "elu1":
        return f"its kernels have the feature map 'elu1', got {feature.kind!r}"
    if feature is not None and feature.write is not None:
        return "its kernels have no write gate, got feature.write"
    if decay is not None:
        return "its kernels have no decay, got one"
    return None
