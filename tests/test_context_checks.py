"""Critical checks of contexts, by constructed recurrences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from newllm.evaluation.context_checks import (
    Recurrence,
    context_identity,
    horizon,
    mapping_identity,
    pass_convergence,
    recurrences,
    trial_verdict,
    validation_trials,
)
from newllm.evaluation.context_report import convergence_report, fixed_point_report, phase_report
from newllm.models import BaselineConfig, BaselineForCausalLM
from newllm.testing import assert_rounding
from tests.test_phase_two import ids, slots, tiny


def linear(keep: float, width: int = 4) -> Recurrence:
    """c <- keep c + x."""

    def sweep(x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        context = torch.zeros_like(x[:, 0]) if state is None else state
        found = []
        for token in x.unbind(1):
            context = keep * context + token
            found.append(context)
        return torch.stack(found, 1), context

    return Recurrence("linear", width, width, lambda ids: ids, sweep, lambda c, x: keep * c + x)


def stream(length: int = 400, width: int = 4, seed: int = 3) -> Tensor:
    return torch.randn(length, width, generator=torch.Generator().manual_seed(seed))


def test_row_47_contexts_that_are_alike_or_copies() -> None:
    x = stream().double()
    healthy = context_identity(stream(seed=4), x)
    assert not healthy.dead and not healthy.copied and healthy.norm > 1
    assert context_identity(torch.full((400, 4), 3.0), x).dead
    assert context_identity(1e-3 * stream(), x).dead
    copied = context_identity(2 * x, x)
    assert copied.copied and copied.embed_similarity == pytest.approx(1.0)
    other = context_identity(stream(width=6), x)
    assert other.embed_similarity is None and not other.copied


def test_row_47_a_block_that_changes_nothing_is_flagged() -> None:
    model = tiny().float()
    (one,) = recurrences(model)
    with torch.no_grad():
        model.model.context_block.layers[0].linear.weight.mul_(20)
    assert not mapping_identity(one).identity
    with torch.no_grad():
        model.model.context_block.layers[0].linear.weight.zero_()
        model.model.context_block.layers[0].linear.bias.zero_()
    found = mapping_identity(one)
    assert found.identity and (found.above, found.pairs) == (100, 100)
    assert found.least > 0.99 and mapping_identity(one) == found


def test_row_48_a_contraction_forgets_its_start_at_its_own_rate() -> None:
    found = pass_convergence(linear(0.5), stream())
    assert found.verdict == "excellent" and len(found.differences) == 4
    ratios = [
        after / before for before, after in zip(found.two_starts[:8], found.two_starts[1:9], strict=True)
    ]
    for ratio in ratios:
        assert_rounding(torch.tensor(ratio), torch.tensor(0.25), additions=64, magnitude=16)
    # From a difference of order 1, ten halvings of a distance bring its square below 0.001.
    assert 4 <= found.horizon <= 9  # type: ignore[operator]
    assert found.profile[0] > 1e-3 > found.profile[20]


def test_row_48_what_never_forgets_fails() -> None:
    kept = pass_convergence(linear(1.0), stream())
    assert kept.verdict == "fail" and kept.horizon is None
    grown = pass_convergence(linear(1.01), stream())
    assert grown.verdict == "fail" and grown.differences[-1] > grown.differences[0]
    with pytest.raises(ValueError, match="passes must be at least 2, got 1"):
        pass_convergence(linear(0.5), stream(), passes=1)
    with pytest.raises(ValueError, match="x must have at least 8 positions, got 5"):
        pass_convergence(linear(0.5), stream(5))


def test_horizon_is_the_first_token_from_which_all_agree() -> None:
    assert horizon([1.0, 1e-2, 1e-4]) == 3
    assert horizon([1e-4, 1e-4]) == 1
    assert horizon([1e-4, 1.0, 1e-4]) == 3
    assert horizon([1.0, 1.0]) is None
    assert horizon([1.0, float("nan")]) is None


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ([0.5, 0.4, 0.3], "CONVERGING"),
        ([0.005, 0.005, 0.0051], "CONVERGED"),
        ([0.1, 0.2, 0.3], "DIVERGING"),
        ([0.2, 0.0, 0.0, 0.2], "UNSTABLE"),
        ([0.2], "INSUFFICIENT_DATA"),
        ([], "INSUFFICIENT_DATA"),
    ],
)
def test_row_49_verdicts_by_slope(losses: list[float], verdict: str) -> None:
    found = trial_verdict(losses)
    assert found.verdict == verdict and found.losses == losses


def test_row_49_trials_report_what_they_saw() -> None:
    found = trial_verdict([0.5, 0.4, 0.3, 0.1])
    assert (found.initial, found.final) == (0.5, 0.1)
    assert found.reduction == pytest.approx(80.0) and found.slope == pytest.approx(-0.13)
    trials = validation_trials(linear(0.5), stream(), trials=10)
    assert len(trials.losses) == 9 and trials.verdict == "CONVERGED"


@pytest.mark.parametrize(
    ("make", "names"), [(tiny, ["block 0"]), (slots, ["block 0", "block 1"])], ids=["lm", "kv"]
)
def test_recurrences_are_the_model_s(make: Any, names: list[str]) -> None:
    model = make()
    found = recurrences(model)
    assert [one.name for one in found] == names
    with torch.no_grad():
        contexts = torch.cat([one.sweep(one.inputs(ids())[None], None)[0] for one in found], -1)
        assert torch.equal(contexts, model.model(ids()[None]).contexts)
    assert contexts.shape[-1] == sum(one.width for one in found)


def test_recurrence_of_a_gated_model() -> None:
    model = tiny(cell="gated")
    (one,) = recurrences(model)
    with torch.no_grad():
        assert torch.equal(one.sweep(one.inputs(ids())[None], None)[0], model.model(ids()[None]).contexts)


def test_other_models_have_no_recurrence() -> None:
    sizes = {"vocab_size": 9, "embed_dim": 8, "num_attention_heads": 2, "intermediate_size": 8}
    model = BaselineForCausalLM(BaselineConfig(**sizes, num_hidden_layers=1))
    with pytest.raises(ValueError, match="model must be a context_lm or a context_kv, got 'newllm_baseline'"):
        recurrences(model)


def results() -> dict[str, Any]:
    rank = {"value": 64.0, "share": 0.5, "rank": 128, "rows": 10000, "width": 128}
    check = {
        "converged": 900,
        "positions": 1000,
        "cvfp_loss": 0.0125,
        "final_difference": 0.001,
        "horizon": 17,
    }
    scores = {"loss": 4.5, "perplexity": 90.017, "accuracy": 0.1234}
    figures = {
        "train_rank": [rank], "validation_rank": [{**rank, "rows": 2000}],
        "train_check": [check], "validation_check": [{**check, "converged": 0, "horizon": None}],
        "train": scores, "validation": scores, "best_epoch": 6, "epochs": 8,
    }  # fmt: skip
    phase = {
        "sweeps": 14, "most_sweeps": 60, "stopped": "rate", "seconds": 4.14,
        "converged": 55674, "positions": 60000,
    }  # fmt: skip
    return {
        "trained": {**figures, "phase_one": [phase]},
        "untrained_contexts": figures,
        "ngram": {"order": 18, "validation": scores},
    }


REPORT = """\
Phase 1
  block 0: iterations 14/60, stopped by rate, 4.1 s, converged in training 92.8 % (55,674/60,000)

  contexts   set         converged           effective rank                CVFP loss  final diff  horizon
  trained    train       90.0 % (900/1,000)  64.00/128 (50.0 %, n 10,000)  0.012500   0.001000    17
  trained    validation  0.0 % (0/1,000)     64.00/128 (50.0 %, n 2,000)   0.012500   0.001000    none
  untrained  train       90.0 % (900/1,000)  64.00/128 (50.0 %, n 10,000)  0.012500   0.001000    17
  untrained  validation  0.0 % (0/1,000)     64.00/128 (50.0 %, n 2,000)   0.012500   0.001000    none

