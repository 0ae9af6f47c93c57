"""Repetition training: phrases, cycles, guards, and where repeated contexts go."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from newllm.data.tokenizer import byte_tokenizer
from newllm.evaluation.attractor import fixed_points, global_attractor
from newllm.testing import assert_rounding
from newllm.training.cvfpt import (
    Convergence,
    cycle_loss,
    measure,
    repeated,
    stage_phrases,
    stage_texts,
    train_phrases,
    train_repetition,
)
from newllm.training.cvfpt_checks import (
    RANDOM,
    SuiteRow,
    small_model,
    suite_patterns,
    top_k,
    updater_pair,
    validation_suite,
    verdict,
)
from newllm.training.phase_config import CvfptConfig

QUICK = CvfptConfig(repetitions=10, epochs_per_stage=10)


def model(cell: str = "gated", **sizes: Any) -> Any:
    return small_model(300, cell=cell, context_dim=32, embed_dim=32, hidden_dim=48, **sizes)


def test_row_13_stage_one_converges_and_the_model_goes_on() -> None:
    stages = [[[5], [6], [7]], [[5, 6], [7, 8]]]
    seen: list[dict[str, Any]] = []
    found = train_repetition(model(), stages, QUICK, log=seen.append)
    assert [len(stage) for stage in found] == [3, 2]
    assert all(one.converged and one.loss < 0.01 for one in found[0])
    assert [(row["stage"], row["epoch"]) for row in seen] == [(s, e) for s in (1, 2) for e in range(1, 11)]


def test_row_13_stages_are_those_of_the_documents() -> None:
    assert [len(stage_texts(stage)) for stage in (1, 2, 3, 4, 30)] == [10] * 5
    assert all(len(text.split()) == stage for stage in (1, 2, 3, 4, 30) for text in stage_texts(stage))
    assert len(set(stage_texts(3))) == 10
    with pytest.raises(ValueError, match="stage must be at least 1, got 0"):
        stage_texts(0)


def test_row_14_cycles_count_ids_not_words() -> None:
    phrases = stage_phrases(byte_tokenizer(), 2)
    assert len(phrases[0][0]) == len(" red") and len(phrases[1][0]) == len(" red cat")
    ids = repeated(phrases[1][0], 10, 60)
    assert len(ids) == 60 and torch.equal(ids[8:], ids[:-8])
    contexts = torch.arange(6.0).double()[:, None]
    assert cycle_loss(contexts, 2).item() == 4.0
    with pytest.raises(ValueError, match="cycle must be between 1 and 5, got 6"):
        cycle_loss(contexts, 6)
    with pytest.raises(ValueError, match="phrase must hold between 1 and 30 ids to repeat in 60, got 31"):
        repeated([1] * 31, 10, 60)


def test_row_15_no_training_without_the_next_token() -> None:
    with pytest.raises(ValueError, match="token_weight must be above 0, got 0"):
        CvfptConfig(token_weight=0.0)
    assert CvfptConfig().token_weight == 0.01


def test_row_15_the_random_sequence_moves_every_trained_context() -> None:
    found = validation_suite(300, epochs=2, repetitions=10, seeds=1)
    assert list(found) == ["single token", "2-gram", "3-gram", RANDOM]
    assert found[RANDOM].still.loss > 0.01


def test_row_16_only_the_gated_updater_stands_still_on_three_tokens() -> None:
    gated, simple = (validation_suite(1000, cell=cell) for cell in ("gated", "simple"))
    assert verdict(gated) and not verdict(simple)
    assert gated["3-gram"].still.converged and not simple["3-gram"].still.converged
    assert simple["single token"].still.converged and simple["3-gram"].cycle.converged
    for row in (*gated.values(), *simple.values()):
        assert len(row.losses) == 5 and list(row.losses) == sorted(row.losses)
        assert row.still.loss == row.losses[2]


def test_row_19_the_simple_updater_loses_the_tokens() -> None:
    means = {cell: global_attractor(*map_ids(updater_pair(cell))) for cell in ("simple", "gated")}
    assert means["simple"].mean < 0.01 and means["simple"].dead == 256
    assert means["simple"].verdict == "attractor"
    assert means["gated"].mean > 1 and means["gated"].verdict == "apart"


def map_ids(pair: tuple[Any, torch.Tensor]) -> tuple[Any, list[int]]:
    return pair[0], pair[1].tolist()


def test_gradients_that_overflow_are_an_error() -> None:
    """A norm of infinity would clip them to zero, and training would go on without moving anything."""
    wild = small_model(1000, cell="simple", initializer_range=0.2)
    optimizer = torch.optim.Adam(wild.parameters(), 1e-3)
    with pytest.raises(RuntimeError, match=r"the norm of the gradients of epoch 1 is (inf|nan)"):
        train_phrases(wild, [[1, 2, 3]], CvfptConfig(repetitions=60), optimizer, 1)


def test_verdict_wants_repetition_to_stand_still_and_noise_not_to() -> None:
    patterns = suite_patterns(300, 10)
    assert {name: len(ids) for name, ids in patterns.items()} == {
        "single token": 1,
        "2-gram": 2,
        "3-gram": 3,
        RANDOM: 30,
    }

    def row(loss: float) -> SuiteRow:
        one = Convergence(loss, 0, 0)
        return SuiteRow(one, one, (loss,))

    good = {name: row(0.05 if name == RANDOM else 0.005) for name in patterns}
    assert verdict(good)
    assert not verdict({**good, "3-gram": row(0.011)})
    assert not verdict({**good, RANDOM: row(0.003)})
    with pytest.raises(ValueError, match="vocabulary must be at least 6, got 5"):
        suite_patterns(5, 10)


@pytest.mark.parametrize("fair", [True, False])
def test_row_17_top_k(fair: bool) -> None:
    made = []

    def make() -> Any:
        made.append(model())
        return made[-1]

    found = json.loads(json.dumps(top_k(make, [0, 1, 2], QUICK, epochs=3, fair=fair)))
    assert found["mode"] == ("fair" if fair else "biased") and len(made) == (1 if fair else 3)
    assert [row["token"] for row in found["tokens"]] == [0, 1, 2]
    for row in found["tokens"]:
        assert len(row["losses"]) == 4 and row["final_loss"] == row["losses"][-1] < row["initial_loss"]
        assert row["converged"] == (row["final_loss"] < 0.01)
    assert found["converged"] == sum(row["converged"] for row in found["tokens"])


def test_row_18_magnitude_and_direction_make_the_distance() -> None:
    rows = fixed_points(model().double(), list(range(20)))
    for row in rows:
        parts = torch.tensor(row["magnitude"] ** 2 + row["direction"] ** 2, dtype=torch.float64)
        whole = torch.tensor(row["l2"] ** 2, dtype=torch.float64)
        assert_rounding(parts, whole, additions=64, magnitude=64)
    # The distance to the last state would call the last reading but one converged, whatever happens.
    assert all(row["steps"] is None or row["steps"] < 49 for row in rows)
    assert all(row["last_change"] < row["l2"] for row in rows)


class Pointed:
    """Contexts whose first ``live`` of 8 numbers are the token's own, ``spread`` apart."""

    device = torch.device("cpu")

    def __init__(self, spread: float, live: int = 8) -> None:
        self.spread, self.model = spread * (torch.arange(8) < live), self

    def eval(self) -> None:
        """Nothing to switch."""

    def __call__(self, ids: torch.Tensor, use_cache: bool) -> Any:
        table = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
        return type("Output", (), {"contexts": 1 + self.spread * table[ids]})


def test_attractor_verdicts() -> None:
    cases = ((1e-4, 8, "attractor"), (0.02, 8, "attractor"), (1.0, 3, "suspicious"), (1.0, 4, "apart"))
    for spread, live, said in cases:
        assert global_attractor(Pointed(spread, live), list(range(50))).verdict == said
    found = global_attractor(Pointed(1.0), list(range(50)))
    assert found.least < found.mean < found.most and (found.dead, found.width) == (0, 8)
    with pytest.raises(ValueError, match="tokens must be at least 2, got 1"):
        global_attractor(Pointed(1.0), [3])


def test_measurement_is_of_contexts_a_cycle_apart() -> None:
    one, ids = model(), torch.tensor([4, 5] * 6)
    with torch.no_grad():
        contexts = one.eval().model(ids[None], use_cache=False).contexts[0]
    found = measure(one, ids, 2)
    assert found.loss == cycle_loss(contexts, 2).item()
    assert found.change == contexts.diff(dim=0).norm(dim=-1).mean().item()
