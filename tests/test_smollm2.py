"""The benchmark of SmolLM2 on a tiny base: what was measured is not measured again, half an arm is none."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import smollm2
from newllm.data.tokenizer import byte_tokenizer
from newllm.training.trainer import LanguageTrainer
from tests.tiny_models import tiny_base

Run = Callable[..., None]
SMALL = [
    "train.steps=2", "train.warmup_steps=1", "train.bf16=false", "task.lengths=[64]",
    "task.tokens_per_step=128", "convert.window=16", "convert.segment=16",
]  # fmt: skip
WORDS = [
    "smollm2", "--base", "base", "--data", "sentences", "--novel", "sentences", "--novel-tokens", "300",
    "--block", "64", "--skip", "32", "--lengths", "96", "--depths", "0", "--samples", "2",
    "--rows", "rows.jsonl", "--out", "out",
]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    tiny_base("llama", vocab_size=264).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", [*WORDS, *words, "--set", *SMALL])
        smollm2.main()

    return run


def test_figures_that_are_there_are_told_again(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    arms = ["--arms", "window alone", smollm2.FULL]
    run(*arms)
    rows, said = Path("rows.jsonl").read_text(), capsys.readouterr().out
    assert [json.loads(line)["model"] for line in rows.splitlines()] == ["window alone"] * 2 + [smollm2.FULL]
    run(*arms)
    assert (Path("rows.jsonl").read_text(), capsys.readouterr().out) == (rows, said)


def test_an_interrupted_arm_is_not_done(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LanguageTrainer, "interrupted", 2)
    with pytest.raises(SystemExit) as ended:
        run("--arms", "window alone")
    assert ended.value.code == 130
    assert not Path("out/window-alone/done").exists()
