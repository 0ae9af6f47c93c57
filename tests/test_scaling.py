"""Scaling laws on laws that are known, n-grams by counting, experiments and their command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from newllm.cli import main
from newllm.evaluation.ngram import NGram
from newllm.evaluation.scaling import alpha_windows, power_law, sample_sizes, saturation, t_test, trend
from newllm.testing import assert_rounding
from newllm.training.config import SourceConfig
from newllm.training.experiments import (
    ARCHITECTURES,
    Architecture,
    DataConfig,
    ExperimentRunner,
    calculate_params,
    matrix,
    scaled,
)
from newllm.training.phase_config import Phase1Config, Phase2Config

TOKENS = [1e4, 2e4, 4e4, 8e4, 16e4]


def close(actual: float, expected: float) -> None:
    assert_rounding(
        torch.tensor(actual, dtype=torch.float64),
        torch.tensor(expected, dtype=torch.float64),
        additions=4096,
        magnitude=4096,
    )


def test_row_52_a_law_is_found_exactly() -> None:
    fit = power_law([(n, 5000.0 * n**-0.4) for n in TOKENS])
    assert fit is not None and fit.points == 5
    close(fit.alpha, -0.4)
    close(fit.A, 5000.0)
    close(fit.r_squared, 1.0)
    # Only rounding is left of the error, and of the chance that there is no law.
    assert fit.p_value < fit.std_err < 1e-12


def test_row_52_floors_are_found() -> None:
    fit = saturation([(n, 90.0 + 3e4 * n**-0.5) for n in TOKENS])
    assert fit is not None
    assert (round(fit.floor, 3), round(fit.a, 3), round(fit.A / 1e4, 3)) == (90.0, 0.5, 3.0)
    assert saturation([(n, 1 / n) for n in TOKENS[:3]]) is None


def test_row_52_too_few_points_are_no_law() -> None:
    points = [(n, 1e3 * n**-0.3) for n in TOKENS]
    assert power_law(points[:2]) is None and power_law([]) is None
    assert power_law([*points[:2], (4e4, math.inf), (8e4, math.nan)]) is None
    assert power_law([(1e4, 10.0)] * 4) is None


@pytest.mark.parametrize(
    ("value", "degrees", "expected"),
    [(12.706204736, 1, 0.05), (4.302652730, 2, 0.05), (3.182446305, 3, 0.05), (2.228138852, 10, 0.05)],
)
def test_row_52_probabilities_are_student_s(value: float, degrees: int, expected: float) -> None:
    assert round(t_test(value, 1.0, degrees), 8) == expected
    assert t_test(-value, 1.0, degrees) == t_test(value, 1.0, degrees)
    assert t_test(0.0, 1.0, degrees) == 1.0


def rows(count: int = 5, alpha: float = -0.5) -> list[dict[str, Any]]:
    return [
        {"num_samples": 50 * 2**k, "train_tokens": 6e4 * 2**k, "val_ppl": 4e4 * (6e4 * 2**k) ** alpha}
        for k in range(count)
    ]


WINDOW = {
    "window_index", "sample_range", "token_range", "samples_in_window", "alpha", "A", "r_squared", "p_value",
    "std_err",
}  # fmt: skip


def test_row_53_five_points_make_two_windows() -> None:
    assert sample_sizes(50, 2, 4, 2) == [50, 100, 200, 400, 800]
    found = alpha_windows(rows(), 4)
    assert [window["sample_range"] for window in found] == [[50, 400], [100, 800]]
    assert found[1]["samples_in_window"] == [100, 200, 400, 800]
    assert all(set(window) >= WINDOW for window in found)
    for window in found:
        close(window["alpha"], -0.5)
    assert trend(found)["trend"] == "STABLE"
    with pytest.raises(ValueError, match="window_size must be at least 3 and num_windows at least 1, got 2"):
        sample_sizes(50, 2, 2, 2)
    with pytest.raises(ValueError, match=r"must make sizes that grow from 1, got \[3, 3, 3, 3\]"):
        sample_sizes(3, 1.1, 3, 2)


@pytest.mark.parametrize(
    ("alphas", "said"),
    [
        ([-0.5, -0.52], "IMPROVING"),
        ([-0.5, -0.48], "DEGRADING"),
        ([-0.5, -0.505], "STABLE"),
        ([-0.5], "UNKNOWN"),
    ],
)
def test_row_53_trends(alphas: list[float], said: str) -> None:
    found = trend([{"alpha": alpha} for alpha in alphas])
    assert found["trend"] == said
    if len(alphas) == 2:
        close(found["percent"], 100 * (alphas[1] - alphas[0]) / 0.5)


def test_row_56_a_window_with_missing_points_says_so() -> None:
    broken = rows(4)
    broken[0]["val_ppl"] = None
    (window,) = alpha_windows(broken, 4)
    assert window["alpha"] is None and window["missing"] == [50]
    assert window["note"] == "no fit: 3 of the window's 4 points"
    (window,) = alpha_windows(rows(2), 4)
    assert window["alpha"] is None and window["note"] == "no fit: 2 of the window's 4 points"
    assert trend([window]) == {"trend": "UNKNOWN", "change": None, "percent": None, "fits": 0}


def brute(train: list[int], held: list[int], order: int, vocabulary: int) -> float:
    def probability(context: list[int] | None, token: int) -> float:
        if context is None:
            return 1 / vocabulary
        k = len(context)
        after = [train[i] for i in range(k, len(train)) if train[i - k : i] == context]
        lower = probability(context[1:] if k else None, token)
        kinds = len(set(after))
        return (after.count(token) + kinds * lower) / (len(after) + kinds) if after else lower

    starts = [max(0, i - order + 1) for i in range(len(held))]
    losses = [-math.log(probability(held[starts[i] : i], held[i])) for i in range(1, len(held))]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("order", [1, 2, 3, 6])
def test_n_grams_by_counting(order: int) -> None:
    generator = torch.Generator().manual_seed(0)
    train, held = (torch.randint(0, 5, (size,), generator=generator) for size in (60, 30))
    found = NGram(train, order, 5).evaluate(held)
    close(found["loss"], brute(train.tolist(), held.tolist(), order, 5))
    assert found["perplexity"] == math.exp(found["loss"]) and 0 <= found["accuracy"] <= 1


def test_n_grams_remember_what_they_saw() -> None:
    ids = torch.arange(40) % 7
    assert NGram(ids, 2, 7).evaluate(ids)["accuracy"] == 1.0
    with pytest.raises(ValueError, match="order must be at least 1, got 0"):
        NGram(ids, 0, 7)
    with pytest.raises(ValueError, match="ids must lie between 0 and 5, got 6"):
        NGram(ids, 2, 6)
    with pytest.raises(ValueError, match="ids must hold at least 2 tokens, got 1"):
        NGram(ids[:1], 2, 7)


def test_row_55_the_documents_architectures() -> None:
    assert list(ARCHITECTURES) == ["baseline", "two_tokens", "wide", "deep", "shallow_wide"]
    assert ARCHITECTURES["shallow_wide"].name == "3L_1536d_2tok"
    assert ARCHITECTURES["baseline"] == Architecture(6, 768, 1, 768)
    assert scaled(ARCHITECTURES["wide"], 96) == Architecture(6, 144, 1, 96)
    sizes = calculate_params(ARCHITECTURES["baseline"], 50257)
    assert sizes["total"] == 52_782_336 and sizes["context_block"] == 7_091_712
    assert sum(sizes.values()) - sizes["total"] < sizes["total"]


def test_row_54_a_matrix_is_every_combination() -> None:
    made = matrix([1, 3], [8], [1, 2], 16)
    assert [one.name for one in made] == ["1L_8d_1tok", "1L_8d_2tok", "3L_8d_1tok", "3L_8d_2tok"]
    assert {one.embed_dim for one in made} == {16}


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExperimentRunner:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return ExperimentRunner(
        DataConfig(tokenizer="bytes", validation_tokens=300, data=sentences(tmp_path)),
        Phase1Config(max_iterations=3, batch_size=500),
        Phase2Config(epochs=2, batch_size=256),
        control=True,
    )


def sentences(folder: Path) -> str:
    """A folder of small documents, some of which are kept for validation."""
    texts = folder / "texts"
    texts.mkdir()
    for place in range(24):
        (texts / f"{place:02}.txt").write_text(
            f"Document {place} says {place * place}. " * 6, encoding="utf-8"
        )
    return str(texts)


SMALL = Architecture(1, 8, 1, 8)


def test_row_54_a_run_has_the_documents_fields(runner: ExperimentRunner) -> None:
    found = runner.run(SMALL, 4)
    assert {
        "num_samples", "num_layers", "context_dim", "num_input_tokens", "train_tokens", "val_tokens",
        "phase1_iterations", "train_effective_rank", "val_effective_rank", "best_epoch", "train_ppl",
        "val_ppl", "val_acc", "history",
    } <= set(found)  # fmt: skip
    assert (found["num_samples"], found["val_tokens"], found["phase1_iterations"]) == (4, 248, 3)
    assert 0 < found["val_effective_rank"] <= 1 and len(found["history"]) == 2
    assert found["untrained_val_ppl"] != found["val_ppl"]
    again = runner.run(SMALL, 4)
    timed = {"phase1_seconds", "phase2_seconds"}
    assert {k: v for k, v in again.items() if k not in timed} == {
        k: v for k, v in found.items() if k not in timed
    }
    more = runner.run(SMALL, 8)
    assert more["train_tokens"] > found["train_tokens"]
    with pytest.raises(ValueError, match="samples must be between 1 and the"):
        runner.run(SMALL, 1000)


def test_row_54_overrides_reach_phase_one(runner: ExperimentRunner) -> None:
    first, second = (runner.run(SMALL, 4, phase1={"diversity": name}) for name in ("oacd", "odcm"))
    assert first["val_ppl"] != second["val_ppl"]
    assert runner.run(SMALL, 4, seed=7)["val_ppl"] != first["val_ppl"]


def test_row_54_configurations_come_from_a_base() -> None:
    made = DataConfig.from_base(DataConfig(tokenizer="bytes"), {"validation_tokens": 7})
    assert (made.tokenizer, made.validation_tokens) == ("bytes", 7)
    with pytest.raises(ValueError, match="overrides must be fields of DataConfig, got epochs"):
        DataConfig.from_base(made, {"epochs": 3})


def test_validation_may_not_be_split_off_the_training_text() -> None:
    data = DataConfig(data="sentences", source=SourceConfig(validation="auto_split"))
    with pytest.raises(ValueError, match="validation must not be 'auto_split'"):
        ExperimentRunner(data, Phase1Config(), Phase2Config())


COMMON = [
    *("--tokenizer", "bytes", "--validation-tokens", "300", "--embed-dim", "8"),
    *("--phase1.max-iterations", "3", "--phase2.epochs", "1"),
]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["alpha", "--context-dim", "6", "--init-samples", "2", "--window-size", "3"], ["1L_6d_1tok"]),
        (
            ["architectures", "--names", "[baseline, shallow_wide]", "--samples", "[2, 4, 8]"],
            ["baseline", "shallow_wide"],
        ),
        (
            ["architectures", "--layers", "[1]", "--context-dims", "[6]", "--samples", "[2, 4, 8]"],
            ["1L_6d_1tok", "1L_6d_2tok"],
        ),
        (
            ["diversity", "--context-dim", "6", "--samples", "[2, 4, 900]", "--seeds", "[1, 2]"],
            ["oacd", "mcdl", "odcm"],
        ),
    ],
    ids=["alpha", "architectures", "matrix", "diversity"],
)
def test_row_55_and_its_neighbours_from_the_command_line(
    words: list[str],
    names: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "out"
    data = ["--data", sentences(tmp_path), "--output-dir", str(out)]
    assert main(["scaling", *words, *COMMON, *data]) == 0
    found = json.loads((out / "alpha_progression.json").read_text())
    assert [one["config_name"] for one in found] == names
    for one in found:
        assert set(one) == {
            "config_name", "num_input_tokens", "num_layers", "context_dim", "window_size", "windows",
        }  # fmt: skip
        assert len(one["windows"]) == (2 if words[0] == "alpha" else 1)
    summary = json.loads((out / "summary.json").read_text())
    metadata = json.loads((out / "metadata.json").read_text())
    assert set(metadata["parameters"]) == set(names)
    for name in names:
        assert json.loads((out / name / "results.json").read_text())[0]["config_name"]
    assert (out / f"{words[0]}.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    if words[0] == "diversity":
        # Nine hundred documents are not there: it is told, and nothing is fitted to the other two points.
        assert all(one["windows"][0]["alpha"] is None for one in found)
        assert summary["oacd"]["missing_samples"] == [900] and summary["oacd"]["power_law"] is None
        assert len(summary["oacd"]["failed"]) == 2 and "failed: samples must be between" in said
        assert "no fit: 2 of the window's 3 points" in said and set(metadata["loss_ms"]) == set(names)
        assert summary["oacd"]["means"][0]["seeds"] == 2
    else:
        assert all(window["alpha"] is not None for one in found for window in one["windows"])


def test_wrong_names_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", "architectures", "--names", "[tall]", "--output-dir", str(tmp_path)]) == 2
    assert "names must be of baseline, two_tokens" in capsys.readouterr().err
    assert main(["scaling", "diversity", "--losses", "[vicreg]", "--output-dir", str(tmp_path)]) == 2
    assert "diversity must be one of oacd" in capsys.readouterr().err


def test_logarithmic_axes_have_plain_labels_between_powers() -> None:
    from newllm.evaluation.context_plots import lines_figure

    figure = lines_figure({"a": [(4e3, 150.0), (6e4, 900.0)]}, x="tokens", y="perplexity", log="xy")
    figure.canvas.draw()
    (axes,) = figure.axes
    sides = (axes.get_xticklabels, axes.get_yticklabels)
    shown = [label.get_text() for side in sides for label in side(which="both")]
    assert {"10,000", "20,000", "200", "400"} <= set(shown)
