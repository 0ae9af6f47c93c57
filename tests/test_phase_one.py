"""Phase 1: sweeps, losses, stopping rules, exact evaluation."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from newllm.backend import native
from newllm.modules import ContextBlock
from newllm.modules.context_block import shift_contexts
from newllm.modules.context_health import effective_rank
from newllm.testing import assert_rounding
from newllm.training.diversity import DIVERSITY, diversity_loss
from newllm.training.phase_config import Phase1Config, Phase2Config
from newllm.training.phase_one import (
    convergence_rate,
    exact_contexts,
    stop_reason,
    train_contexts,
    validation_rank,
)

QUIET = Phase1Config(context_noise=0.0, max_iterations=3, stop_rate=2.0, batch_size=100)


def close(actual: Tensor, expected: Tensor, additions: int = 4096) -> None:
    assert_rounding(actual, expected, additions=additions, magnitude=16)


def block(dtype: torch.dtype = torch.float64, **options: Any) -> ContextBlock:
    torch.manual_seed(1)
    return ContextBlock(8, 6, **options).to(dtype)


def stream(length: int = 400, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(length, 6, generator=torch.Generator().manual_seed(2), dtype=dtype)


def weights(one: ContextBlock) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in one.parameters()])


def test_row_22_k_sweeps_are_a_recurrence_of_k_tokens() -> None:
    one, x = block(), stream(12)
    contexts = torch.zeros(12, 8).double()
    with torch.no_grad():
        for _ in range(3):
            contexts = one.step(shift_contexts(contexts), x)[-1]
        for position in range(12):
            last = one(x[None, max(0, position - 2) : position + 1])[0][0, -1]
            close(contexts[position], last)


def test_row_23_zero_and_wrapped_starts() -> None:
    x = stream()
    changed = x.clone()
    changed[-1] += 1
    for start, same in (("zero", True), ("wrap", False)):
        config = replace(QUIET, start=start, learning_rate=0.0)
        first, second = (train_contexts(block(), data, config).contexts[0] for data in (x, changed))
        assert torch.equal(first, second) == same


def test_row_24_accumulated_gradients_are_the_mean_over_batches() -> None:
    x, one, other = stream(), block(), block()
    config = replace(QUIET, max_iterations=2)
    train_contexts(one, x, config)
    before = shift_contexts(
        0.01 * torch.randn(400, 8, generator=torch.Generator().manual_seed(42), dtype=torch.float64)
    )
    optimizer = torch.optim.Adam(other.parameters(), config.learning_rate)
    losses = [
        diversity_loss("oacd")(other.step(c, part)[-1])
        for c, part in zip(before.split(100), x.split(100), strict=True)
    ]
    torch.stack(losses).mean().backward()
    torch.nn.utils.clip_grad_norm_(other.parameters(), config.gradient_clip)
    optimizer.step()
    # Adam's first step is the sign of the gradient: rounding near zero would flip it, and does not here.
    close(weights(one), weights(other))


def test_row_25_noise_is_for_training_alone() -> None:
    x = stream()
    noisy, again = (train_contexts(block(), x, replace(QUIET, context_noise=0.1)).contexts for _ in range(2))
    assert torch.equal(noisy, again)
    assert not torch.equal(noisy, train_contexts(block(), x, QUIET).contexts)
    one = block()
    assert torch.equal(exact_contexts(one, x), exact_contexts(one, x))


def test_row_26_cvfp_is_the_raw_distance_to_the_last_sweep() -> None:
    config = replace(QUIET, dist_reg_weight=0.0, max_iterations=4, learning_rate=0.0)
    x, one, contexts = stream(), block(), None
    generator = torch.Generator().manual_seed(42)
    contexts = 0.01 * torch.randn(400, 8, generator=generator, dtype=torch.float64)
    for row in train_contexts(one, x, config).history:
        moved = one.step(shift_contexts(contexts), x)[-1].detach()
        expected = (moved - contexts).square().mean()
        close(torch.tensor(row["change"], dtype=torch.float64), expected)
        contexts = moved


def test_rows_27_to_30_name_their_losses() -> None:
    assert list(DIVERSITY) == ["oacd", "mcdl", "odcm", "w_mse", "sdl", "nuc"]
    with pytest.raises(ValueError, match=r"diversity must be one of oacd, mcdl, .*, got 'vicreg'"):
        diversity_loss("vicreg")


def test_row_27_mcdl_in_closed_form() -> None:
    """Behind a layer norm every row has the squared norm C, so that only the mean's norm is left."""
    x = torch.nn.functional.layer_norm(torch.randn(50, 8).double(), (8,), eps=0.0)
    mean = x.mean(0)
    expected = -((50 * (8 - mean.square().sum())) ** 0.5) / 50
    close(diversity_loss("mcdl")(x), expected)
    close(diversity_loss("oacd")(x), expected + 0.1 * mean.square().sum())