Phase 2
  model               set         loss    perplexity  accuracy  best epoch
  trained contexts    train       4.5000  90.017      12.34 %   6/8
  trained contexts    validation  4.5000  90.017      12.34 %   6/8
  untrained contexts  train       4.5000  90.017      12.34 %   6/8
  untrained contexts  validation  4.5000  90.017      12.34 %   6/8
  18-gram             validation  4.5000  90.017      12.34 %   -
"""


def test_row_51_the_numeric_report() -> None:
    assert phase_report(results()) == REPORT


def test_reports_of_checks_are_numbers() -> None:
    found = pass_convergence(linear(0.5), stream())
    said = convergence_report("block 0", found)
    assert said.startswith("block 0: mean changes of passes 2 to 5: ") and "after" in said
    row = {
        "l2": 5.0, "cosine": 0.9, "angle": 25.8, "norm_once": 16.0, "norm_fixed": 19.0, "magnitude": 3.0,
        "direction": 4.0, "last_change": 0.01, "steps": 4,
    }  # fmt: skip
    report = fixed_point_report([row, {**row, "steps": None}], 50)
    assert "| direction's share of L2 squared | 64.00 % | | |" in report
    assert "after 4.0 readings on average (1 of 2 tokens)" in report
    assert "For none of 1 tokens" in fixed_point_report([{**row, "steps": None}], 50)
