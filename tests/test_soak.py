"""Samples of the soak tests: streams beside their float64 twins, sessions that come and go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from newllm import Session
from tests.reliability_parts import Options
from tests.soak_parts import FLAT, STREAMS, Seen, Twins, _measured, bound, opened_and_closed, soak


@pytest.mark.parametrize("name", [*STREAMS])
def test_streams_stay_beside_their_twins(name: str, tmp_path: Path) -> None:
    """Also where they are kept in files and taken up again: to the bit."""
    whole, first = (Twins(name, "cpu", tmp_path, resume=False) for _ in range(2))
    for count in (300, 200):
        whole.read(count)
    first.read(300)
    first.save()
    second = Twins(name, "cpu", tmp_path, resume=True)
    second.read(200)
    assert second.tokens == whole.tokens == 500
    assert second.error() == whole.error()
    assert 0 < max(whole.error().values()) <= bound(500)


def noted(*steps: tuple[int, float]) -> Seen:
    seen = Seen()
    for resident, error in steps:
        seen.note(resident, {"matrix": error})
    return seen


def test_a_state_that_drifts_is_reported(tmp_path: Path) -> None:
    twins = Twins("linear", "cpu", tmp_path, resume=False)
    twins.read(100)
    seen = noted((1_000_000, 1e-2), (1_000_000, 1e-7))
    assert _measured(twins, 0, seen)["failures"] == ["matrix is off by 0.01, at most 5.96e-06"]


def test_memory_that_grows_is_reported(tmp_path: Path) -> None:
    twins = Twins("linear", "cpu", tmp_path, resume=False)
    twins.read(100)
    seen = noted((1_000_000, 0.0), (int(1_000_000 * (1 + FLAT)), 0.0))
    assert _measured(twins, 0, seen)["failures"] == ["resident memory grew by 10000 bytes in 100 tokens"]


def test_memory_of_a_device_is_watched_too(tmp_path: Path) -> None:
    twins = Twins("linear", "cpu", tmp_path, resume=False)
    twins.read(100)
    seen = noted((1_000_000, 0.0), (1_000_000, 0.0))
    seen.device[0], seen.device[1] = 5000, 6000
    row = _measured(twins, 0, seen)
    assert row["failures"] == ["device memory grew by 1000 bytes in 100 tokens"]
    assert row["device_mb"] == {"first": 0.01, "last": 0.01}


def test_a_part_leaves_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "benchmarks" / "results"
    out.mkdir(parents=True)
    options = Options("cpu", 0.0, 1, None, "context", out, resume=True)
    threads = torch.get_num_threads()
    assert soak(options) and soak(options)
    torch.set_num_threads(threads)
    rows = [json.loads(line) for line in (out / "soak.jsonl").read_text().splitlines()]
    assert [row["tokens_now"] for row in rows] == [6144, 6144]
    assert rows[1]["tokens"] == 12288


def test_sessions_come_and_go() -> None:
    assert len(opened_and_closed(20, "cpu", samples=2)) == 2


def test_a_session_that_is_kept_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Session] = []
    feed = Session.feed
    monkeypatch.setattr(Session, "feed", lambda self, ids: kept.append(self) or feed(self, ids))
    with pytest.raises(AssertionError, match="a session outlives its last reference"):
        opened_and_closed(2, "cpu", samples=1)