def test_row_28_odcm_by_its_covariance() -> None:
    x = torch.randn(50, 4).double() * torch.tensor([0.2, 0.5, 1.0, 2.0]).double()
    hinge, apart = 0.0, 0.0
    centred = (x - x.mean(0)).T
    for i in range(4):
        variance = float(centred[i] @ centred[i]) / 49
        hinge += max(0.0, 1 - (variance + 1e-4) ** 0.5) / 4
        apart += sum((float(centred[i] @ centred[j]) / 49) ** 2 for j in range(4) if j != i) / 4
    close(diversity_loss("odcm")(x), torch.tensor(hinge + 0.04 * apart, dtype=torch.float64))


def test_row_29_oacd_has_its_gradient_and_shrinks_the_mean() -> None:
    x = (torch.randn(6, 3) + 1).double().requires_grad_()
    assert torch.autograd.gradcheck(diversity_loss("oacd"), x)
    data = torch.randn(1000, 256, generator=torch.Generator().manual_seed(2)).double() + 0.3
    norms = []
    for rate in (0.0, 0.002):
        torch.manual_seed(1)
        one = ContextBlock(16, 256).double()
        config = replace(QUIET, max_iterations=30, learning_rate=rate, batch_size=500, improvement_from=2.0)
        norms.append(train_contexts(one, data, config).contexts.mean(0).norm())
    assert norms[1] < 0.8 * norms[0]


