"""Cleaning a memory by its singular values, and telling how full it is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from newllm.modules.gate import MemoryFeature
from newllm.modules.memory_health import clean
from newllm.modules.tensor_memory import TensorMemory
from newllm.testing import assert_rounding

D = 8


def patterns(count: int, batch: int = 2, heads: int = 3) -> tuple[Tensor, Tensor]:
    shape = (batch, heads, count, D)
    return torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)


def paper_memory(slots: int = 1, heads: int = 3, batch: int = 2) -> TensorMemory:
    feature = MemoryFeature(heads, scale=1.0, bias=0.0)
    made = TensorMemory(heads, D, slots=slots, feature=feature).requires_grad_(False)
    made.reset(batch, dtype=torch.float64)
    return made


def load(matrix: Tensor, norm: Tensor) -> TensorMemory:
    """A memory with this content, ``[F, V]`` and ``[F]``."""
    made = paper_memory(heads=1, batch=1)
    state = made.export_state()
    state |= {"matrix": matrix.expand(1, 1, 1, D, D), "norm": norm.expand(1, 1, 1, D)}
    made.import_state(state)
    return made


def diagonal(values: list[float]) -> Tensor:
    return torch.diag(torch.tensor(values + [0.0] * (D - len(values)), dtype=torch.float64))


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def rotation() -> Tensor:
    return torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q


def assert_svd_close(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the rounding of a decomposition, p(d) eps |A| with p(d) = 16 d^2, and its products."""
    assert_rounding(actual, expected, additions=16 * D * D, magnitude=float(expected.norm()))


@pytest.mark.parametrize("rank", [1, 3, D])
def test_row_76_memory_of_rank_k_is_recovered_and_reads_as_before(rank: int) -> None:
    kept = paper_memory(slots=2)
    for _ in range(2):
        kept.update(*patterns(rank))
    before, q = kept.states, torch.randn(2, 6, 5, D, dtype=torch.float64)
    answers = kept.retrieve(q)
    stats = kept.svd_cleaning(max_rank=rank)
    for old, new in zip(before, kept.states, strict=True):
        assert_svd_close(new.matrix, old.matrix)
        assert_svd_close(new.norm, old.norm)
        assert torch.equal(new.count, old.count)
    assert_svd_close(kept.retrieve(q), answers)
    assert stats.original_rank == stats.retained_rank == rank
    assert stats.singular_values_before.shape == stats.singular_values_after.shape == (2 * 2 * 3, D)
    assert torch.equal(stats.singular_values_after[:, rank:], torch.zeros(12, D - rank, dtype=torch.float64))
    assert_svd_close(number(stats.energy_retained), number(1))


def test_row_76_noise_leaves_matrix_and_norm_together() -> None:
    """Patterns in the first features, fainter ones in the others: cleaning forgets the latter altogether."""
    right, keys = rotation(), torch.rand(D, D, dtype=torch.float64)
    keys[:3, 3:], keys[3:, :3] = 0, 0
    strength = torch.tensor([5.0, 4.0, 3.0] + [1e-3] * 5, dtype=torch.float64)
    values = strength[:, None] * right
    pure = (keys[:3].T @ values[:3], keys[:3].sum(0))
    cleaned = load(keys.T @ values, keys.sum(0))
    cleaned.svd_cleaning(max_rank=3)
    assert_svd_close(cleaned.states[0].matrix[0, 0], pure[0])
    assert_svd_close(cleaned.states[0].norm[0, 0], pure[1])


