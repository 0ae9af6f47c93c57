"""Phase 2: next tokens from contexts that stay as they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from newllm.training.phase_cache import PhaseCache
from newllm.training.phase_checkpoints import PhaseCheckpoints
from newllm.training.phase_config import Phase2Config

_GIB = 2**30
_START_PER_GB, _START_SHARE, _SAFETY, _USABLE = 500, 0.8, 0.5, 0.5
# Logits, their gradient and what a softmax needs beside them, in copies of the logits.
_COPIES = 3.5
_LEAST, _MOST, _ON_CPU = 256, 16384, 512


class PhaseTwoResult(NamedTuple):
    """The best epoch's figures, why the training ``stopped``, and a row per epoch."""

    best_epoch: int
    loss: float
    perplexity: float
    accuracy: float
    stopped: str
    history: list[dict[str, Any]]


def batch_from_memory(total_gb: float, allocated_gb: float, vocabulary: int) -> int:
    """Positions of a batch that fit beside what is allocated (not reserved) on a device; 0 GB: a CPU's 512.

    Half of half the free memory, by 3.5 copies of float32 logits of ``vocabulary`` a position, between 256
    and 16384.
    """
    if total_gb <= 0:
        return _ON_CPU
    start = int(total_gb * _START_PER_GB * _START_SHARE)
    mb_each = vocabulary * 4 / 2**20 * _COPIES
    fits = int((total_gb - allocated_gb) * 1024 * _SAFETY * _USABLE / mb_each)
    return max(_LEAST, min(fits, start, _MOST))


def free_batch(model: Any) -> int:
    """``batch_from_memory`` of the device that ``model`` is on."""
    if model.device.type == "cpu":
        return _ON_CPU
    total = torch.cuda.get_device_properties(model.device).total_memory / _GIB
    return batch_from_memory(total, torch.cuda.memory_allocated(model.device) / _GIB, model.config.vocab_size)


def train_tokens(
    model: Any,
    train: PhaseCache,
    validation: PhaseCache,
    config: Phase2Config,
    *,
    log: Callable[[dict[str, Any]], None] | None = None,
    keep: PhaseCheckpoints | None = None,
    state: dict[str, Any] | None = None,
) -> PhaseTwoResult:
    """Train all of ``model`` but its context blocks and, if so configured, its embedding (and tied head).

    The model comes back with the weights of its best epoch, whatever came after. ``keep`` is told of every
    epoch; ``state`` is what it held of a training that was cut off, to go on from.

    Raises:
        RuntimeError: for a loss that is not finite, with its epoch and batch.
    """
    trainable = phase_two_parameters(model, config)
    optimizer = torch.optim.AdamW(
        trainable,
        config.learning_rate,
        weight_decay=config.weight_decay,
        fused=model.device.type == "cuda" or None,
    )
    size = config.batch_size or free_batch(model)
    generator = torch.Generator().manual_seed(config.seed)
    history: list[dict[str, Any]] = []
    weights: list[Tensor] = []
    if state is not None:
        with torch.no_grad():
            for parameter, value in zip(trainable, state["weights"], strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        history, weights = state["history"], [value.to(model.device) for value in state["best"]]
    stopped = "patience" if is_stale(history, config) else "epochs"
    for epoch in range(len(history) + 1, config.epochs + 1):
        if stopped == "patience":
            break
        loss = _epoch(model, train, optimizer, trainable, size, config, generator, epoch)
        row = {"epoch": epoch, "train_loss": loss, "train_perplexity": perplexity(loss)}
        row |= {f"validation_{name}": value for name, value in evaluate(model, validation, size).items()}
        history.append(row)
        if log is not None:
            log(row)
        if row is min(history, key=validation_perplexity):
            weights = [parameter.detach().clone() for parameter in trainable]
        if is_stale(history, config):
            stopped = "patience"
        if keep is not None:
            now = {"best": weights, "history": history, "generator": generator.get_state()}
            keep.reached(partial(_held, trainable, optimizer, now))
    best = min(history, key=validation_perplexity)
    with torch.no_grad():
        for parameter, kept in zip(trainable, weights, strict=True):
            parameter.copy_(kept)
    loss, found, accuracy = (best[f"validation_{name}"] for name in ("loss", "perplexity", "accuracy"))
    return PhaseTwoResult(best["epoch"], loss, found, accuracy, stopped, history)


def validation_perplexity(row: dict[str, Any]) -> float:
    """By which rows of a history are judged."""
    value: float = row["validation_perplexity"]
    return value


def is_stale(history: list[dict[str, Any]], config: Phase2Config) -> bool:
    """Whether the last ``patience`` epochs brought no improvement that counts."""
    reference, stale = math.inf, 0
    for found in map(validation_perplexity, history):
        improved = found <= reference - config.min_improvement
        reference, stale = (found, 0) if improved else (reference, stale + 1)
    return stale >= config.patience


def _held(trainable: list[Tensor], optimizer: torch.optim.Optimizer, now: dict[str, Any]) -> dict[str, Any]:
    """What goes on from here needs."""
    weights = [parameter.detach() for parameter in trainable]
    return {"weights": weights, "optimizer": optimizer.state_dict(), **now}


def phase_two_parameters(model: Any, config: Phase2Config) -> list[Tensor]:
    """The parameters that phase 2 trains; all others no longer ask for gradients."""
    frozen = ["context_block"]
    if config.freeze_embedding:
        frozen += ["embed_tokens", "embed_norm"]
        frozen += ["lm_head"] if model.config.tie_word_embeddings else []
    chosen = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
        if parameter.requires_grad:
            chosen.append(parameter)
    return chosen


def _epoch(
    model: Any,
    cache: PhaseCache,
    optimizer: torch.optim.Optimizer,
    trainable: list[Tensor],
    size: int,
    config: Phase2Config,
    generator: torch.Generator,
    epoch: int,
) -> float:
    """One pass in random order: the mean loss on the way."""
    model.train()
    order = torch.randperm(len(cache.ids) - 1, generator=generator).to(cache.ids.device)
    losses, sizes = [], []
    for positions in order.split(size):
        logits = model.lm_head(cache.features(model, positions))
        loss = F.cross_entropy(logits.float(), cache.ids[positions + 1].to(logits.device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, config.gradient_clip)
        optimizer.step()
        losses.append(loss.detach())
        sizes.append(len(positions))
    # Looking at every loss as it comes would wait for the device as often.
    found = torch.stack(losses).double().cpu()
    wrong = torch.nonzero(~found.isfinite())
    if len(wrong):
        raise RuntimeError(f"the loss of epoch {epoch}, batch {int(wrong[0])} is {found[wrong[0]].item()}")
    return float((found * torch.tensor(sizes)).sum()) / len(order)


@torch.no_grad()
def evaluate(model: Any, cache: PhaseCache, size: int = 512) -> dict[str, float]:
    """Loss, perplexity and accuracy of the next token over all positions of ``cache``."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=model.device)
    for positions in torch.arange(len(cache.ids) - 1, device=cache.ids.device).split(size):
        logits = model.lm_head(cache.features(model, positions)).float()
        targets = cache.ids[positions + 1].to(logits.device)
        right = (logits.argmax(-1) == targets).sum()
        sums += torch.stack([F.cross_entropy(logits, targets, reduction="sum"), right]).double()
    loss, accuracy = (sums / (len(cache.ids) - 1)).tolist()
    return {"loss": loss, "perplexity": perplexity(loss), "accuracy": accuracy}


def perplexity(loss: float) -> float:
    """exp(loss), of no more than 20 nats."""
    return math.exp(min(loss, 20.0))
