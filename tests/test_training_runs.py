"""Training runs: what they leave, how they stop, and that resuming them changes nothing."""

from __future__ import annotations

import math
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from newllm.data.streams import IGNORED
from newllm.training.best import best_evaluation, stale_evaluations
from newllm.training.callbacks import Progress, Throughput
from newllm.training.config import TrainConfig
from newllm.training.feed import Feed, Place, loader
from newllm.training.groups import memory_owners, parameter_groups
from newllm.training.losses import batch_loss, counts, metrics
from newllm.training.outputs import curves, summary, upper_limit
from newllm.training.schedules import clip_norm, rate_factor, staged_factor
from newllm.training.scratch import scratch_model
from tests.training_parts import NEEDLES, SMALL, Press, assert_same_weights, names, rows, trainer, weights

CONFIG = TrainConfig(steps=10, lr=1e-2, warmup_steps=2, log_steps=4, save_steps=3)


# Schedules and measurements


def test_rates_rise_fall_and_come_in_stages() -> None:
    rates = [rate_factor(step, steps=100, warmup=10) for step in range(101)]
    assert rates[0] == 0.0 and rates[5] == 0.5 and rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.1)
    assert rate_factor(55, steps=100, warmup=10, shape="linear") == pytest.approx(0.55)
    assert rate_factor(99, steps=100, warmup=10, shape="constant") == 1.0
    staged = [
        staged_factor(step, steps=30, warmup=2, shape="constant", first=10, first_factor=0.5)
        for step in range(30)
    ]
    assert staged[2:10] == [0.5] * 8
    assert staged[10:13] == [0.0, 0.5, 1.0]
    assert staged[13:] == [1.0] * 17


def test_row_64_clipping_follows_its_schedule(tmp_path: Path) -> None:
    """The documents' 0.5, 1, 2 by epoch."""
    schedule = [[0.2, 0.5], [0.6, 1.0]]
    assert [clip_norm(share, schedule, 2.0) for share in (0.0, 0.19, 0.2, 0.59, 0.6, 1.0)] == [
        0.5, 0.5, 1.0, 1.0, 2.0, 2.0,
    ]  # fmt: skip
    seen = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, *_: Any, **__: Any) -> None:
            seen.append(args.max_grad_norm)

    trainer(tmp_path, replace(CONFIG, clip_schedule=schedule, max_grad_norm=2.0), Look()).fit()
    assert seen == [0.5] * 2 + [1.0] * 4 + [2.0] * 4


def test_best_look_and_patience_are_read_from_the_log() -> None:
    log = [{"step": s, "eval_loss": v} for s, v in ((1, 3.0), (2, 2.0), (3, 2.0), (4, 1.95), (5, 2.5))]
    assert best_evaluation([{"step": 0, "loss": 1.0}]) is None
    assert best_evaluation(log) == (4, 1.95)
    assert best_evaluation(log[:3]) == (2, 2.0)
    assert [stale_evaluations(log[:n]) for n in range(6)] == [0, 0, 0, 1, 0, 1]
    assert stale_evaluations(log, min_delta=0.1) == 3


def test_loss_and_metrics_agree_and_skip_what_is_ignored() -> None:
    logits = torch.randn(2, 5, 7, dtype=torch.float64).float()
    targets = torch.randint(7, (2, 5))
    targets[0, 3:] = IGNORED
    batch = {"input_ids": targets, "targets": targets}
    found = metrics(counts(logits, batch))
    kept = targets != IGNORED
    nll = -logits.log_softmax(-1)[kept].gather(1, targets[kept][:, None])
    assert found["loss"] == pytest.approx(float(nll.double().mean()), rel=torch.finfo(torch.float32).eps * 8)
    assert float(batch_loss(logits, batch)) == pytest.approx(
        found["loss"], rel=torch.finfo(torch.float32).eps * 8
    )
    assert found["perplexity"] == math.exp(found["loss"])
    assert found["accuracy"] == float((logits.argmax(-1) == targets)[kept].double().mean())
    assert metrics([1e6, 0, 1])["perplexity"] == math.inf
    with pytest.raises(ValueError, match="no token to predict"):
        metrics([0, 0, 0])


