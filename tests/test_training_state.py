"""What a training carries and keeps: states between batches, checkpoints, files that cannot be written."""

from __future__ import annotations

import errno
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from newllm import runs
from newllm.data.streams import IGNORED
from newllm.runs import Run
from newllm.training.carry import CarriedStates
from newllm.training.checkpoints import Checkpoints
from newllm.training.config import TrainConfig
from newllm.training.losses import batch_loss
from newllm.training.scratch import scratch_model
from tests.training_parts import SMALL, Press, assert_same_weights, names, rows, stream, trainer, weights

CONFIG = TrainConfig(steps=10, lr=1e-2, warmup_steps=2, log_steps=4, save_steps=3)


# Carried states


def test_carried_state_reads_as_one_stream() -> None:
    """Block by block with carried states, the losses are those of the whole document at once."""
    model, _ = scratch_model(SMALL, seed=0)
    model = model.double().eval()
    data = stream("ordered", needles=None)
    carried = CarriedStates(model.config)
    logits: list[Tensor] = []
    ids: list[Tensor] = []
    with torch.no_grad():
        for index in range(12):
            batch = data.batch(index)
            cache = carried.enter(0, batch["reset"])
            out = model(batch["input_ids"], attention_mask=batch["attention_mask"], past_key_values=cache)
            if batch["reset"][0] and index:
                break
            kept = batch["attention_mask"][0]
            logits.append(out.logits[0, kept])
            ids.append(batch["input_ids"][0, kept])
        whole = model(torch.cat(ids)[None], use_cache=False).logits[0]
    assert len(ids) > 2
    bound = 4096 * torch.finfo(torch.float64).eps * float(whole.abs().max())
    assert float((torch.cat(logits) - whole).abs().max()) <= bound


def test_gradients_end_at_the_batch() -> None:
    model, _ = scratch_model(SMALL, seed=0)
    carried = CarriedStates(model.config)
    ids = torch.arange(16)[None]
    no, yes = torch.tensor([False]), torch.tensor([True])
    model(ids, past_key_values=carried.enter(0, yes))
    cache = carried.enter(0, no)
    assert not any(
        tensor.requires_grad for layer in cache.layers for tensor in layer.state if tensor is not None
    )
    assert cache.layers[0].state.position.tolist() == [16]
    assert carried.enter(0, yes).layers[0].state.position.tolist() == [0]
    assert carried.enter(1, no) is not cache


def test_checkpointing_keeps_carried_states(tmp_path: Path) -> None:
    """transformers drops caches from layers that it checkpoints; a Senri's state is no cache to them."""
    short = replace(CONFIG, steps=6, save_steps=0)
    plain = trainer(tmp_path / "plain", short, kind="ordered")
    saving = trainer(tmp_path / "saving", replace(short, checkpointing=True), kind="ordered")
    for made in (plain, saving):
        made.fit()
    assert saving.model.is_gradient_checkpointing
    assert_same_weights(weights(plain), weights(saving))


def test_bptt_segments_limit_the_gradient_within_a_batch() -> None:
    found = []
    for reach in (None, 0):
        model, _ = scratch_model(replace(SMALL, memory_layers=[0, 1]), seed=0)
        for layer in model.model.layers:
            layer.self_attn.bptt_segments = reach
            nn.init.ones_(layer.self_attn.memory_gate.weight)
        ids = torch.arange(64)[None]
        targets = torch.full_like(ids, IGNORED)
        targets[:, -1] = 5
        # The head is tied to the embeddings, so the gradient is taken at what is read.
        read = model.model.embed_tokens(ids).detach().requires_grad_()
        logits = model(inputs_embeds=read, use_cache=False).logits
        batch_loss(logits, {"input_ids": ids, "targets": targets}).backward()
        assert read.grad is not None
        found.append(float(read.grad[0, :10].abs().sum()))
    assert found[0] > 0 == found[1]


# Checkpoints