@pytest.mark.parametrize("name", ["w_mse", "sdl", "nuc", "odcm"])
def test_row_30_other_losses_raise_the_rank_of_what_they_move(name: str) -> None:
    torch.manual_seed(0)
    x = (torch.randn(200, 8) * torch.linspace(0.1, 1, 8)).double().requires_grad_()
    before = effective_rank(x).value
    optimizer = torch.optim.Adam([x], 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        diversity_loss(name)(x).backward()
        optimizer.step()
    assert effective_rank(x).value > before + 0.1


def test_row_31_the_weight_of_diversity_is_applied() -> None:
    half, most = block(), block()
    for one, weight in ((half, 0.5), (most, 0.9)):
        train_contexts(one, stream(), replace(QUIET, dist_reg_weight=weight))
    assert not torch.equal(weights(half), weights(most))
    with pytest.raises(ValueError, match=r"dist_reg_weight must be between 0 and 1, got 1\.5"):
        Phase1Config(dist_reg_weight=1.5)


def reasons(rates: list[float], **options: Any) -> list[str | None]:
    config = Phase1Config(**options)
    rows = [{"sweep": sweep, "convergence_rate": rate} for sweep, rate in enumerate(rates, 2)]
    return [stop_reason(rows[: place + 1], config) for place in range(len(rows))]


def test_row_32_stopping_rules() -> None:
    assert reasons([0.1, 0.5, 0.8, 0.9]) == [None, None, None, "rate"]
    # Everything converged at the second sweep is not to be believed.
    assert reasons([1.0, 1.0, 1.0, 1.0]) == [None, None, None, "rate"]
    assert reasons([1.0], min_iterations=2) == ["rate"]
    assert reasons([0.1, 0.2, 0.6, 0.605, 0.609])[-1] == "standstill"
    assert reasons([0.1, 0.2, 0.6, 0.605, 0.62])[-1] is None
    assert reasons([0.1, 0.2, 0.4, 0.4, 0.4])[-1] is None
    before, after = torch.zeros(4, 2), torch.tensor([[0.0, 0.1], [0.2, 0.2], [0.0, 0.0], [1.0, 0.0]])
    assert convergence_rate(before, after, 0.03) == 0.5


def test_row_33_the_rank_that_stops_is_the_final_one() -> None:
    x = stream()
    config = Phase1Config(stop="rank", rank_every=2, min_iterations=2, batch_size=100, rank_rows=300)
    one = block()
    result = train_contexts(one, x, config, validation=x)
    ranks = [row["validation_rank"] for row in result.history if "validation_rank" in row]
    assert result.stopped == "rank" and ranks[-1] <= ranks[-2]
    assert ranks[-1] == validation_rank(one, x, 300)
    assert ranks[-1] == effective_rank(exact_contexts(one, x[:300]), rows=300).share
    with pytest.raises(ValueError, match="validation must be given for stop 'rank', got None"):
        train_contexts(one, x, config)


def test_row_34_batches_do_not_matter_but_to_the_loss() -> None:
    """The loss of CVFP is a mean over positions: as many batches as one likes."""
    config = replace(QUIET, dist_reg_weight=0.0)
    few, many = (train_contexts(block(), stream(), replace(config, batch_size=n)) for n in (400, 50))
    close(few.contexts, many.contexts)
    assert few.rate == many.rate


def test_row_36_exact_contexts_are_those_of_the_loop() -> None:
    one, x = block(torch.float32), stream(2000, torch.float32)
    found, context = exact_contexts(one, x), torch.zeros(1, 8)
    with torch.no_grad():
        start = time.perf_counter()
        rows = [context := one.step(context, token[None])[-1] for token in x]
        slow = time.perf_counter() - start
    assert (found - torch.cat(rows)).abs().max() <= 1e-5
    if native():
        took = []
        for _ in range(3):
            start = time.perf_counter()
            exact_contexts(one, x)
            took.append(time.perf_counter() - start)
        assert slow > 10 * min(took)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    x = stream()
    x[150, 0] = torch.inf
    with pytest.raises(RuntimeError, match="the loss of sweep 2, batch 1 is nan"):
        train_contexts(block(), x, QUIET)


@pytest.mark.parametrize("name", ["rank_every", "rank_patience", "improvement_patience"])
def test_sweeps_cannot_be_counted_in_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=f"phase1.{name} must be at least 1, got 0"):
        Phase1Config(**{name: 0})


@pytest.mark.parametrize("name", ["epochs", "patience", "batch_size"])
def test_phase_two_of_no_epoch_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"phase2.{name} must be at least 1, got 0"):
        Phase2Config(**{name: 0})


def test_configurations_from_another_s_fields() -> None:
    made = Phase2Config.from_base(Phase1Config(seed=7, learning_rate=0.5), {"epochs": 3})
    assert (made.seed, made.learning_rate, made.epochs, made.patience) == (7, 0.5, 3, 3)
    with pytest.raises(ValueError, match="overrides must be fields of Phase1Config, got epochs"):
        Phase1Config.from_base(made, {"epochs": 3})


def test_row_46_effective_rank() -> None:
    assert effective_rank(torch.eye(16)).value == pytest.approx(16)
    x = torch.randn(300, 8)
    found = effective_rank(x, rows=100)
    assert found == effective_rank(x, rows=100) and (found.rows, found.width) == (100, 8)
    assert found != effective_rank(x, rows=100, seed=1)
    flat = effective_rank(torch.ones(50, 4))
    assert flat.rank == 1 and flat.value == pytest.approx(1)
    with pytest.raises(ValueError, match=r"contexts must be of shape \[N, C\], got \[3\]"):
        effective_rank(torch.ones(3))
