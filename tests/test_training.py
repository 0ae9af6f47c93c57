"""The training room: optimiser groups, dilution, batches, and Senri on transformers' Trainer."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import TrainerCallback

from newllm.data.passkey import PasskeyTask, byte_passkey
from newllm.data.tokenizer import KEY_TOKEN, QUESTION_TOKEN
from newllm.models.senri import SenriForCausalLM
from newllm.runs import Run
from newllm.training.batches import NeedleBatches
from newllm.training.config import ModelConfig, StreamConfig, TaskConfig, TrainConfig
from newllm.training.dilution import dilution_weights, ramp
from newllm.training.groups import parameter_groups
from newllm.training.outputs import curves
from newllm.training.scratch import scratch_model, window_only
from newllm.training.trainer import LanguageTrainer

SMALL = ModelConfig(hidden_size=16, intermediate_size=32, heads=2, window=8, memory_layers=[1])
TASK = TaskConfig(lengths=[16, 32], tokens_per_step=128, max_rows=6, dilution=8)
SEGMENT = 8


def passkey() -> PasskeyTask:
    return byte_passkey("the quick brown fox jumps over the lazy dog " * 40, key_length=3)


def batches(config: TaskConfig = TASK, steps: int = 20, seed: int = 0) -> NeedleBatches:
    return NeedleBatches(passkey(), config, segment=SEGMENT, steps=steps, seed=seed)


def trained(
    out: Path,
    config: TrainConfig,
    *callbacks: TrainerCallback,
    model: ModelConfig = SMALL,
    resume: bool = False,
) -> SenriForCausalLM:
    made, _ = scratch_model(model, seed=config.seed)
    run = Run(out, {}, seed=config.seed, resume=resume)
    trainer = LanguageTrainer(made, batches(steps=config.steps), config, run, progress=False)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.fit(resume=resume)
    assert bool(trainer.interrupted) == any(isinstance(callback, PressCtrlC) for callback in callbacks)
    return made


class Spoil(TrainerCallback):
    """Puts a NaN into a weight after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                model.lm_head.weight[0, 0] = torch.nan


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_loss_that_is_no_number_ends_the_training(tmp_path: Path) -> None:
    config = TrainConfig(steps=8, lr=1e-3, log_steps=2, save_steps=2)
    with pytest.raises(RuntimeError, match=r"the loss was nan within steps 5 to 6, .* before step 4"):
        trained(tmp_path, config, Spoil(4))
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 6]
    assert not (tmp_path / "last").exists()
    curves(rows(tmp_path)).savefig(tmp_path / "curves.png")


def test_a_resumed_training_tells_the_steps_since_its_last_good_loss(tmp_path: Path) -> None:
    config = TrainConfig(steps=8, lr=1e-3, log_steps=2, save_steps=2)
    with pytest.raises(RuntimeError, match="within steps 5 to 6"):
        trained(tmp_path, config, Spoil(4))
    # Written after the step that spoiled the weights.
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-4")
    with pytest.raises(RuntimeError, match=r"within steps 7 to 8, .* before step 6"):
        trained(tmp_path, config, Spoil(6), resume=True)


def test_memory_parameters_have_their_own_rate_and_no_decay() -> None:
    model, _ = scratch_model(SMALL, seed=0)
    groups = {group["name"]: group for group in parameter_groups(model, 1e-3, weight_decay=0.1)}
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "decay": (1e-3, 0.1),
        "plain": (1e-3, 0.0),
        "memory_plain": (1e-2, 0.0),
    }
    attention = model.model.layers[1].self_attn
    memory = {id(p) for p in groups["memory_plain"]["params"]}
    assert memory == {
        id(p) for p in (*attention.memory_gate.parameters(), *attention.memory_feature.parameters())
    }
    everything = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())


def test_memory_layers_take_their_multiplier() -> None:
    model, _ = scratch_model(SMALL, seed=0)
    groups = parameter_groups(model, 1e-3, memory_layer_multiplier=0.5)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates[id(model.model.layers[1].self_attn.q_proj.weight)] == 5e-4
    assert rates[id(model.model.layers[0].self_attn.q_proj.weight)] == 1e-3


def test_dilution_keeps_what_must_be_remembered() -> None:
    kept = torch.zeros(1000, 4, dtype=torch.bool)
    kept[:, 2] = True
    generator = torch.Generator().manual_seed(0)
    weights = dilution_weights(kept, factor=64, strength=1.0, generator=generator)
    assert (weights[:, 2] == 1).all()
    assert weights.min() >= 1
    assert weights.max() <= 64
    undiluted = (weights == 1).all(1).double().mean()
    assert 0.2 < undiluted < 0.3
    off = dilution_weights(kept, factor=64, strength=0.0, generator=generator)
    assert (off == 1).all()
    with pytest.raises(ValueError, match=r"factor must be at least 1, got 0\.5"):
        dilution_weights(kept, factor=0.5, strength=1.0, generator=generator)


def test_dilution_ramps_in() -> None:
    assert [ramp(progress) for progress in (0.0, 0.4, 0.55, 0.7, 1.0)] == pytest.approx(
        [0.0, 0.0, 0.5, 1.0, 1.0]
    )


def test_batches_follow_the_curriculum_and_repeat() -> None:
    data = batches()
    assert len(data) == 20
    shapes = [tuple(batch["input_ids"].shape) for batch in data]
    assert shapes == [(6, 16)] * 10 + [(4, 32)] * 10
    again = list(batches())
    for first, second in zip(data, again, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)
    other = batches(seed=1).batch(0)
    assert not torch.equal(other["input_ids"], again[0]["input_ids"])


