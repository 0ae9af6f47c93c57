"""What a training run is made of; one schema for YAML presets, flags and code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


def check_least(config: object, group: str, bounds: Mapping[str, float]) -> None:
    """Raises ``ValueError`` for a value of ``group`` below its bound; null is left to whoever reads it."""
    for name, least in bounds.items():
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ValueError(f"{group}.{name} must be at least {least}, got {value}")


@dataclass
class ModelConfig:
    """A byte-level Senri model made from scratch.

    Args:
        hidden_size: width of the hidden states.
        intermediate_size: width of the MLPs.
        layers: depth.
        heads: query heads.
        kv_heads: key/value heads (null: as many as query heads).
        window: keys that a query sees.
        segment: tokens folded into the memory at once (null: the window).
        memory_layers: layers with a memory (null: the default, []: none).
        gate: tanh starts shut, so that the window learns first.
        rule: how the memory is written.
        feature: elu1 with feature_scale and feature_bias at the start, or dpfp of feature_order.
        feature_scale: how much the features contrast keys (1: the paper's).
        feature_bias: how sparse they are (0: the paper's).
        feature_order: of dpfp, whose features are 2 * order times as wide.
        write_gate: learn how much each token counts in a memory.
        memory_decay: share of itself that a memory keeps at first when a segment is written (null: all).
        short_conv: taps of a causal convolution over q and k (null: none).
        share_memory: one memory for all layers that have one (linear rule).
    """

    hidden_size: int = 96
    intermediate_size: int = 256
    layers: int = 2
    heads: int = 2
    kv_heads: int | None = None
    window: int = 16
    segment: int | None = None
    memory_layers: list[int] | None = None
    gate: Literal["sigmoid", "tanh"] = "tanh"
    rule: Literal["linear", "delta", "gamma"] = "linear"
    feature: Literal["elu1", "dpfp"] = "elu1"
    feature_scale: float = 4.0
    feature_bias: float = -4.0
    feature_order: int = 1
    write_gate: bool = False
    memory_decay: float | None = None
    short_conv: int | None = None
    share_memory: bool = False


@dataclass(kw_only=True)
class ConvertConfig:
    """The window and the memory that a Llama-family checkpoint is given.

    Args:
        window: keys that a query sees.
        segment: tokens folded into the memory at once (null: the window).
        memory_layers: layers with a memory (null: two of them, at thirds of the depth).
        gate: ``tanh`` starts shut and equals the base, ``sigmoid`` is the paper's and starts half open.
        rule: how the memory is written.
        write_gate: learn how much each token counts in a memory.
        memory_decay: share of itself that a memory keeps at first when a segment is written (null: all).
        short_conv: taps of a causal convolution over q and k, the identity at the start (null: none).
        share_memory: one memory for all layers that have one (linear rule).
    """

    window: int = 1024
    segment: int | None = None
    memory_layers: list[int] | None = None
    gate: Literal["tanh", "sigmoid"] = "tanh"
    rule: Literal["linear", "delta"] = "linear"
    write_gate: bool = False
    memory_decay: float | None = None
    short_conv: int | None = None
    share_memory: bool = False

    def __post_init__(self) -> None:
        """Find before any weights are read what would be found behind them.

        Raises:
            ValueError: for sizes that do not fit.
        """
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        if self.segment is not None and not 1 <= self.segment <= self.window:
            raise ValueError(f"segment must be between 1 and window ({self.window}), got {self.segment}")


@dataclass
class TaskConfig:
    """Pieces of text with a key hidden in them and asked for at their end.

    Args:
        suites: what is asked, in equal shares of what fits a length: passkey, or suites in words (see newllm
            eval MODEL --suite).
        lengths: tokens of a sample, in equal shares of the training.
        tokens_per_step: most tokens of a batch.
        max_rows: most samples of a batch.
        needle_share: share of the samples that hide a key; the others are text alone.
        key_length: digits of a key.
        edge: share of keys at the very first token.
        straddle: share of keys across a segment border.
        near: share of keys within two segments of the question, the nearer the likelier.
        shift: let up to a segment of text follow the answers, so that questions stand anywhere in theirs.
        text_weight: weight of the text's own loss beside that of the answers, 1.
        dilution: most that a segment without the key may count, 1 for no dilution (linear rule).
        questions: most that a sample asks, one after the other, where its suite knows of more (qa1).
    """

    suites: list[str] = field(default_factory=lambda: ["passkey"])
    lengths: list[int] = field(default_factory=lambda: [16, 32, 64, 96])
    tokens_per_step: int = 4096
    max_rows: int = 64
    needle_share: float = 1.0
    key_length: int = 3
    edge: float = 0.2
    straddle: float = 0.3
    near: float = 0.0
    shift: bool = False
    text_weight: float = 0.1
    dilution: float = 1024.0
    questions: int = 1

    def __post_init__(self) -> None:
        """Refuse what would be found out only with a batch at hand.

        Raises:
            ValueError: for values out of range.
        """
        for name in ("suites", "lengths"):
            if not getattr(self, name):
                raise ValueError(f"task.{name} must name at least one, got []")
        if min(self.lengths) < 1:
            raise ValueError(f"task.lengths must be at least 1, got {self.lengths}")
        if not 0 <= self.needle_share <= 1:
            raise ValueError(f"task.needle_share must be between 0 and 1, got {self.needle_share}")
        at_least = {"tokens_per_step": max(self.lengths), "max_rows": 1, "key_length": 1, "questions": 1}
        check_least(self, "task", {**at_least, "text_weight": 0, "dilution": 1})
        shares = self.edge, self.straddle, self.near
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(
                f"task.edge, task.straddle and task.near must be shares that sum to at most 1, got {shares}"
            )


@dataclass
class SourceConfig:
    """Which documents are read.

    Args:
        limit: training documents at most (null: all, or the dataset's usual number).
        subset: a folder of the dataset, such as ``helpful-base`` of hh-rlhf.
        revision: commit, tag or branch of a dataset of the hub (null: its newest); nothing stands in for it.
        column: the text's column in JSONL files.
        validation: fixed, or a text or JSONL file, which is written if it does not exist.
        mirror: a folder of datasets as owner/name, read in place of the hub.
        shuffle: seed that orders the documents (null: as they come).
    """

    limit: int | None = None
    subset: str | None = None
    revision: str | None = None
    column: str = "text"
    validation: str = "fixed"
    mirror: str | None = None
    shuffle: int | None = None


@dataclass
class StreamConfig:
    """What batches are made of.

    Args:
        kind: packed random blocks, ordered documents with a state that is carried, or needles: the curriculum
            of task.
        length: tokens of a row.
        rows: rows of a batch on one device (null: the profile's tokens, by length).
        needles: share of rows, or of ordered documents, that hide a key and ask for it.
        answer_only: needles are learnt from their answers alone.
        key_length: digits of a key.
        bptt_segments: segments that gradients flow back through the memory in a batch (null: all).
    """

    kind: Literal["packed", "ordered", "needles"] = "packed"
    length: int = 256
    rows: int | None = None
    needles: float = 0.01
    answer_only: bool = False
    key_length: int = 3
    bptt_segments: int | None = None

    def __post_init__(self) -> None:
        """Raises ``ValueError`` for values out of range."""
        check_least(self, "stream", {"length": 1, "rows": 1, "key_length": 1, "bptt_segments": 1})


@dataclass
class TrainConfig:
    """How a model is trained.

    Args:
        steps: optimiser steps.
        lr: peak learning rate (null: the profile's, by the size of the model).
        warmup_steps: steps in which the rate rises.
        schedule: how it falls to a tenth.
        memory_multiplier: factor of the rate of gates and feature parameters.
        freeze_features: feature parameters stay as they begin.
        memory_layer_multiplier: factor of the rate of attention layers with a memory.
        memory_first: steps in which only the layers with a memory learn.
        memory_first_lr: peak rate of those steps (null: lr).
        weight_decay: decay of matrices.
        max_grad_norm: gradients are clipped to this norm (0: not at all).
        clip_schedule: pairs of a share of the training and the norm until then, before max_grad_norm.
        accumulation: batches of a step.
        bf16: autocast to bfloat16.
        fp16: autocast to float16 with a loss scale, on a GPU.
        checkpointing: recompute activations in the backward pass.
        compile: torch.compile the model.
        fsdp: shard the model over the processes of a launch, on GPUs, instead of copying it.
        sequence_ranks: processes of a launch that share each sequence, in slices; must divide their number.
        eval_steps: steps between looks at the validation text, 0 for none.
        eval_batches: batches of such a look at most.
        patience: looks without improvement after which the training ends (null: never).
        min_delta: what counts as an improvement of the loss.
        save_steps: steps between checkpoints, 0 for none before the end.
        keep: checkpoints that stay.
        log_steps: steps between log lines.
        report_to: further logs: tensorboard, trackio, wandb.
        seed: seed of weights and data.
    """

    steps: int = 640
    lr: float | None = 2e-3
    warmup_steps: int = 50
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    memory_multiplier: float = 10.0
    freeze_features: bool = False
    memory_layer_multiplier: float = 1.0
    memory_first: int = 0
    memory_first_lr: float | None = None
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    clip_schedule: list[list[float]] = field(default_factory=list)
    accumulation: int = 1
    bf16: bool = False
    fp16: bool = False
    checkpointing: bool = False
    compile: bool = False
    fsdp: bool = False
    sequence_ranks: int = 1
    eval_steps: int = 0
    eval_batches: int = 32
    patience: int | None = None
    min_delta: float = 0.0
    save_steps: int = 0
    keep: int = 3
    log_steps: int = 20
    report_to: list[str] = field(default_factory=list)
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what would be found out only later.

        Raises:
            ValueError: for values out of range.
        """
        at_least = {
            "steps": 1,
            "sequence_ranks": 1,
            "accumulation": 1,
            "keep": 1,
            "log_steps": 1,
            "eval_batches": 1,
        }
        at_least |= {"warmup_steps": 0, "memory_first": 0, "eval_steps": 0, "save_steps": 0}
        at_least |= {"weight_decay": 0, "max_grad_norm": 0, "min_delta": 0}
        at_least |= {"memory_multiplier": 0, "memory_layer_multiplier": 0}
        check_least(self, "train", at_least)
        for name in ("lr", "memory_first_lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"train.{name} must be above 0, got {value}")
        if self.memory_first >= self.steps:
            raise ValueError(
                f"train.memory_first must be below train.steps ({self.steps}), got {self.memory_first}"
            )
        if self.bf16 and self.fp16:
            raise ValueError("train.bf16 and train.fp16 must not both be set")
        if self.patience is not None and (not self.eval_steps or self.patience < 1):
            raise ValueError("train.patience must be at least 1 and needs train.eval_steps above 0")
        if any(len(pair) != 2 or min(pair) < 0 for pair in self.clip_schedule):
            raise ValueError(f"train.clip_schedule must hold pairs [share, norm], got {self.clip_schedule}")


@dataclass
class Recipe:
    """A whole training run from scratch.

    Args:
        model: the model.
        stream: what batches are made of.
        task: the curriculum of needles.
        train: how it is trained.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
