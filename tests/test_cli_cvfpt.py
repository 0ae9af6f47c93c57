"""``newllm train cvfpt`` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from newllm.cli import main
from newllm.models.files import load_model

SMALL = [
    *("--tokenizer", "bytes", "--context-dim", "16", "--embed-dim", "16", "--hidden-dim", "24"),
    *("--layers", "1", "--cvfpt.repetitions", "6", "--cvfpt.epochs-per-stage", "2", "--suite", "false"),
]


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "run"


def test_stages_and_single_tokens(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--cvfpt.max-stage", "2", "--top-k", "2", "--top-k-epochs", "2", "--out", str(out)]
    assert main(["train", "cvfpt", *SMALL, *words]) == 0
    found = json.loads((out / "results.json").read_text())
    assert [len(stage["phrases"]) for stage in found["stages"]] == [10, 10]
    assert found["stages"][0]["phrases"][0]["ids"] == list(b" red")
    assert found["top_k"]["tokens"] == 2
    curves = json.loads((out / "cvfpt_performance_topk_fair.json").read_text())
    assert [len(row["losses"]) for row in curves["tokens"]] == [3, 3]
    for name in ("losses.png", "top_k.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    for name in ("stage_1", "stage_2", "last"):
        assert load_model(out / name).config.cell == "gated"
    assert "stage 1: " in capsys.readouterr().out


def test_phrases_of_ids_need_no_words(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "--phrases", "[[5, 6, 7], [9]]", "--out", str(out)]
    assert main(["train", "cvfpt", *words]) == 0
    stages = json.loads((out / "results.json").read_text())["stages"]
    assert [row["ids"] for row in stages[0]["phrases"]] == [[5, 6, 7], [9]]
    capsys.readouterr()
    assert main(["train", "cvfpt", *SMALL, "--phrases", "[[999]]", "--out", str(out), "--overwrite"]) == 2
    assert "phrases must hold ids from 0 to 263, got 999" in capsys.readouterr().err


def test_no_training_without_the_next_token(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "cvfpt", *SMALL, "--cvfpt.token-weight", "0", "--out", str(out)]) == 2
    assert "token_weight must be above 0, got 0" in capsys.readouterr().err
