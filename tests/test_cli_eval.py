"""``newllm eval`` on a tiny random model: files, rows, tables, and refusals in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from newllm.cli import main
from newllm.data.tokenizer import byte_ids, byte_tokenizer
from newllm.evaluation.control import remove_memories
from newllm.models.files import load_model, save_model
from newllm.testing import assert_rounding
from tests.evaluation_parts import BYTE_SIZES, PROSE, byte_senri, losses_of
from tests.tiny_models import ADDITIONS

ROW = {"suite", "model", "length", "depth", "samples", "score", "ci95", "seed", "commit"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a random byte model ``tiny`` (window 8) and a text, where runs are written."""
    save_model(byte_senri(), byte_tokenizer(), tmp_path / "tiny")
    (tmp_path / "prose.txt").write_text(PROSE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def json_of(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_eval_perplexity_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "perplexity", "tiny", "--text", "prose.txt", "--chunk", "100"]) == 0
    out = folder / "runs" / "eval-perplexity-tiny"
    assert {path.name for path in out.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "perplexity.png",
        "results.json",
    }
    results = json_of(out / "results.json")
    total = results["total"]
    assert results["window"] == 8
    assert set(total) >= ROW
    assert (total["suite"], total["length"], total["samples"]) == ("perplexity", len(PROSE), len(PROSE) - 1)
    assert sum(row["samples"] for row in results["bins"]) == total["samples"]
    assert [row["tokens"] for row in lines_of(out / "metrics.jsonl")][-1] == len(PROSE)
    config = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    assert (config["chunk"], config["text"]["characters"]) == (100, len(PROSE))
    printed = capsys.readouterr().out
    assert f"{total['score']:.2f}" in printed
    assert "after the first window (100 tokens)" in printed


def test_eval_perplexity_without_memory_differs(folder: Path) -> None:
    words = ["eval", "perplexity", "tiny", "--text", "prose.txt", "--max-tokens", "300"]
    totals = {}
    for memory in ("on", "off"):
        assert main([*words, "--memory", memory, "--out", memory]) == 0
        totals[memory] = json_of(folder / memory / "results.json")["total"]
        assert (totals[memory]["length"], totals[memory]["memory"]) == (300, memory == "on")
    model = load_model(folder / "tiny")
    remove_memories(model)
    expected = losses_of(model, byte_ids(PROSE[:300])).mean()
    assert_rounding(
        torch.tensor(totals["off"]["score"]).log(),
        expected,
        additions=BYTE_SIZES["vocab_size"],
        magnitude=ADDITIONS * float(expected),
    )
    assert totals["on"]["score"] != totals["off"]["score"]


def test_eval_passkey_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "passkey", "tiny", "--text", "prose.txt", "--samples", "4", "--multiples", "[4,6.5]"]
    assert main([*words, "--depths", "[0,1]", "--control", "--seed", "5", "--beyond-windows"]) == 0
    out = folder / "runs" / "eval-passkey-tiny"
    assert {path.name for path in out.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "recall.png",
        "results.json",
    }
    rows = lines_of(out / "metrics.jsonl")
    cells = [(length, depth) for length in (32, 52) for depth in (0.0, 1.0)]
    assert [(row["length"], row["depth"]) for row in rows] == 2 * cells
    assert [row["memory"] for row in rows] == 4 * [True] + 4 * [False]
    for row in rows:
        assert set(row) >= ROW
        assert (row["suite"], row["samples"], row["seed"], row["reach"]) == ("passkey", 4, 5, 24)
    results = json_of(out / "results.json")
    assert results["rows"] == rows
    assert results["recall"]["window_only"]["6.5"].keys() == {"0.0", "1.0"}
    assert "window only" in capsys.readouterr().out


def test_eval_passkey_takes_lengths_and_digits(folder: Path) -> None:
    words = ["eval", "passkey", "tiny", "--text", "prose.txt", "--samples", "2", "--lengths", "[50]"]
    assert main([*words, "--key-length", "6", "--out", "here"]) == 0
    assert {row["length"] for row in lines_of(folder / "here" / "metrics.jsonl")} == {50}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["perplexity", "none"], "none"),
        (["perplexity", "tiny", "--text", "short.txt"], "at least one window of 8 tokens, got 5 tokens"),
        (["passkey", "tiny", "--text", "short.txt"], "at least one window of 8 tokens, got 5 tokens"),
        (["passkey", "tiny", "--lengths", "[4]"], "length 4 is too short for a passkey prompt"),
        (["perplexity", "tiny", "--max-tokens", "1"], "max_tokens must be at least 2, got 1"),
        (["perplexity", "tiny", "--text", "austn"], "did you mean 'austen'?"),
        (["perplexity", "tiny", "--chunk", "0"], "chunk must be at least 1, got 0"),
        (["passkey", "tiny", "--sampels", "3"], "--samples"),
    ],
)
def test_eval_refuses_in_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    (folder / "short.txt").write_text("Emma.", encoding="utf-8")
    assert main(["eval", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (folder / "runs").exists()
