"""What a training run of Senri is made of; one schema for YAML presets, flags and code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


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


@dataclass
class TaskConfig:
    """Pieces of text with a key hidden in them and asked for at their end.

    Args:
        lengths: tokens of a sample, in equal shares of the training.
        tokens_per_step: most tokens of a batch.
        max_rows: most samples of a batch.
        needle_share: share of the samples that hide a key; the others are text alone.
        key_length: digits of a key.
        edge: share of keys at the very first token.
        straddle: share of keys across a segment border.
        text_weight: weight of the text's own loss beside that of the answers, 1.
        dilution: most that a segment without the key may count, 1 for no dilution (linear rule).
    """

    lengths: list[int] = field(default_factory=lambda: [16, 32, 64, 96])
    tokens_per_step: int = 4096
    max_rows: int = 64
    needle_share: float = 1.0
    key_length: int = 3
    edge: float = 0.2
    straddle: float = 0.3
    text_weight: float = 0.1
    dilution: float = 1024.0


@dataclass
class TrainConfig:
    """How a model is trained.

    Args:
        steps: optimiser steps.
        lr: peak learning rate; it falls to a tenth along a cosine.
        warmup_steps: steps in which the rate rises.
        memory_multiplier: factor of the rate of gates and feature parameters.
        memory_layer_multiplier: factor of the rate of attention layers with a memory.
        weight_decay: decay of matrices.
        max_grad_norm: gradients are clipped to this norm.
        accumulation: batches of a step.
        bf16: autocast to bfloat16.
        checkpointing: recompute activations in the backward pass.
        save_steps: steps between checkpoints, 0 for none before the end.
        log_steps: steps between log lines.
        seed: seed of weights and data.
    """

    steps: int = 640
    lr: float = 2e-3
    warmup_steps: int = 50
    memory_multiplier: float = 10.0
    memory_layer_multiplier: float = 1.0
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    accumulation: int = 1
    bf16: bool = False
    checkpointing: bool = False
    save_steps: int = 0
    log_steps: int = 20
    seed: int = 0


@dataclass
class Recipe:
    """A whole training run from scratch.

    Args:
        model: the model.
        task: what it is trained on.
        train: how it is trained.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
