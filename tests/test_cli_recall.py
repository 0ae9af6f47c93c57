"""``newllm eval MODEL --suite``: rows, controls, resuming and refusals, on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from newllm.cli import main
from newllm.cli.eval_recall import parse_lengths
from newllm.data.tokenizer import byte_tokenizer
from newllm.models.files import save_model
from tests.evaluation_parts import byte_senri

WORDS = ["eval", "tiny", "--suite", "passkey,qa1", "--lengths", "600,1k", "--depths", "[0,1]"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_model(byte_senri(), byte_tokenizer(), tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs" / "recall.jsonl").read_text().splitlines()]


def test_eval_suite_writes_rows_and_goes_on_where_it_stopped(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    controls = ["--control", "[zeroed,window,oracle,blind]"]
    assert main([*WORDS, "--samples", "2", *controls]) == 0
    rows = rows_of(folder)
    # Five readers of three suites at two lengths and two depths.
    assert len(rows) == 5 * 3 * 2 * 2
    needed = {"suite", "model", "length", "depth", "samples", "score", "ci95", "seed", "commit"}
    assert all(needed <= row.keys() for row in rows)
    assert {row["score"] for row in rows if row["model"] == "oracle"} == {1.0}
    assert {row["memory"] for row in rows if row["model"] == "tiny"} == {"on", "zeroed", "window"}
    pictures = {path.name for path in (folder / "runs" / "eval-recall").iterdir()}
    assert pictures == {"passkey.png", "passkey_border.png", "qa1.png"}
    assert "passkey_border" in capsys.readouterr().out
    kept = [row for row in rows if row["length"] == 600]
    (folder / "runs" / "recall.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in kept))
    assert main([*WORDS, "--samples", "2", *controls]) == 0
    again = rows_of(folder)
    assert again[: len(kept)] == kept
    assert {json.dumps(row, sort_keys=True) for row in again} == {
        json.dumps(row, sort_keys=True) for row in rows
    }


def test_other_conditions_are_other_cells(folder: Path) -> None:
    """Rows of another text, key or precision are no answer to the question."""
    words = ["eval", "tiny", "--suite", "passkey", "--lengths", "300", "--depths", "[0.5]", "--samples", "1"]
    (folder / "notes.txt").write_text("Some line of a text.\n" * 100)
    changes: list[list[str]] = [[], ["--text", "sentences"], ["--key-length", "3"], ["--autocast"]]
    changes += [["--text", "notes.txt"]]
    for number, change in enumerate(changes, 1):
        for _ in range(2):
            assert main([*words, "--control", "[oracle]", *change]) == 0
            assert len(rows_of(folder)) == number * 4
    (folder / "notes.txt").write_text("Another line of a text.\n" * 100)
    assert main([*words, "--control", "[oracle]", *changes[-1]]) == 0
    assert len(rows_of(folder)) == (len(changes) + 1) * 4


def test_lengths_are_read() -> None:
    assert parse_lengths("4k:32k") == [4096, 8192, 16384, 32768]
    assert parse_lengths("100,1k,1M") == [100, 1024, 2**20]
    for wrong in ("8k:4k", "4x", "", "0"):
        with pytest.raises(ValueError, match="lengths must"):
            parse_lengths(wrong)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tiny", "--suite", "rular"], "got 'rular'"),
        (["tiny", "--suite", "passkey", "--lengths", "4q"], "lengths must be numbers such as"),
        (["tiny", "--lengths", "4k"], "'tiny' is no command of 'newllm eval'"),
        (["none", "--suite", "passkey"], "none"),
    ],
)
def test_refusals_are_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["eval", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_eval_memory_reports_every_head(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "memory", "tiny", "--max-tokens", "300", "--chunk", "100"]) == 0
    report = json.loads((folder / "runs" / "memory.json").read_text())
    assert (report["tokens"], len(report["heads"]), len(report["layers"])) == (300, 8, 2)
    assert sum(report["gate_histogram"]) == 8
    assert "share of output" in capsys.readouterr().out
