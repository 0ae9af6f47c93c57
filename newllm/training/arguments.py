"""From our training options to the arguments of transformers' Trainer."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainingArguments

from newllm.backend import installed
from newllm.runs import Run
from newllm.training.config import TrainConfig

# Further logs; the packages are called the same.
REPORTERS = ("tensorboard", "trackio", "wandb")


def training_arguments(
    config: TrainConfig, run: Run, model: nn.Module, *, evaluates: bool = False
) -> TrainingArguments:
    """The settings of transformers' Trainer that ``config`` stands for.

    Raises:
        ValueError: for fp16 or fsdp on a CPU, or a log of no known name.
        RuntimeError: for a log whose package is not installed.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    for name in ("fp16", "fsdp"):
        if on_cpu and getattr(config, name):
            raise ValueError(f"train.{name} needs a GPU")
    for name in config.report_to:
        if name not in REPORTERS:
            raise ValueError(f"train.report_to must be some of {', '.join(REPORTERS)}, got {name!r}")
        if not installed(name):
            raise RuntimeError(f"train.report_to {name} needs the package {name}: pip install {name}")
    sharding: dict[str, Any] = {}
    if config.fsdp:
        blocks = list(getattr(model, "_no_split_modules", None) or [])
        sharding = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": blocks}}
    return TrainingArguments(
        output_dir=str(run.out / "checkpoints"),
        max_steps=config.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.lr or 0.0,
        max_grad_norm=config.max_grad_norm,
        bf16=config.bf16,
        fp16=config.fp16,
        torch_compile=config.compile,
        logging_steps=config.log_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluates and config.eval_steps else "no",
        eval_steps=config.eval_steps or None,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        seed=config.seed,
        report_to=config.report_to or "none",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=on_cpu,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        dataloader_pin_memory=False,
        ignore_data_skip=True,
        **sharding,
    )
