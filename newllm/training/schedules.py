"""Learning rates and clipping over the course of a training."""

from __future__ import annotations

import math
from collections.abc import Sequence

FLOOR = 0.1


def rate_factor(step: int, *, steps: int, warmup: int, shape: str = "cosine") -> float:
    """The share of the peak rate at ``step`` (from 0): a linear rise, then a fall to a tenth by ``shape``.

    ``shape`` is cosine, linear, or constant.
    """
    if step < warmup:
        return step / max(1, warmup)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    fall = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    return FLOOR + (1 - FLOOR) * fall[shape]


def staged_factor(
    step: int, *, steps: int, warmup: int, shape: str, first: int = 0, first_factor: float = 1.0
) -> float:
    """The same in two stages with a schedule each: ``first`` steps times ``first_factor``, then the rest."""
    if step < first:
        return first_factor * rate_factor(step, steps=first, warmup=min(warmup, first // 2), shape=shape)
    return rate_factor(step - first, steps=steps - first, warmup=warmup, shape=shape)


def clip_norm(progress: float, schedule: Sequence[Sequence[float]], otherwise: float) -> float:
    """The norm that gradients are clipped to after a share ``progress`` of the training.

    ``schedule`` holds ``[until, norm]`` pairs in order, ``until`` a share of the training; past the last one
    it is ``otherwise``.
    """
    return next((norm for until, norm in schedule if progress < until), otherwise)