def test_a_batch_without_targets_teaches_nothing(tmp_path: Path) -> None:
    """The first of a needle's two blocks, where its answer alone is learnt."""
    logits = torch.randn(1, 3, 7, requires_grad=True)
    empty = {"input_ids": torch.zeros(1, 3, dtype=torch.int64), "targets": torch.full((1, 3), IGNORED)}
    loss = batch_loss(logits, empty)
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and not logits.grad.any()
    needles = NEEDLES._replace(ratio=1.0, answer_only=True)
    made = trainer(tmp_path, replace(CONFIG, steps=4, log_steps=1), kind="ordered", needles=needles)
    made.fit()
    losses = [row["loss"] for row in rows(tmp_path) if "loss" in row]
    assert losses[0] == losses[2] == 0 < min(losses[1], losses[3])


# What a run leaves


def test_row_63_a_run_leaves_fixed_names(tmp_path: Path) -> None:
    made = trainer(tmp_path, replace(CONFIG, eval_steps=5), judged=True)
    made.fit()
    assert names(tmp_path) == {"best", "last", "checkpoints", "config.yaml", "metrics.jsonl"}
    assert names(tmp_path / "checkpoints") == {"checkpoint-6", "checkpoint-9", "checkpoint-10"}
    assert {"model.safetensors", "config.json"} <= names(tmp_path / "best") & names(tmp_path / "last")
    logged = rows(tmp_path)
    assert [row["step"] for row in logged if "loss" in row] == [4, 8]
    assert [row["step"] for row in logged if "eval_loss" in row] == [5, 10]
    assert {"eval_perplexity", "eval_accuracy"} <= set().union(*logged)


def test_row_65_curves_and_summary(tmp_path: Path) -> None:
    log = [{"step": step, "loss": 5 - step / 10} for step in range(1, 21)]
    log += [{"step": 10, "eval_loss": 4.5, "eval_perplexity": 90.0, "eval_accuracy": 0.25}]
    assert upper_limit([1.0, 999.0]) is None
    assert upper_limit([10.0] * 99 + [5000.0]) == pytest.approx(15.0)
    figure = curves(log)
    loss, perplexity = figure.axes
    assert [len(line.get_xdata()) for line in loss.lines] == [20, 1]
    assert loss.get_yscale() == perplexity.get_yscale() == "linear"
    assert perplexity.lines[1].get_ydata()[0] == pytest.approx(math.exp(4.5))
    # A run too short for its log has empty panels, and no warning.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curves([])
    wild = curves([{"step": s, "loss": 9.0 if s == 1 else 1.0} for s in range(1, 101)])
    assert wild.axes[1].get_ylim()[1] == pytest.approx(1.5 * math.e)
    page = summary(log, model={"type": "senri"}, data={"read": "austen", "stand_in": None}, facts={"seed": 3})
    for line in (
        "| type | senri |", "| read | austen |", "| stand in | none |", "| seed | 3 |",
        "| best validation loss | 4.5000 at step 10 |", "| last training loss | 3.0000 at step 20 |",
    ):  # fmt: skip
        assert line in page.splitlines()


@pytest.mark.parametrize("terminal", [True, False])
def test_bar_is_overwritten_on_a_terminal_and_lines_in_a_log(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: terminal)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(Progress, "LOG_SECONDS", 0.0)
    bar, state = Progress(Throughput()), TrainerState(max_steps=3, is_local_process_zero=True)
    args, control = TrainingArguments(), TrainerControl()
    bar.on_train_begin(args, state, control)
    for state.global_step in (1, 2, 3):
        bar.on_step_end(args, state, control)
        bar.on_log(args, state, control, {"loss": 2.0})
    bar.on_train_end(args, state, control)
    assert ("\r" in screen.getvalue()) == terminal
    if not terminal:
        lines = screen.getvalue().splitlines()
        assert all(line.startswith("training: ") for line in lines)
        assert [f"{step}/3 [" in "".join(lines) for step in (1, 2, 3)] == [True] * 3
        assert "loss=2.000" in lines[-1]


# Stopping and going on


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(
    ("kind", "accumulation"), [("packed", 1), ("packed", 2), ("ordered", 1), ("ordered", 2)]
)
def test_row_64_resumed_equals_uninterrupted(
    kind: str, accumulation: int, number: int, tmp_path: Path
) -> None:
    """Weights bit for bit, log line for line: data order, states, optimiser, losses not logged yet."""
    config = replace(CONFIG, accumulation=accumulation, eval_steps=5, memory_first=3)
    whole = trainer(tmp_path / "whole", config, kind=kind, judged=True)
    whole.fit()
    before = signal.getsignal(number)
    cut = trainer(tmp_path / "cut", config, Press(5, number), kind=kind, judged=True)
    cut.fit()
    assert (cut.interrupted, cut.state.global_step) == (number, 5)
    assert signal.getsignal(number) is before
    assert not (tmp_path / "cut" / "last").exists()
    resumed = trainer(tmp_path / "cut", config, kind=kind, judged=True, resume=True)
    assert resumed.fit(resume=True) == []
    assert_same_weights(weights(resumed), weights(whole))
    logged = [[row for row in rows(tmp_path / name) if "train_loss" not in row] for name in ("whole", "cut")]
    assert logged[0] == logged[1]


