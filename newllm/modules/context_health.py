"""How much of their space contexts use.

N contexts, C context width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class EffectiveRank(NamedTuple):
    """``value`` = exp of the entropy of the singular values' shares, ``share`` of ``width``, and ``rank``.

    ``rank`` counts singular values above 1e-6. All depend on how many contexts were looked at, ``rows``.
    """

    value: float
    share: float
    rank: int
    rows: int
    width: int


def effective_rank(contexts: Tensor, *, rows: int = 10000, seed: int = 42) -> EffectiveRank:
    """The effective rank of uncentred ``contexts [N, C]``, by singular values of at most ``rows`` of them.

    Which rows are looked at is drawn from ``seed``. Computed in float64 on the CPU.

    Raises ``ValueError`` for another shape.
    """
    if contexts.ndim != 2 or 0 in contexts.shape:
        raise ValueError(f"contexts must be of shape [N, C], got {list(contexts.shape)}")
    if len(contexts) > rows:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(contexts), generator=generator)[:rows]
        contexts = contexts[chosen.to(contexts.device)]
    values = torch.linalg.svdvals(contexts.detach().cpu().double())
    shares = values / values.sum()
    value = float((-(shares * (shares + 1e-10).log()).sum()).exp())
    width = contexts.shape[1]
    return EffectiveRank(value, value / width, int((values > 1e-6).sum()), len(contexts), width)
