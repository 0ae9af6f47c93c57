"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from newllm.reference.norm import rms_norm


class RMSNorm(nn.Module):
    """RMSNorm (arXiv 1910.07467) of the last axis, in at least float32, rounded before the weight (Llama)."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """``[..., size]`` in x's dtype."""
        return rms_norm(x, self.weight, self.eps)