def test_row_76_norm_survives_where_values_cancel() -> None:
    """Two keys with opposite values: rank 1, and the norm is orthogonal to its only direction."""
    v = torch.randn(D, dtype=torch.float64)
    matrix, norm = torch.zeros(D, D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
    matrix[0], matrix[1], norm[:2] = v, -v, 1
    kept = load(matrix, norm)
    kept.svd_cleaning(max_rank=1)
    assert_svd_close(kept.states[0].matrix[0, 0], matrix)
    assert_svd_close(kept.states[0].norm[0, 0], norm)


@pytest.mark.parametrize("max_rank", range(1, D))
def test_row_76_no_readout_grows_beyond_the_loudest_feature(max_rank: int) -> None:
    matrix = torch.randn(4, D, D, dtype=torch.float64) * torch.rand(4, D, 1, dtype=torch.float64)
    norm = torch.rand(4, D, dtype=torch.float64)
    cleaned, left, _ = clean(matrix, norm, energy_threshold=0.95, max_rank=max_rank, eps=1e-6)
    loudest = (matrix.norm(dim=-1) / norm).amax(-1, keepdim=True)
    readouts = (cleaned.norm(dim=-1) / left) / loudest
    assert bool((left >= 0).all()) and readouts.max() <= 1 + 16 * D * D * torch.finfo(torch.float64).eps


@pytest.mark.parametrize(
    ("threshold", "rank"),
    # Energies 16, 4, 4, 4, 4 of 32: cumulative shares 1/2, 5/8, 3/4, 7/8, 1.
    [(0.4, 1), (0.55, 2), (0.7, 3), (0.8, 4), (0.9, 5)],
)
def test_row_76_energy_up_to_the_threshold_and_the_first_beyond_is_kept(threshold: float, rank: int) -> None:
    values = [4.0, 2.0, 2.0, 2.0, 2.0]
    kept = load(diagonal(values), torch.ones(D, dtype=torch.float64))
    stats = kept.svd_cleaning(threshold)
    assert stats.original_rank == 5
    assert stats.retained_rank == rank
    assert_svd_close(number(stats.energy_retained), number((12 + 4 * rank) / 32))
    assert_svd_close(kept.states[0].matrix.norm(), number(12 + 4 * rank).sqrt())


def test_each_batch_row_and_head_is_cut_at_its_own_rank() -> None:
    matrix = torch.stack([diagonal([1.0] * rank) for rank in (1, 4, 8, 0)]).view(2, 2, D, D)
    norm = torch.ones(2, 2, D, dtype=torch.float64)
    cleaned, left, stats = clean(matrix, norm, energy_threshold=0.6, max_rank=None, eps=1e-6)
    # 0.6 of 4 equal energies is 2 and the first beyond, of 8 it is 4 and the first beyond; of none, none.
    assert (stats.singular_values_after > 0).sum(-1).tolist() == [1, 3, 5, 0]
    assert (stats.original_rank, stats.retained_rank) == ((1 + 4 + 8) / 4, (1 + 3 + 5) / 4)
    assert_svd_close(number(stats.energy_retained), number((1 + 3 / 4 + 5 / 8 + 1) / 4))
    assert torch.equal(cleaned[1, 1], matrix[1, 1]) and torch.equal(left[1, 1], norm[1, 1])


def test_cleaning_carries_no_gradient() -> None:
    kept = paper_memory(batch=2)
    k, v = patterns(4)
    kept.update(k.requires_grad_(), v)
    assert kept.states[0].matrix.requires_grad
    kept.svd_cleaning()
    assert not kept.states[0].matrix.requires_grad and not kept.states[0].norm.requires_grad


def test_health_counts_by_entropy() -> None:
    for rank in (1, 2, D):
        kept = load(rotation() @ diagonal([3.0] * rank) @ rotation(), torch.ones(D, dtype=torch.float64))
        health = kept.health()
        assert_svd_close(number(health.effective_rank), number(rank))
        assert (health.max_rank, health.rank_ratio) == (D, health.effective_rank / D)
        assert_svd_close(number(health.memory_norm), number(3 * math.sqrt(rank)))
        assert_svd_close(number(health.normalizer_norm), number(math.sqrt(D)))
        assert health.needs_cleaning is (rank == D)


def test_health_is_not_numerical_rank() -> None:
    """Full numerical rank, but nearly all content in one direction."""
    kept = load(diagonal([1.0] + [1e-3] * (D - 1)), torch.ones(D, dtype=torch.float64))
    assert kept.svd_cleaning(1.0).original_rank == D
    assert kept.health().rank_ratio < 2 / D


@pytest.mark.parametrize(
    ("rank", "reason"),
    [
        (8, "effective rank is 1.00 of the largest possible, above 0.85"),
        (6, "effective rank is 0.75 of the largest possible, approaching 0.85"),
        (4, "effective rank is 0.50 of the largest possible, at most 0.68"),
    ],
)
def test_health_says_why(rank: int, reason: str) -> None:
    kept = load(diagonal([1.0] * rank), torch.ones(D, dtype=torch.float64))
    assert kept.health().reason == reason
    assert kept.health(clean_above=0.4, warn_above=0.3).needs_cleaning


def test_health_leaves_empty_and_frozen_memories_out() -> None:
    kept = paper_memory(slots=3)
    assert kept.health()[:5] == (0.0, D, 0.0, 0.0, 0.0)
    assert not kept.health().needs_cleaning
    k, v = patterns(1)
    kept.update(*patterns(5 * D))
    kept.freeze(0)
    kept.update(k, v)
    assert_svd_close(number(kept.health().effective_rank), number(1))


def test_maybe_clean_cleans_when_needed_only() -> None:
    healthy = load(diagonal([1.0] * 4), torch.ones(D, dtype=torch.float64))
    before = healthy.states
    assert healthy.maybe_clean() is None
    assert healthy.states == before
    full = load(diagonal([1.0] * D), torch.ones(D, dtype=torch.float64))
    stats = full.maybe_clean(max_rank=4)
    assert stats is not None and stats.retained_rank == 4
    assert not full.health().needs_cleaning
