"""The benchmark of training steps: its full attention is that of transformers, its rows say what ran."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks import train_step
from newllm.testing import assert_rounding, largest


def test_full_attention_is_the_models_own() -> None:
    made = train_step.models(train_step.TINY, 16, 16)
    full = made[train_step.FULL].eval()
    own = LlamaForCausalLM(full.config.__class__(**train_step.TINY)).eval()
    own.load_state_dict(full.state_dict())
    ids = torch.randint(256, (1, 40))
    with torch.no_grad():
        expected = own(ids).logits
        assert_rounding(full(ids).logits, expected, additions=3 * 400, magnitude=largest(expected))
        # Within the window, the three are one model: gates are shut.
        senri = made[train_step.SENRI].eval()
        senri.load_state_dict(full.state_dict(), strict=False)
        short = senri(ids[:, :16]).logits
    assert_rounding(short, expected[:, :16], additions=3 * 400, magnitude=largest(expected))


def test_rows_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(
        sys,
        "argv",
        ["train_step", "--tokens", "32", "--seconds", "0.1", "--out", str(out), "--commit", "abc"],
    )
    train_step.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["impl"] for row in rows] == [train_step.SENRI, train_step.WINDOW, train_step.FULL]
    assert len({row["run"] for row in rows}) == 1
    assert {row["commit"] for row in rows} == {"abc"}
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(32e3 / row["ms"])
        assert row["attention_share"] == pytest.approx(row["attention_ms"] / row["ms"])
    assert "x full attention" in capsys.readouterr().out


@pytest.mark.slow
def test_what_is_compiled_ahead_is_not_compiled_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Forward and backward pass of a model lie in the cache on disk, without a step having run."""
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    tokens, window = 32, 16
    torch._dynamo.reset()
    train_step.compile_ahead(train_step.SENRI, tokens, window, checkpointing=False, threads=1)
    counters.clear()
    torch._dynamo.reset()
    model = train_step.models(train_step.TINY, window, window)[train_step.SENRI]
    ids = torch.randint(256, (1, tokens))
    train_step.training_step(model, ids, checkpointing=False, backend="inductor")()
    found = counters["inductor"]
    assert (found["fxgraph_cache_hit"], found["fxgraph_cache_miss"]) == (2, 0)