@pytest.mark.parametrize("kind", ["packed", "ordered"])
def test_batches_made_ahead_change_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that were made and not trained on when a run was cut off are made again."""
    whole = trainer(tmp_path / "whole", CONFIG, kind=kind)
    whole.fit()
    monkeypatch.setattr("newllm.training.trainer.loader", lambda feed, ahead: loader(feed, ahead=True))
    trainer(tmp_path / "cut", CONFIG, Press(5), kind=kind).fit()
    resumed = trainer(tmp_path / "cut", CONFIG, kind=kind, resume=True)
    resumed.fit(resume=True)
    assert_same_weights(weights(resumed), weights(whole))


def test_what_fails_ahead_fails_as_it_would_here() -> None:
    def batch(number: int) -> dict[str, Tensor]:
        if number == 2:
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no letter")
        return {"input_ids": torch.tensor([number])}

    feed = Feed(SimpleNamespace(batch=batch), 4, lambda: Place(0, 0, 1))
    made = iter(loader(feed, ahead=True))
    assert [int(next(made)["input_ids"]) for _ in range(2)] == [0, 1]
    with pytest.raises(UnicodeDecodeError, match="no letter"):
        next(made)


def test_a_signal_to_the_whole_group_leaves_a_checkpoint(tmp_path: Path) -> None:
    """As ``timeout`` sends it: the process that makes batches must not die of it."""
    script = f"""
import os, signal, subprocess, sys
from pathlib import Path
from newllm.training import trainer as module
from newllm.training.feed import loader
from tests.training_parts import Press, trainer
from tests.test_training_runs import CONFIG
module.loader = lambda feed, ahead: loader(feed, ahead=True)
class Group(Press):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step + 1 == self.step:
            subprocess.run(["kill", "-TERM", "--", f"-{{os.getpgid(0)}}"], start_new_session=True)
cut = trainer(Path({str(tmp_path / "cut")!r}), CONFIG, Group(5))
cut.fit()
print("stopped by", cut.interrupted, "at", cut.state.global_step)
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, start_new_session=True, timeout=120
    )
    assert f"stopped by {signal.SIGTERM.value}" in ran.stdout, ran.stderr
    assert names(tmp_path / "cut" / "checkpoints")


def test_row_64_random_numbers_of_the_model_go_on(tmp_path: Path) -> None:
    """Dropout of an ordinary model draws from the global generator."""

    def model() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=264, n_positions=32, resid_pdrop=0.3)
        )

    whole = trainer(tmp_path / "whole", CONFIG, model=model())
    whole.fit()
    trainer(tmp_path / "cut", CONFIG, Press(4), model=model()).fit()
    torch.manual_seed(99)
    resumed = trainer(tmp_path / "cut", CONFIG, model=model(), resume=True)
    resumed.fit(resume=True)
    assert_same_weights(weights(resumed), weights(whole))


def test_row_64_early_stopping_gives_the_best_weights_back(tmp_path: Path) -> None:
    """A rate at which nothing improves for long: the model ends as good as its best look."""
    config = replace(CONFIG, steps=60, lr=0.3, eval_steps=2, patience=3, schedule="constant", save_steps=0)
    made = trainer(tmp_path, config, judged=True)
    made.fit()
    looks = [(row["step"], row["eval_loss"]) for row in rows(tmp_path) if "eval_loss" in row]
    best = min(loss for _, loss in looks)
    assert made.state.global_step == looks[-1][0] < 60
    assert [loss for _, loss in looks[-3:] if loss <= best] == []
    assert made.judge()["loss"] == best
    last = trainer(
        tmp_path / "again", config, judged=True, model=type(made.model).from_pretrained(tmp_path / "last")
    )
    assert last.judge()["loss"] == looks[-1][1] > best


