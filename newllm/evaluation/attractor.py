"""Where the contexts of repeated tokens go: apart, or all to one point.

n tokens, C context width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_DEAD_VARIANCE = 1e-3
_ARRIVED_SHARE = 0.05


class Attractor(NamedTuple):
    """Pairwise distances of fixed points, dimensions that do not tell tokens apart, and what follows."""

    mean: float
    std: float
    least: float
    most: float
    dead: int
    width: int
    verdict: str


@torch.no_grad()
def repeated_contexts(model: Any, tokens: Sequence[int], repetitions: int) -> Tensor:
    """The contexts ``[n, repetitions, C]`` of each token read again and again from a zero context."""
    model.eval()
    ids = torch.tensor(tokens, device=model.device)[:, None].expand(-1, repetitions)
    contexts: Tensor = model.model(ids, use_cache=False).contexts
    return contexts.float().cpu()


def global_attractor(model: Any, tokens: Sequence[int], *, repetitions: int = 10) -> Attractor:
    """Whether repetitions of any of ``tokens`` end at one point.

    A mean pairwise distance below 0.01, or more than nine tenths of dimensions with a variance below 0.001,
    is an ``attractor``; below 0.1, or more than half, ``suspicious``; otherwise ``apart``.

    Raises ``ValueError`` for fewer than two tokens.
    """
    if len(tokens) < 2:
        raise ValueError(f"tokens must be at least 2, got {len(tokens)}")
    points = repeated_contexts(model, tokens, repetitions)[:, -1]
    distances = torch.pdist(points.double())
    dead, width = int((points.var(0) < _DEAD_VARIANCE).sum()), points.shape[1]
    mean = distances.mean().item()
    bad, doubtful = mean < 0.01 or dead > 0.9 * width, mean < 0.1 or dead > 0.5 * width
    said = "attractor" if bad else "suspicious" if doubtful else "apart"
    spread = distances.std().item() if len(distances) > 1 else 0.0
    return Attractor(mean, spread, distances.min().item(), distances.max().item(), dead, width, said)


def fixed_points(model: Any, tokens: Sequence[int], *, repetitions: int = 50) -> list[dict[str, Any]]:
    """A row per token: its context after one reading beside that after ``repetitions``.

    ``l2`` squared is ``magnitude`` squared (of norms alone) plus ``direction`` squared. ``steps`` is the
    first reading whose distance to the next one is below a twentieth of the first such distance, None if
    there is none: distance to the last state would call anything converged. ``last_change`` is what the last
    reading changed.
    """
    states = repeated_contexts(model, tokens, repetitions).double()
    rows = []
    for token, path in zip(tokens, states, strict=True):
        once, fixed = path[0], path[-1]
        changes = path.diff(dim=0).norm(dim=-1)
        arrived = torch.nonzero(changes < _ARRIVED_SHARE * changes[0])
        l2 = (once - fixed).norm().item()
        magnitude = abs(once.norm().item() - fixed.norm().item())
        cosine = torch.nn.functional.cosine_similarity(once, fixed, 0).clamp(-1, 1)
        rows.append(
            {
                "token": token,
                "l2": l2,
                "cosine": cosine.item(),
                "angle": torch.rad2deg(cosine.acos()).item(),
                "pearson": torch.corrcoef(torch.stack([once, fixed]))[0, 1].item(),
                "norm_once": once.norm().item(),
                "norm_fixed": fixed.norm().item(),
                "magnitude": magnitude,
                "direction": max(0.0, l2**2 - magnitude**2) ** 0.5,
                "steps": int(arrived[0]) + 1 if len(arrived) else None,
                "last_change": changes[-1].item(),
            }
        )
    return rows
