"""``newllm train context`` and ``newllm train context-kv``, end to end on a few hundred tokens."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from newllm.cli import main
from newllm.models.files import load_model
from newllm.training.phase_checkpoints import PhaseCheckpoints
from newllm.training.phase_config import Phase1Config, Phase2Config
from newllm.training.two_phase import Stream, run_phases
from tests.test_phase_two import ids, slots, tiny

SMALL = [
    *("--tokenizer", "bytes", "--tokens", "600", "--validation-tokens", "200", "--embed-dim", "16"),
    *("--phase1.max-iterations", "4", "--phase1.batch-size", "300", "--phase2.epochs", "2"),
]


@pytest.mark.parametrize(
    "words",
    [["context", "--context-dim", "12"], ["context-kv", "--context-dims", "[8,4]", "--chunk-size", "20"]],
    ids=["context", "context-kv"],
)
def test_both_phases_from_the_command_line(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "run"
    command = ["train", *words, *SMALL, "--out", str(out)]
    assert main(command) == 0
    found = json.loads((out / "results.json").read_text())
    assert found["train_tokens"] == 600
    for name in ("trained", "untrained_contexts"):
        assert 0 <= found[name]["accuracy"] <= 1 and found[name]["perplexity"] > 1
        assert found[name]["validation_rank"][0]["rows"] == 200
    phase = found["trained"]["phase_one"]
    assert len(phase) == (2 if words[0] == "context-kv" else 1)
    assert phase[0]["sweeps"] <= 4 and phase[0]["positions"] == 600
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sum(row.get("model") == "untrained" for row in rows) == 2
    model = load_model(out / "last")
    assert model(torch.tensor([[1, 2, 3]])).logits.shape[:2] == (1, 3)
    capsys.readouterr()
    assert main(command) == 2
    assert "is not empty: name another folder (--out), or replace it (--overwrite)" in capsys.readouterr().err


@pytest.mark.parametrize("make", [tiny, slots])
def test_the_control_differs_in_phase_one_alone(make: object) -> None:
    stream = Stream(ids(), torch.tensor([0, 30]))
    model = make().float()  # type: ignore[operator]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows: list[dict[str, object]] = []
    found = run_phases(
        model,
        stream,
        stream,
        Phase1Config(max_iterations=3, batch_size=30),
        Phase2Config(epochs=2, batch_size=16),
        log=rows.append,
    )
    assert found["trained"]["train_rank"] != found["untrained_contexts"]["train_rank"]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any("context_block" in name for name in moved) and not any("embed" in name for name in moved)
    assert {row.get("model") for row in rows} == {None, "trained", "untrained"}


class Cut:
    """A signal after so many rounds, and never again."""

    def __init__(self, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, reached = rounds, PhaseCheckpoints.reached

        def counted(keep: PhaseCheckpoints, state: Any) -> None:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGINT)
            reached(keep, state)

        monkeypatch.setattr(PhaseCheckpoints, "reached", counted)


# In phase 1 of the only block, in phase 2, and in the control's: sweeps 2 to 4 make three rounds, epochs two.
@pytest.mark.parametrize("rounds", [1, 3, 5])
def test_a_run_that_is_cut_off_ends_as_if_it_had_not_been(
    rounds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["train", "context", "--context-dim", "12", *SMALL]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    Cut(rounds, monkeypatch)
    out = tmp_path / "cut"
    assert main([*words, "--out", str(out)]) == 128 + signal.SIGINT
    assert "SIGINT after round" in capsys.readouterr().out and not (out / "last").exists()
    assert main([*words, "--out", str(out), "--resume"]) == 0
    found, expected = (load_model(folder / "last").state_dict() for folder in (out, tmp_path / "whole"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    logs = [(folder / "metrics.jsonl").read_text() for folder in (out, tmp_path / "whole")]
    assert logs[0] == logs[1]
    reports = [json.loads((folder / "results.json").read_text()) for folder in (out, tmp_path / "whole")]
    for name in ("trained", "untrained_contexts"):
        assert reports[0][name]["perplexity"] == reports[1][name]["perplexity"]
    assert not (out / "checkpoints").exists()


def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["train", "context", "--context-dim", "12", *SMALL, "--out", str(tmp_path / "run")]
    Cut(2, monkeypatch)
    assert main(words) == 128 + signal.SIGINT
    (kept,) = (tmp_path / "run" / "checkpoints").glob("checkpoint-*/state.pt")
    kept.write_bytes(kept.read_bytes()[:-10])
    assert main([*words, "--resume"]) == 0
    assert "is passed over: state.pt is damaged" in capsys.readouterr().out


def test_the_report_has_a_control_and_an_n_gram(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "run"
    assert main(["train", "context", "--context-dim", "12", *SMALL, "--out", str(out)]) == 0
    report = (out / "report.txt").read_text()
    assert report in capsys.readouterr().out
    for line in ("trained contexts    train", "untrained contexts  validation", "-gram "):
        assert line in report
    found = json.loads((out / "results.json").read_text())
    assert found["ngram"]["order"] == 1 + min(64, found["ngram"]["horizon"])
    assert found["trained"]["validation"]["perplexity"] == found["trained"]["perplexity"]
    assert (out / "phases.png").read_bytes().startswith(b"\x89PNG")