def test_every_sample_holds_its_key_and_asks_for_it() -> None:
    batch = batches().batch(15)
    for ids, weight, segments in zip(*batch.values(), strict=True):
        marker = int((ids == KEY_TOKEN).nonzero()[0, 0])
        question = int((ids == QUESTION_TOKEN).nonzero()[0, 0])
        key, answer = ids[marker + 1 : marker + 4], ids[question + 1 :]
        assert torch.equal(key, answer)
        assert (weight[question + 1 :] > weight[: question + 1].max()).all()
        assert (segments[marker // SEGMENT : (marker + 3) // SEGMENT + 1] == 1).all()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_answers_and_text_weigh_what_they_should(share: float) -> None:
    config = replace(TASK, needle_share=share, text_weight=0.25)
    weight = batches(config).batch(15)["loss_weight"]
    answers = weight.flatten().topk(round(share * len(weight)) * 3).values
    expected = 0.25 + (1.0 if share else 0.0)
    assert float(weight.double().sum()) == pytest.approx(expected)
    assert float(answers.double().sum()) == pytest.approx(1.0 if share else 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [4000], "tokens_per_step": 4000}, "text must hold at least 4000 tokens"),
        ({"needle_share": 2.0}, r"needle_share must be between 0 and 1, got 2\.0"),
        ({"tokens_per_step": 8}, "tokens_per_step must be at least 32, got 8"),
        ({"max_rows": 0}, "max_rows must be at least 1, got 0"),
        ({"lengths": []}, "lengths must name at least one"),
        ({"suites": []}, "suites must name at least one"),
        ({"dilution": 0.5}, "dilution must be at least 1, got 0.5"),
        ({"text_weight": -1.0}, "text_weight must be at least 0"),
        ({"edge": 0.6, "near": 0.6}, "must be shares that sum to at most 1"),
        ({"lengths": [6]}, "too short"),
    ],
)
def test_batches_refuse_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches(replace(TASK, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"lr": None}, "lr must be a number here, got null"),
        ({"memory_first": 1, "memory_first_lr": 0.0}, "memory_first_lr must be above 0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be at least 0"),
        ({"clip_schedule": [[0.5, -1.0]]}, "clip_schedule must hold pairs"),
        ({"eval_steps": 2}, "eval_steps must be 0 without validation, got 2"),
    ],
)
def test_a_training_refuses_what_it_could_not_do(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, replace(TrainConfig(steps=4, lr=1e-3), **change))


@pytest.mark.parametrize("name", ["length", "rows", "key_length", "bptt_segments"])
def test_streams_of_nothing_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"stream.{name} must be at least 1, got 0"):
        StreamConfig(**{name: 0})


def test_the_control_differs_in_its_memory_alone() -> None:
    model, _ = scratch_model(SMALL, seed=3)
    control, _ = scratch_model(window_only(SMALL), seed=3)
    assert control.config.memory_layers == []
    assert not [name for name, _ in control.named_parameters() if "memory" in name]
    for name, parameter in control.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_training_logs_and_opens_a_gate(tmp_path: Path) -> None:
    """The default recipe must move some gate visibly within 200 steps: the failure of many before."""
    model = trained(tmp_path, TrainConfig(steps=200, log_steps=50))
    assert model.model.layers[1].self_attn.memory_gate.openness().abs().max() > 0.1
    logged = rows(tmp_path)
    losses = [row["loss"] for row in logged if "loss" in row]
    assert [row["step"] for row in logged if "loss" in row] == [50, 100, 150, 200]
    assert losses[-1] < losses[0]
    gates = logged[-1]["gate/model.layers.1.self_attn.memory_gate"]
    assert gates == [round(g, 4) for g in model.model.layers[1].self_attn.memory_gate.openness().tolist()]
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())["provenance"]
    assert {"newllm", "torch", "transformers", "commit", "date", "seed", "devices"} <= set(written)


def test_two_runs_agree(tmp_path: Path) -> None:
    config = TrainConfig(steps=6)
    first, second = (trained(tmp_path / name, config) for name in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


class PressCtrlC(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.step:
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_leaves_a_checkpoint_and_resume_ends_alike(tmp_path: Path) -> None:
    config = TrainConfig(steps=10, log_steps=2)
    whole = trained(tmp_path / "whole", config)
    before = signal.getsignal(signal.SIGINT)
    trained(tmp_path / "cut", config, PressCtrlC(4))
    assert signal.getsignal(signal.SIGINT) is before
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["checkpoint-4"]
    resumed = trained(tmp_path / "cut", config, resume=True)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    steps = [row["step"] for row in rows(tmp_path / "cut") if "loss" in row]
    assert steps == [2, 4, 6, 8, 10]


def test_accumulated_batches_weigh_alike(tmp_path: Path) -> None:
    """Two batches of a step give the mean of their gradients, whatever their number of answers."""
    made, _ = scratch_model(SMALL, seed=0)
    data = batches(steps=2)
    trainer = LanguageTrainer(made, data, TrainConfig(steps=1), Run(tmp_path, {}, seed=0), progress=False)
    losses = [float(trainer.compute_loss(made, data.batch(step)).detach()) for step in range(2)]
    seen: list[float] = []

    class Keep(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            seen.extend(logs[name] for name in ("loss",) if name in logs)

    config = TrainConfig(steps=1, accumulation=2, log_steps=1)
    trainer = LanguageTrainer(made, data, config, Run(tmp_path, {}, seed=0), progress=False)
    trainer.add_callback(Keep())
    trainer.fit()
    assert seen[0] == pytest.approx(sum(losses) / 2)


def test_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain, saved = (
        trained(tmp_path / str(flag), TrainConfig(steps=4, checkpointing=flag)) for flag in (False, True)
    )

    def weights(model: SenriForCausalLM) -> list[Tensor]:
        return [parameter.detach() for parameter in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(weights(plain), weights(saved), strict=True))
