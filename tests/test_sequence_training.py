"""Training on sequences sliced over ranks: the losses, weights and checkpoints of one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from newllm.data.streams import IGNORED
from newllm.distributed.line import Line
from newllm.testing import largest
from newllm.training.checkpoints import Checkpoints
from newllm.training.losses import batch_loss
from newllm.training.slicing import Slicing
from tests.test_training_parallel import curve, cut, run, words
from tests.training_parts import rows

SLICED = ("--train.sequence-ranks", "2")


def sliced_words(folder: Path, name: str, *more: str) -> list[str]:
    return words(folder, name, "packed", "--stream.needles", "0", *more)


def close(one: list[float], two: list[float]) -> bool:
    """What the log shows has four digits after the point; sums of two slices round alike."""
    return len(one) == len(two) and max(abs(a - b) for a, b in zip(one, two, strict=True)) <= 1e-4


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in one process."""
    folder = tmp_path_factory.mktemp("sliced")
    run(folder, sliced_words(folder, "one"))
    return folder


@pytest.mark.parametrize("turned", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sliced_training_is_that_of_one_process_and_its_checkpoints_are_anyones(
    turned: bool, one: Path
) -> None:
    """Some steps on two slices and the rest on one process; or the other way round."""
    name = f"turned{turned}"
    layouts = [(2, sliced_words(one, name, *SLICED)), (1, sliced_words(one, name))]
    (size, before), (then, after) = layouts[::-1] if turned else layouts
    cut(one, before, size, one / name / "checkpoints" / "checkpoint-5")
    assert not (one / name / "last").exists()
    run(one, [*after, "--resume"], then)
    for key, count in (("loss", 12), ("eval_loss", 3)):
        assert len(curve(one / "one", key)) == count
        assert close(curve(one / "one", key), curve(one / name, key))
    weights = [load_file(one / run / "last" / "model.safetensors") for run in ("one", name)]
    assert {name: x.shape for name, x in weights[0].items()} == {
        name: x.shape for name, x in weights[1].items()
    }


@pytest.mark.parametrize("how", ["killed", pytest.param("told", marks=pytest.mark.slow)])
def test_a_lost_rank_stops_the_launch_and_leaves_the_checkpoint(how: str, tmp_path: Path) -> None:
    """One of torchrun's processes is killed; or torchrun is told to stop, and tells all of them."""
    command = sliced_words(tmp_path, "cut", *SLICED, "--launch", "2", "--train.steps", "4000")
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "newllm.cli", *command],
        cwd=Path(__file__).resolve().parent.parent,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as process:
        while not (tmp_path / "cut" / "checkpoints" / "checkpoint-5").exists():
            assert process.poll() is None
            time.sleep(0.01)
        if how == "killed":
            children = [int(pid) for pid in _children(process.pid)]
            os.kill(children[-1], signal.SIGKILL)
        else:
            process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
        assert process.returncode != 0
    newest, complaints = Checkpoints(tmp_path / "cut" / "checkpoints").newest()
    assert newest is not None
    assert complaints == []
    assert how == "told" or "Signal 9 (SIGKILL)" in said or "exitcode  : -9" in said
    assert rows(tmp_path / "cut")
    assert not (tmp_path / "cut" / "last").exists()


def _children(parent: int) -> list[str]:
    task = Path(f"/proc/{parent}/task/{parent}/children")
    return task.read_text().split()


def slicing(rank: int, ranks: int) -> Slicing:
    made = Slicing.__new__(Slicing)
    made.line, made.window, made.segment = Line("", rank, ranks), 4, 4
    return made


@pytest.mark.parametrize("weighted", [False, True])
def test_losses_of_slices_average_to_that_of_the_batch(weighted: bool) -> None:
    ids, logits = torch.randint(9, (2, 16)), torch.randn(2, 16, 9, dtype=torch.float64)
    batch: dict[str, Tensor] = {"input_ids": ids, "segment_weight": torch.rand(2, 4)}
    if weighted:
        batch["loss_weight"] = torch.rand(2, 16, dtype=torch.float64)
    else:
        batch["targets"] = ids.roll(-1, 1).masked_fill(torch.rand(2, 16) < 0.3, IGNORED)
    parts = [slicing(rank, 2).own(batch) for rank in range(2)]
    losses = [batch_loss(logits[:, 8 * rank : 8 * rank + 8], part) for rank, part in enumerate(parts)]
    whole = batch_loss(logits, batch)
    assert abs(sum(losses) / 2 - whole) <= 32 * torch.finfo(torch.float32).eps * largest(whole)
    assert torch.equal(torch.cat([part["segment_weight"] for part in parts], 1), batch["segment_weight"])
    assert torch.equal(torch.cat([part["input_ids"] for part in parts], 1), ids)


def test_wrong_slicings_are_named(tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"train\.sequence_ranks must divide the 3 processes, got 2"):
        Slicing(model, 2, 3, "cpu", carry=False)
    with pytest.raises(ValueError, match=r"train\.sequence_ranks must be 1 where states are carried, got 2"):
        Slicing(model, 2, 4, "cpu", carry=True)
    padded = {"input_ids": torch.zeros(1, 16, dtype=torch.int64), "attention_mask": torch.zeros(1, 16)}
    with pytest.raises(ValueError, match="attention_mask must be all ones"):
        slicing(0, 2).own(padded)
    with pytest.raises(ValueError, match=r"tokens must be a multiple of segment \(4\), got 6"):
        slicing(0, 2).own({"input_ids": torch.zeros(1, 6, dtype=torch.int64)})
