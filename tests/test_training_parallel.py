"""Several processes on one machine: the same losses as one process with as much accumulation."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from newllm.testing import largest
from newllm.training.launch import launched_command
from tests import processes
from tests.training_parts import SENTENCE, rows


def words(folder: Path, name: str, kind: str, *more: str) -> list[str]:
    """A short training of a small model, in ``folder / name``."""
    text = folder / "text"
    if not text.exists():
        text.mkdir()
        for number in range(12):
            (text / f"{number:02}.txt").write_text(SENTENCE[number:] * (number + 3))
    return [
        "train", "senri",
        "--data", str(text), "--out", str(folder / name),
        "--model.hidden-size", "16", "--model.intermediate-size", "32", "--model.window", "8",
        "--stream.kind", kind, "--stream.length", "32", "--stream.rows", "2", "--train.steps", "12",
        "--train.warmup-steps", "2", "--train.eval-steps", "4", "--train.eval-batches", "6",
        "--train.log-steps", "1", "--train.save-steps", "5", *more,
    ]  # fmt: skip


def run(folder: Path, words: list[str], size: int = 1) -> None:
    """``newllm`` with ``words`` in ``size`` processes."""
    processes.succeeded(processes.command(words, size, folder), folder)


def cut(folder: Path, words: list[str], size: int, sign: Path) -> None:
    """The same, but all are told to stop as soon as there is ``sign``."""
    started = processes.command(words, size, folder)
    processes.wait_for(sign, started)
    for process in started.processes:
        process.terminate()
    assert processes.exit_codes(started) == [128 + signal.SIGTERM] * size, (folder / "log").read_text()


def curve(out: Path, key: str) -> list[float]:
    return [row[key] for row in rows(out) if key in row]


def compare_with_one_process(folder: Path, kind: str) -> None:
    run(folder, words(folder, "one", kind, "--train.accumulation", "2"))
    run(folder, words(folder, "two", kind), 2)
    for key in ("loss", "eval_loss"):
        one, two = curve(folder / "one", key), curve(folder / "two", key)
        assert len(one) == len(two) == {"loss": 12, "eval_loss": 3}[key]
        # Two sums of two gradients round alike; what the log shows has four digits after the point.
        assert max(abs(a - b) for a, b in zip(one, two, strict=True)) <= 1e-4
    steps = {path.name for path in (folder / "two" / "checkpoints").iterdir()}
    assert steps == {"checkpoint-5", "checkpoint-10", "checkpoint-12"}


@pytest.mark.slow
def test_two_ranks_read_packed_blocks_in_turns(tmp_path: Path) -> None:
    compare_with_one_process(tmp_path, "packed")


def test_two_ranks_train_as_one_process_stop_together_and_resume(tmp_path: Path) -> None:
    """As one process with twice the accumulation; SIGTERM reaches both, and they agree on the step."""
    compare_with_one_process(tmp_path, "ordered")
    command = words(tmp_path, "cut", "ordered", "--resume")
    cut(tmp_path, command, 2, tmp_path / "cut" / "checkpoints" / "checkpoint-5")
    assert not (tmp_path / "cut" / "last").exists()
    run(tmp_path, command, 2)
    weights = [(tmp_path / name / "last" / "model.safetensors").read_bytes() for name in ("two", "cut")]
    assert weights[0] == weights[1]


def test_launched_command_is_torchrun() -> None:
    command = launched_command(["train", "senri"], Path("x.yaml"), 4)
    assert command[1:] == [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "-m", "newllm.cli", "train",
        "senri", "--config", "x.yaml",
    ]  # fmt: skip


def _shard(rank: int, size: int, folder: str) -> None:
    """One rank of two: losses of a sharded Senri beside those of a whole one."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    from newllm.training.losses import batch_loss
    from newllm.training.scratch import scratch_model
    from tests.training_parts import SMALL, stream

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    torch.set_num_threads(1)
    found: list[list[float]] = []
    for sharded in (False, True):
        model: Any = scratch_model(SMALL, seed=0)[0]
        if sharded:
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for index in range(4):
            batch = stream("packed").batch(index)
            loss = batch_loss(model(batch["input_ids"], use_cache=False).logits, batch)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        found.append(losses)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _judge(rank: int, size: int, folder: str) -> None:
    """One rank of two that judge a sharded Senri by three batches."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    from newllm.training.config import TrainConfig
    from newllm.training.scratch import scratch_model
    from tests.training_parts import SMALL, trainer

    whole = scratch_model(SMALL, seed=0)[0]
    config, path = TrainConfig(steps=1, lr=1e-3, eval_steps=1), Path(folder)
    alone = trainer(path / f"alone-{rank}", config, model=whole, judged=True, batches=3).judge()
    AcceleratorState._reset_state(reset_partial_state=True)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "unused", "MASTER_PORT": 1}
    os.environ |= {name: str(value) for name, value in place.items()}
    dist.init_process_group("gloo", f"file://{folder}/meet", timedelta(minutes=1), rank=rank, world_size=size)
    model: Any = scratch_model(SMALL, seed=0)[0]
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    together = trainer(path / f"both-{rank}", config, model=model, judged=True, batches=3).judge()
    torch.save((alone, together), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_sharded_models_are_judged_by_an_odd_number_of_batches(tmp_path: Path) -> None:
    for alone, together in processes.spawned(_judge, 2, tmp_path):
        assert together == pytest.approx(alone, rel=64 * torch.finfo(torch.float32).eps)


def test_sharded_senri_learns_as_the_whole_one(tmp_path: Path) -> None:
    """FSDP2 on two ranks that read the same batches: the mean of two equal gradients is the gradient."""
    for whole, sharded in processes.spawned(_shard, 2, tmp_path):
        # A step may pass a rounding error on, three times.
        bound = 64 * torch.finfo(torch.float32).eps * largest(torch.tensor(whole))
        assert max(abs(a - b) for a, b in zip(whole, sharded, strict=True)) <= bound
        assert whole[-1] != whole[0]
