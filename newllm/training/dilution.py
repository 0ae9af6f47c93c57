"""Memory dilution: training for streams far longer than those trained on, at no cost.

The linear memory is a sum over segments and does not know their order, so a filler segment that counts
w times is exactly a stream with w such segments.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dilution_weights(
    kept: Tensor, *, factor: float, strength: float, generator: torch.Generator, undiluted: float = 0.25
) -> Tensor:
    """Factors ``[B, N]`` of what each segment adds to the memory, log-uniform in ``[1, factor ** strength]``.

    ``kept [B, N]`` (bool) marks segments that keep weight 1, those that hold what must be remembered.
    ``strength`` in [0, 1] ramps the dilution in; a share ``undiluted`` of the rows stays as it is.

    Raises:
        ValueError: for a factor below 1.
    """
    if factor < 1:
        raise ValueError(f"factor must be at least 1, got {factor}")
    rows, segments = kept.shape
    exponent = torch.rand(rows, segments, generator=generator) * (strength * math.log(factor))
    plain = torch.rand(rows, 1, generator=generator) < undiluted
    return torch.where(kept.cpu() | plain, 1.0, exponent.exp()).to(kept.device)


def ramp(progress: float, start: float = 0.4, end: float = 0.7) -> float:
    """Strength of the dilution after a share ``progress`` of the training."""
    return min(1.0, max(0.0, (progress - start) / (end - start)))


def diluted(kept: Tensor, factor: float, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
    """``segment_weight`` of a batch after a share ``progress`` of the training; nothing for a factor of 1.

    Only the linear rule knows such weights, so without them any rule can be trained.
    """
    if factor == 1:
        return {}
    weights = dilution_weights(kept, factor=factor, strength=ramp(progress), generator=generator)
    return {"segment_weight": weights}
