"""The benchmark of training steps: its full attention is that of transformers, its rows say what ran."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks import train_step
from newllm.measuring.workers import Worker
from newllm.testing import assert_rounding, largest


def test_full_attention_is_the_models_own() -> None:
    full = train_step.make_model(train_step.FULL, train_step.TINY, 16).eval()
    own = LlamaForCausalLM(full.config.__class__(**train_step.TINY)).eval()
    own.load_state_dict(full.state_dict())
    ids = torch.randint(256, (1, 40))
    with torch.no_grad():
        expected = own(ids).logits
        assert_rounding(full(ids).logits, expected, additions=3 * 400, magnitude=largest(expected))
        # Within the window, the three are one model: gates are shut.
        senri = train_step.make_model(train_step.SENRI, train_step.TINY, 16).eval()
        senri.load_state_dict(full.state_dict(), strict=False)
        short = senri(ids[:, :16]).logits
    assert_rounding(short, expected[:, :16], additions=3 * 400, magnitude=largest(expected))


ARGUMENTS = ["train_step", "--tokens", "32", "--seconds", "0.1", "--commit", "abc", "--out"]


class Here:
    """Stands for a worker, in this process."""

    error = None

    def __init__(self, prepare: Any, *arguments: Any) -> None:
        self.made = prepare(lambda: None, *arguments)

    def waits(self) -> bool:
        return True

    def prepared(self, until: float) -> Any:
        return self.made[0]

    def call(self, name: str, until: float) -> Any:
        return self.made[1][name]()

    def end(self) -> None:
        pass


@pytest.mark.parametrize("worker", [Here, pytest.param(Worker, marks=pytest.mark.slow)])
def test_rows_on_a_cpu(
    worker: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(train_step, "Worker", worker)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(sys, "argv", [*ARGUMENTS, str(out)])
    train_step.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["impl"] for row in rows] == [train_step.SENRI, train_step.WINDOW, train_step.FULL]
    assert len({row["run"] for row in rows}) == 1
    assert {(row["commit"], row["error"], row["tokens"]) for row in rows} == {("abc", None, 32)}
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(32e3 / row["ms"])
        assert row["attention_share"] == pytest.approx(row["attention_ms"] / row["ms"])
    assert "x full attention" in capsys.readouterr().out


class Double:
    """Stands for a worker: fails while preparing, or when a call is asked for, or never."""

    def __init__(self, prepare: Any, name: str, tokens: int, *_: Any) -> None:
        self.error: str | None = None
        self.fails = {(train_step.FULL, 64): "", (train_step.SENRI, 32): "attention"}.get((name, tokens))
        self.slow = (name, tokens) == (train_step.WINDOW, 16)

    def waits(self) -> bool:
        return not self.slow

    def prepared(self, until: float) -> Any:
        if self.slow:
            self.error = "no answer in time"
        return self.call("", until) and {"gib": 1.0}

    def call(self, name: str, until: float) -> Any:
        if name == self.fails:
            self.error = "OutOfMemoryError: too much"
        return None if self.error else [(2.0, 1.0), (4.0, 1.0)]

    def end(self) -> None:
        pass


def test_what_fails_is_named_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_step, "Worker", Double)
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", [*ARGUMENTS, str(out), "--limit", "1", "--tokens", "16", "32", "64"])
    train_step.main()
    rows = {(row["impl"], row["tokens"]): row for row in map(json.loads, out.read_text().splitlines())}
    assert [*rows] == [
        (name, tokens)
        for tokens in (32, 64, 16)
        for name in (train_step.SENRI, train_step.WINDOW, train_step.FULL)
    ]
    failed = {key: row["error"] for key, row in rows.items() if row["error"]}
    assert failed == {
        (train_step.SENRI, 32): "OutOfMemoryError: too much",
        (train_step.FULL, 64): "OutOfMemoryError: too much",
        (train_step.WINDOW, 16): "no answer in time",
    }
    # What was known before it failed stays.
    assert rows[train_step.SENRI, 32]["ms"] == 3.0 and rows[train_step.SENRI, 32]["attention_ms"] is None
    assert rows[train_step.FULL, 64]["ms"] is None
    said = capsys.readouterr().out
    assert said.count("failed: OutOfMemoryError: too much") == 2
    assert "newllm: 1.00 x full attention, 1.00 x window alone" in said
    assert "newllm: 1.00 x window alone\n" in said and "newllm: 1.00 x full attention\n" in said


def test_attention_counts_all_layers() -> None:
    for name, kinds in {train_step.SENRI: [1, 2], train_step.WINDOW: [3], train_step.FULL: [3]}.items():
        layers = train_step.attention_layers(name, train_step.TINY, 32, 16, torch.device("cpu"))
        assert [count for count, _ in layers] == kinds
        gradients: Any = [call() for _, call in layers]
        assert [len(found) for found in gradients] == [4 if count == 2 else 3 for count in kinds]
        assert all(bool(x.isfinite().all()) for found in gradients for x in found)


@pytest.mark.slow
@pytest.mark.parametrize("name", [train_step.SENRI, train_step.WINDOW, train_step.FULL])
def test_both_passes_are_compiled_before_the_turn(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    counters.clear()
    compiled: list[int] = []
    train_step.prepare(
        lambda: compiled.append(counters["inductor"]["fxgraph_cache_miss"]), name, 32, 16, False, True, 1
    )
    assert (compiled, counters["inductor"]["fxgraph_cache_miss"]) == ([2], 2)
