"""The page of the context family's experiment is its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.context_family_report import QUESTIONS, write_report


def row(variant: str, seed: int, perplexity: float, **figures: Any) -> dict[str, Any]:
    return {
        "experiment": "documents", "variant": variant, "seed": seed, "tokens": 1000, "perplexity": perplexity,
        "accuracy": 0.25, "horizon": 14, "device": "a device", "data": "chat", "embed_dim": 8,
        "context_dim": 4, "epochs": 2, "torch": "2", "commit": "abc", "date": "today", **figures,
    }  # fmt: skip


def test_variants_have_the_mean_and_range_of_their_seeds(tmp_path: Path) -> None:
    rows = [
        row("trained", 1, 10.0, bit_equal=True),
        row("trained", 2, 20.0),
        row("untrained", 1, 12.0),
        row("untrained", 2, 16.0),
        row("16-gram", 1, 12.5, horizon=None),
        row("100", 1, 3.0, experiment="chunks"),
        row("16", 1, 4.0, experiment="chunks"),
    ]
    page = tmp_path / "page.md"
    write_report(rows, page, Path("rows.jsonl"))
    text = page.read_text()
    assert "| trained | 2 | 15.00 (10.00 to 20.00) | 25.00 % | - | 14 |" in text
    assert "| 16-gram | 1 | 12.50 | 25.00 % | - | - |" in text
    assert text.index("| 16 | 1 | 4.00 |") < text.index("| 100 | 1 | 3.00 |")
    assert "Two runs of one seed: equal weights, bit for bit." in text
    assert (
        "* trained beside untrained: perplexity +4.17 % (-16.67 % to +25.00 %), lower with 1 of 2 seeds"
        in text
    )
    assert "* trained beside 16-gram: perplexity +20.00 % (-20.00 % to +60.00 %)" in text
    assert text.count("Not measured yet.") == len(QUESTIONS) - 2


def test_a_page_without_rows_says_so(tmp_path: Path) -> None:
    write_report([], tmp_path / "page.md", Path("rows.jsonl"))
    assert (tmp_path / "page.md").read_text().count("Not measured yet.") == len(QUESTIONS)


def test_what_was_not_measured_is_not_compared(tmp_path: Path) -> None:
    write_report(
        [row("trained", 1, 10.0), row("untrained", 2, 12.0)], tmp_path / "page.md", Path("rows.jsonl")
    )
    assert "beside" not in (tmp_path / "page.md").read_text()
