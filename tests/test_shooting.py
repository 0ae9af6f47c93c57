"""Multiple shooting, over a recurrence in plain PyTorch whose contraction is known."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from newllm.ops import native, shooting
from newllm.ops.native import Runs

CUDA = torch.device("cuda", 0)
TOKENS, PARTS, RHO, TOL = 1203, 3, 0.9, 1e-6
# Too few tokens to forget to within TOL, as an estimate of rho that is too low would have it.
WARM_UP = 32

directions = pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])


class Recurrence:
    """c <- rho c + drive over ``TOKENS`` tokens, or backwards in time; keeps what it was asked for."""

    def __init__(self, rho: float, backwards: bool) -> None:
        self.rho, self.backwards = rho, backwards
        random = torch.Generator().manual_seed(0)
        # Backwards what is tolerated is a share of the largest: here far from 1.
        scale = 1e6 if backwards else 1
        self.drive = scale * torch.randn(2, TOKENS, 4, generator=random, dtype=torch.float64)
        self.outputs = torch.full_like(self.drive, torch.nan)
        self.swept: list[Runs] = []

    def __call__(self, runs: Runs, entering: Tensor) -> Tensor:
        self.swept.append(runs)
        leaving = entering.clone()
        for part in range(runs.parts):
            first = runs.first + part * runs.stride
            tokens = range(first, first + runs.tokens)
            for token in reversed(tokens) if self.backwards else tokens:
                leaving[:, part] = self.rho * leaving[:, part] + self.drive[:, token]
                self.outputs[:, token] = leaving[:, part]
        return leaving

    def entering(self) -> Tensor:
        return self.drive.new_full((2, 4), 5.0)

    def exact(self) -> Tensor:
        once = Recurrence(self.rho, self.backwards)
        once(Runs(1, TOKENS), once.entering()[:, None])
        return once.outputs


def shoot(sweep: Recurrence, sweeps: int | None = None) -> tuple[Tensor, shooting.Outcome]:
    cut = TOKENS, PARTS, WARM_UP
    return shooting.block(sweep, sweep.entering(), *cut, tol=TOL, sweeps=sweeps, backwards=sweep.backwards)


@directions
def test_what_entered_wrong_is_put_right_without_sweeping_all_again(backwards: bool) -> None:
    sweep = Recurrence(RHO, backwards)
    leaving, outcome = shoot(sweep)
    exact = sweep.exact()
    assert outcome.block and outcome.sweeps == 3
    # Backwards tol is a share of the largest, here about that of the start.
    allowed = TOL * (exact.abs().max().item() if backwards else 1.0)
    assert 0 < outcome.residual <= allowed
    assert (sweep.outputs - exact).abs().max() <= allowed / (1 - RHO)
    assert torch.equal(leaving, sweep.outputs[:, 0 if backwards else -1])
    # 0.9^(32 + 64) is not enough and 0.9^(32 + 64 + 128) is.
    tokens = [runs.tokens for runs in sweep.swept if runs.parts > 1]
    assert tokens == [WARM_UP, 64, 128, 209, 64, 128]


@directions
def test_segments_make_up_the_runs(backwards: bool) -> None:
    """In the order of sweeping, without gaps, for lengths around their ends."""
    for length in (1, 63, 64, 65, 191, 192, 193, 1000):
        found = shooting._segments(Runs(2, length, 0, length), 64, backwards)
        order = found[::-1] if backwards else found
        assert [token for runs in order for token in range(runs.first, runs.first + runs.tokens)] == [
            *range(length)
        ]
        assert all((runs.parts, runs.stride) == (2, length) for runs in found)


@directions
def test_nan_is_never_agreement(backwards: bool) -> None:
    sweep = Recurrence(RHO, backwards)
    sweep.drive[0, 700] = torch.nan
    _, outcome = shoot(sweep)
    assert not outcome.block
    assert sweep.outputs[1].isfinite().all() and sweep.outputs[0, 700].isnan().all()


@directions
def test_what_does_not_fade_ends_in_one_run(backwards: bool) -> None:
    sweep = Recurrence(1.0, backwards)
    leaving, outcome = shoot(sweep, sweeps=3)
    assert not outcome.block and outcome.residual == 0
    assert torch.equal(sweep.outputs, sweep.exact())
    assert torch.equal(leaving, sweep.outputs[:, 0 if backwards else -1])


@directions
def test_runs_side_by_side_share_no_token(backwards: bool) -> None:
    """Each writes what another may read again."""
    sweep = Recurrence(RHO, backwards)
    shoot(sweep)
    if not backwards:
        shooting.carry(sweep, sweep.entering(), TOKENS, "cpu", "block", TOL, None, True)
    assert any(runs.parts > 1 for runs in sweep.swept)
    assert all(runs.parts == 1 or runs.stride >= runs.tokens for runs in sweep.swept)


def estimates(batch: int, tokens: int, kernel: str) -> bool:
    """Whether auto looks how differences grow along the first tokens."""

    def sweep(runs: Runs, entering: Tensor) -> Tensor:
        asked.append(runs)
        return entering

    asked: list[Runs] = []
    shooting.carry(sweep, torch.zeros(batch, 4), tokens, kernel, "auto", 1e-5, None, True)
    return asked[0].tokens < tokens


def test_auto_estimates_nothing_where_that_would_cost_much(monkeypatch: pytest.MonkeyPatch) -> None:
    assert estimates(1, 4096, "cpu")
    monkeypatch.setitem(shooting.LEAST_TOKENS, "cpu", 8192)
    assert not estimates(1, 4096, "cpu") and estimates(1, 8192, "cpu")


def test_auto_counts_what_rows_cost_the_kernel() -> None:
    """Eight rows instead of four take a cluster 1.16 times as long, and a core 1.8 times."""
    assert estimates(4, 4096, "cluster")
    assert not estimates(4, 4096, "cpu")


def test_a_gpu_gets_as_many_parts_as_its_clusters_take() -> None:
    assert shooting.parts_of(1, 32768, CUDA, "cluster", 150, shooting.LEAST_GAIN) == 28
    assert shooting.parts_of(20, 32768, CUDA, "cluster", 150, shooting.LEAST_GAIN) == 1


def test_a_grid_is_cut_only_where_that_pays_for_its_slower_rows() -> None:
    """28 rows take it 11 steps of one: of 8192 tokens, 1000 of them warm-up, 8 chunks promise 1.13 times."""
    cut = partial(shooting.parts_of, 1, device=CUDA, least_gain=shooting.LEAST_GAIN)
    assert cut(8192, kernel="cluster", warm_up=1000) == 8
    assert cut(8192, kernel="grid", warm_up=1000) == 1
    assert cut(32768, kernel="grid", warm_up=32) == 28


def test_the_kernel_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def planned(*given: Any, **sizes: int) -> Any:
        asked.append((*given, sizes))
        return SimpleNamespace(kernel="grid")

    monkeypatch.setattr(native, "planned", planned)
    assert native.kernel_of("GatedForward", 3, torch.zeros(2, 4), width=4) == "cpu" and not asked
    weight: Any = SimpleNamespace(device=CUDA, dtype=torch.bfloat16)
    assert native.kernel_of("GatedForward", 3, weight, width=4) == "grid"
    assert asked == [("GatedForward", 3, 0, torch.bfloat16, {"width": 4})]


def test_a_warm_up_has_a_margin_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU sweeps all tokens again where an estimate of rho is a little too low."""

    def warm_up() -> int:
        sweep = Recurrence(RHO, False)
        _, outcome = shooting.carry(sweep, sweep.entering(), TOKENS, "cpu", "block", TOL, None, True)
        return outcome.warm_up

    least = warm_up()
    monkeypatch.setitem(shooting.MARGIN, "cpu", shooting.MARGIN["cuda"])
    assert warm_up() == math.ceil(shooting.MARGIN["cuda"] * least) > least