def saved(folder: Path, step: int, keep: int = 3) -> Checkpoints:
    made = Checkpoints(folder, keep)
    written = made.staging / f"checkpoint-{step}"
    written.mkdir(parents=True)
    (written / "weights").write_bytes(bytes(range(step)))
    (written / "state").write_text(str(step))
    made.commit(step)
    made.clear_staging()
    return made


def test_the_newest_intact_checkpoint_is_found(tmp_path: Path) -> None:
    for step in (5, 10, 20, 30):
        made = saved(tmp_path, step)
    assert made.steps() == [10, 20, 30]
    assert made.newest() == (made.path(30), [])
    (made.path(30) / "weights").write_bytes(b"short")
    (made.path(20) / "manifest.json").unlink()
    newest, complaints = made.newest()
    assert newest == made.path(10)
    assert complaints == [
        f"the checkpoint {made.path(30)} is passed over: weights is damaged",
        f"the checkpoint {made.path(20)} is passed over: manifest.json is missing",
    ]
    (made.path(10) / "state").unlink()
    (made.path(10) / "state").mkdir()
    newest, complaints = made.newest()
    assert newest is None
    assert complaints[-1].endswith("state is missing")
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpoints(tmp_path, 0)


def test_a_full_disk_is_told_and_costs_no_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save = torch.save
    made = trainer(tmp_path, CONFIG)

    def full(data: Any, path: Any, **options: Any) -> None:
        if "checkpoint-6" in str(path) and "optimizer" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(data, path, **options)

    monkeypatch.setattr(torch, "save", full)
    where = tmp_path / "checkpoints" / "checkpoint-6"
    with pytest.raises(
        OSError, match=rf"the checkpoint {where} could not be written: .*No space left on device"
    ):
        made.fit()
    monkeypatch.undo()
    assert names(tmp_path / "checkpoints") == {"checkpoint-3"}
    resumed = trainer(tmp_path, CONFIG, resume=True)
    resumed.fit(resume=True)
    whole = trainer(tmp_path / "whole", CONFIG)
    whole.fit()
    assert_same_weights(weights(resumed), weights(whole))


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    made = Run(tmp_path, {}, seed=0)
    made.metrics = Path("/dev/full")
    if not made.metrics.exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OSError, match="/dev/full could not be written: No space left on device"):
        made.log(step=1)


def test_a_damaged_checkpoint_is_passed_over_in_training(tmp_path: Path) -> None:
    trainer(tmp_path, CONFIG, Press(7)).fit()
    broken = tmp_path / "checkpoints" / "checkpoint-7" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-3])
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 8, "lo')
    resumed = trainer(tmp_path, CONFIG, resume=True)
    assert resumed.fit(resume=True) == [
        f"the checkpoint {broken.parent} is passed over: model.safetensors is damaged"
    ]
    whole = trainer(tmp_path / "whole", CONFIG)
    whole.fit()
    assert_same_weights(weights(resumed), weights(whole))
    assert [row["step"] for row in rows(tmp_path)] == [row["step"] for row in rows(tmp_path / "whole")]
    assert (
        json.loads((tmp_path / "checkpoints" / "checkpoint-10" / "manifest.json").read_text())["step"] == 10
    )


def test_the_commit_is_marked_where_sources_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where results were added: a long check appends rows, and its next part runs the same sources."""

    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        done = subprocess.run(
            ["git", "-C", tmp_path, *who, *words], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    source, rows = tmp_path / "newllm" / "runs.py", tmp_path / "benchmarks" / "results" / "soak.jsonl"
    for file in (source, rows):
        file.parent.mkdir(parents=True)
        file.write_text("before")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    head = git("rev-parse", "HEAD")
    monkeypatch.setattr(runs, "__file__", str(source))
    assert runs.commit() == head
    rows.write_text("after")
    assert runs.commit() == head
    source.write_text("after")
    assert runs.commit() == f"{head}+"
