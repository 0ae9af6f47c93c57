"""How full an associative memory is, and cleaning it by a truncated singular value decomposition."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SVDCleaningStats(NamedTuple):
    """What a cleaning did; d = min(F, V), N matrices = cleaned slots * batch * heads.

    ``original_rank`` and ``retained_rank`` are mean counts of singular values, above eps before and kept;
    ``energy_retained`` is the mean kept share of the sum of their squares. ``singular_values_before`` and
    ``singular_values_after`` are ``[N, d]``, zero where dropped.
    """

    original_rank: float
    retained_rank: float
    energy_retained: float
    singular_values_before: Tensor
    singular_values_after: Tensor


class MemoryHealth(NamedTuple):
    """How full a memory is; means over the matrices that hold anything.

    ``effective_rank`` is the exponential of the entropy of the singular values' shares of their sum,
    ``max_rank`` is min(F, V), ``rank_ratio`` their quotient. ``memory_norm`` is the Frobenius norm of
    a matrix, ``normalizer_norm`` the Euclidean norm of its norm vector.
    """

    effective_rank: float
    max_rank: int
    rank_ratio: float
    memory_norm: float
    normalizer_norm: float
    needs_cleaning: bool
    reason: str


@torch.no_grad()
def clean(
    matrix: Tensor, norm: Tensor, *, energy_threshold: float, max_rank: int | None, eps: float
) -> tuple[Tensor, Tensor, SVDCleaningStats]:
    """Keep the leading singular directions of each memory ``matrix [..., F, V]``, ``norm [..., F]``.

    Kept are the singular values whose cumulative share of the energy (their squares) is at most
    ``energy_threshold`` and the first beyond, or exactly ``max_rank`` of them. The norm is projected on
    the kept key features as if it were one more value column, so that what leaves the matrix leaves it
    too. Projection alone could empty it under content that stays, where values cancel; so each entry
    keeps at least the share that its row of the matrix keeps. No readout can then exceed the largest
    ``|row of matrix| / norm`` from before, and where nothing is dropped the norm stays as it was.
    """
    with torch.autocast(matrix.device.type, enabled=False):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        energy = values.square()
        total = energy.sum(-1, keepdim=True)
        if max_rank is None:
            share = energy.cumsum(-1) / total
            rank = (share <= energy_threshold).sum(-1, keepdim=True) + 1
        else:
            rank = torch.full_like(total, max_rank, dtype=torch.int64)
        kept = (torch.arange(values.shape[-1], device=values.device) < rank) & (values > 0)
        left = left * kept[..., None, :]
        cleaned = (left * values[..., None, :]) @ right
        projected = (left @ (left.mT @ norm[..., None])).squeeze(-1)
        cleaned_norm = torch.maximum(projected, norm * _row_shares(cleaned, matrix))
    kept_energy = torch.where(total > 0, (energy * kept).sum(-1, keepdim=True) / total, 1.0)
    stats = SVDCleaningStats(
        original_rank=_mean((values > _negligible(values, matrix, eps)).sum(-1)),
        retained_rank=_mean(kept.sum(-1)),
        energy_retained=_mean(kept_energy),
        singular_values_before=values.flatten(0, -2),
        singular_values_after=(values * kept).flatten(0, -2),
    )
    return cleaned, cleaned_norm, stats


def _row_shares(cleaned: Tensor, matrix: Tensor) -> Tensor:
    """Share of each row's length that cleaning left, 1 for an empty row: ``[..., F]``."""
    before = matrix.norm(dim=-1)
    return torch.where(before > 0, cleaned.norm(dim=-1) / before, 1.0).clamp(max=1)


def _negligible(values: Tensor, matrix: Tensor, eps: float) -> Tensor:
    """Singular values up to eps, or up to the rounding of the largest, count as zero: ``[..., 1]``."""
    rounding = max(matrix.shape[-2:]) * torch.finfo(values.dtype).eps
    return (values[..., :1] * rounding).clamp(min=eps)


def _mean(numbers: Tensor) -> float:
    return float(numbers.double().mean())


@torch.no_grad()
def measure(matrix: Tensor, norm: Tensor, *, clean_above: float, warn_above: float) -> MemoryHealth:
    """Health of the memories ``matrix [..., F, V]``, ``norm [..., F]``; all of them empty is healthy.

    Effective rank after Roy and Vetterli 2007 ("The effective rank", eq. 2-4): the plain count of
    singular values above a threshold is nearly always full and would ask for cleaning for ever.
    """
    values = torch.linalg.svdvals(matrix)
    sums = values.sum(-1)
    written = sums > 0
    count = written.sum().clamp(min=1)
    shares = values / torch.where(written, sums, 1.0)[..., None]
    ranks = torch.special.entr(shares).sum(-1).exp() * written
    max_rank = values.shape[-1]
    effective_rank = float(ranks.sum() / count)
    ratio = effective_rank / max_rank
    return MemoryHealth(
        effective_rank=effective_rank,
        max_rank=max_rank,
        rank_ratio=ratio,
        memory_norm=float((matrix.norm(dim=(-2, -1)) * written).sum() / count),
        normalizer_norm=float((norm.norm(dim=-1) * written).sum() / count),
        needs_cleaning=ratio > clean_above,
        reason=_reason(ratio, clean_above, warn_above),
    )


def _reason(ratio: float, clean_above: float, warn_above: float) -> str:
    filled = f"effective rank is {ratio:.2f} of the largest possible"
    if ratio > clean_above:
        return f"{filled}, above {clean_above}"
    if ratio > warn_above:
        return f"{filled}, approaching {clean_above}"
    return f"{filled}, at most {warn_above}"
