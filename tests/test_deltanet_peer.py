"""The DeltaNet peer: its chunks are its recurrence, its state is no smaller, its rows say whose it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from benchmarks import recall
from benchmarks.deltanet import delta_rule, state_bytes, with_deltanet
from newllm.testing import assert_rounding, largest
from tests.tiny_models import random_tokens, tiny_senri

F64 = torch.float64


def test_chunks_are_the_recurrence() -> None:
    q, k = (normalize(torch.randn(2, 3, 11, 5, dtype=F64), dim=-1) for _ in "qk")
    v, beta = torch.randn(2, 3, 11, 4, dtype=F64), torch.rand(2, 3, 11, dtype=F64)
    state, outputs = torch.zeros(2, 3, 5, 4, dtype=F64), []
    for t in range(11):
        key, value, query = (x[:, :, t, None] for x in (k, v, q))
        state = state + beta[:, :, t, None, None] * key.mT @ (value - key @ state)
        outputs.append(query @ state)
    expected = torch.cat(outputs, 2)
    for chunk in (1, 4, 64):
        found = delta_rule(q, k, v, beta, chunk)
        assert_rounding(found, expected, additions=11 * 11, magnitude=largest(expected) + largest(v))


def test_the_peer_is_causal_and_its_state_no_smaller() -> None:
    own = tiny_senri()
    layer = own.model.layers[0].self_attn
    model, whose, size = with_deltanet(own, 5000)
    assert whose == "plain torch"
    assert 3 * 5000 <= size < 3 * (5000 + state_bytes(4, 8, 17))
    assert own.model.layers[0].self_attn is not layer
    ids = random_tokens(1, 20)
    other = ids.clone()
    other[0, 12] = ids[0, 12] % 40 + 1
    first, second = (model(given, use_cache=False).logits[0] for given in (ids, other))
    assert torch.equal(first[:12], second[:12])
    assert not torch.equal(first[12:], second[12:])


def test_peer_and_senri_write_rows_that_can_be_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = [
        "train.steps=3", "train.warmup_steps=1", "rows_per_step=2", "sizes=[2]", "tests=[2]", "length=40",
        "vocabulary=32", "samples=4", "model.hidden_size=32", "train.bf16=false",
    ]  # fmt: skip
    for more in ([], ["--peer", "deltanet"], ["--peer", "deltanet"]):
        words = ["recall", "--symbols", "mqar64", "--rows", "rows.jsonl", *more, "--set", *small]
        monkeypatch.setattr(sys, "argv", words)
        recall.main()
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert [row["model"] for row in rows] == ["mqar64-0", "mqar64-deltanet-0 (plain torch)"]
    assert rows[1]["state_bytes"] >= rows[0]["state_bytes"] > 0
    assert "mqar64-deltanet-0: measured before" in capsys.readouterr().out