@pytest.mark.parametrize("change", [{"lr": 0.3, "patience": 2}, {"steps": 6}], ids=["early", "last step"])
def test_row_64_a_run_cut_off_after_its_last_step_is_not_trained_on(
    change: dict[str, Any], tmp_path: Path
) -> None:
    """Killed between its last checkpoint and its last words."""
    config = replace(
        CONFIG, **{"steps": 60, "eval_steps": 2, "save_steps": 2, "schedule": "constant", **change}
    )
    whole = trainer(tmp_path, config, judged=True)
    whole.fit()
    last = (tmp_path / "last" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "last")
    resumed = trainer(tmp_path, config, judged=True, resume=True)
    assert resumed.fit(resume=True) == []
    assert resumed.state.global_step == whole.state.global_step < 60
    assert (tmp_path / "last" / "model.safetensors").read_bytes() == last
    assert_same_weights(weights(resumed), weights(whole))


def test_row_64_half_precision(tmp_path: Path) -> None:
    made = trainer(tmp_path / "bf16", replace(CONFIG, bf16=True))
    made.fit()
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}
    full = trainer(tmp_path / "fp32", CONFIG)
    full.fit()
    first, second = (rows(tmp_path / name)[0]["loss"] for name in ("bf16", "fp32"))
    assert first != second and abs(first - second) < 64 * torch.finfo(torch.bfloat16).eps
    with pytest.raises(ValueError, match=r"train\.fp16 needs a GPU"):
        trainer(tmp_path / "fp16", replace(CONFIG, fp16=True))
    with pytest.raises(ValueError, match=r"train\.fsdp needs a GPU"):
        trainer(tmp_path / "fsdp", replace(CONFIG, fsdp=True))


def test_logs_that_cannot_be_written_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("newllm.training.arguments.installed", lambda name: False)
    with pytest.raises(
        RuntimeError, match="report_to tensorboard needs the package tensorboard: pip install"
    ):
        trainer(tmp_path, replace(CONFIG, report_to=["tensorboard"]))
    with pytest.raises(ValueError, match=r"must be some of tensorboard, trackio, wandb, got 'paper'"):
        trainer(tmp_path, replace(CONFIG, report_to=["paper"]))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_training_learns_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    compile_with, cut_for_ddp = torch.compile, []

    def compile_model(model: Any, **options: Any) -> Any:
        cut_for_ddp.append(torch._dynamo.config.optimize_ddp)
        return compile_with(model, **{**options, "backend": backend})

    monkeypatch.setattr(torch, "compile", compile_model)
    config = replace(CONFIG, steps=4, log_steps=1, save_steps=0)
    for name, compiled in (("plain", False), ("compiled", True)):
        trainer(tmp_path / name, replace(config, compile=compiled)).fit()
    plain, compiled = ([r["loss"] for r in rows(tmp_path / n) if "loss" in r] for n in ("plain", "compiled"))
    # Four steps of an optimiser carry on what rounding began.
    assert compiled == pytest.approx(plain, rel=1e4 * torch.finfo(torch.float32).eps)
    assert cut_for_ddp == [False] and torch._dynamo.config.optimize_ddp


# Groups and stages


def test_row_84_two_stages_and_the_multiplier(tmp_path: Path) -> None:
    model, _ = scratch_model(SMALL, seed=0)
    owners = tuple(f"{name}." for name in memory_owners(model))
    assert owners == ("model.layers.1.self_attn.",)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    halfway: dict[str, Tensor] = {}
    rates = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kw: Any) -> None:
            rates.append(kw["optimizer"].param_groups[0]["lr"])
            if state.global_step == 5:
                halfway.update({name: tensor.clone() for name, tensor in model.state_dict().items()})

    config = replace(
        CONFIG, warmup_steps=0, schedule="constant", memory_first=5, memory_first_lr=2e-2,
        memory_layer_multiplier=3.0,
    )  # fmt: skip
    made = trainer(tmp_path, config, Look(), model=model)
    made.fit()
    moved = {name for name, tensor in halfway.items() if not torch.equal(tensor, start[name])}
    assert moved and all(name.startswith(owners) for name in moved)
    later = {name for name, tensor in weights(made).items() if not torch.equal(tensor, halfway[name])}
    assert any(not name.startswith(owners) for name in later)
    assert rates == pytest.approx([2e-2] * 4 + [1e-2] * 6)
    groups = {g["name"]: g["lr"] for g in parameter_groups(model, 1e-2, memory_layer_multiplier=3.0)}
    assert groups["memory_layer_decay"] == 3e-2
    plain, _ = scratch_model(replace(SMALL, memory_layers=[]), seed=0)
    with pytest.raises(ValueError, match=r"train\.memory_first needs a model with a memory"):
        trainer(tmp_path, config, model=plain)
