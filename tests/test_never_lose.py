"""A training run killed without warning: the next start goes on, and ends as if nothing had been."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.processes import Processes, command, exit_codes, succeeded
from tests.training_parts import SENTENCE, rows

WORDS = [
    "train", "senri", "--model.hidden-size", "16", "--model.intermediate-size", "32", "--model.window", "8",
    "--stream.kind", "ordered", "--stream.length", "32", "--stream.rows", "2",
    "--train.accumulation", "2", "--train.save-steps", "7", "--train.eval-steps", "20",
    "--train.log-steps", "1", "--train.eval-batches", "4", "--resume",
]  # fmt: skip


def start(folder: Path, name: str, steps: int) -> Processes:
    """The training, begun or resumed, in a process of its own."""
    text, place = folder / "text", folder / f"{name} process"
    if not text.exists():
        text.mkdir()
        for number in range(12):
            (text / f"{number:02}.txt").write_text(SENTENCE[number:] * (number + 3))
    place.mkdir(exist_ok=True)
    options = ["--train.steps", str(steps), "--data", str(text), "--out", str(folder / name)]
    return command([*WORDS, *options], 1, place)


def last_step(out: Path) -> int:
    """The last whole line of the log."""
    try:
        return int(rows(out)[-1]["step"])
    except (FileNotFoundError, IndexError, ValueError, KeyError):
        return 0


def finish(folder: Path, name: str, steps: int) -> None:
    succeeded(start(folder, name, steps), folder / f"{name} process")


def killed_and_resumed(folder: Path, kills: int, steps: int, seed: int) -> list[int]:
    """Steps after which the training was killed, at random moments, before it was let to finish."""
    lots = random.Random(seed)
    share = 0.75 * steps / kills
    moments = [int(share * (kill + lots.random())) + 2 for kill in range(kills)]
    found = []
    for moment in moments:
        started = start(folder, "killed", steps)
        (process,) = started.processes
        while last_step(folder / "killed") < moment and process.is_alive():
            time.sleep(0.005)
        time.sleep(lots.random() * 0.06)
        process.kill()
        assert exit_codes(started) == [-9], (folder / "killed process" / "log").read_text()[-2000:]
        found.append(last_step(folder / "killed"))
    finish(folder, "killed", steps)
    return found


def check(folder: Path, kills: int, steps: int, seed: int = 0) -> None:
    finish(folder, "whole", steps)
    found = killed_and_resumed(folder, kills, steps, seed)
    assert sum(1 < step < steps for step in found) >= 0.75 * kills, found
    for name in ("last", "best"):
        weights = [(folder / run / name / "model.safetensors").read_bytes() for run in ("whole", "killed")]
        assert weights[0] == weights[1], f"{name} differs after kills at {found}"
    logged = [[row for row in rows(folder / run) if "train_loss" not in row] for run in ("whole", "killed")]
    assert logged[0] == logged[1]
    assert [path.name for path in (folder / "killed" / "checkpoints").iterdir() if path.name[0] == "."] == []


def test_two_kills_change_nothing(tmp_path: Path) -> None:
    check(tmp_path, kills=2, steps=48)


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    check(tmp_path, kills=20, steps=160, seed=1)
