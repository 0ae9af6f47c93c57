"""The one loss and the one measurement of next-token prediction, for training and evaluation alike."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from newllm.data.streams import IGNORED

_MAX_EXPONENT = 700.0


def targets_of(batch: dict[str, Tensor]) -> Tensor:
    """What follows each token, ``[B, T]``: the batch's own ``targets``, or its ids moved by one."""
    if "targets" in batch:
        return batch["targets"]
    return F.pad(batch["input_ids"][:, 1:], (0, 1), value=IGNORED)


def batch_loss(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy in nats of ``logits [B, T, V]``: the mean over the targets that count, 0 without any.

    With ``loss_weight [B, T]``, by the token that is predicted, or ``target_weight [B, T]``, by the one that
    predicts, the weighted sum instead.
    """
    targets = targets_of(batch)
    weight = target_weight(batch)
    logits, targets = logits.flatten(0, 1).float(), targets.flatten()
    if weight is None:
        # Of a needle that is learnt from its answer alone, most blocks hold no target.
        whole = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        return whole / (targets != IGNORED).sum().clamp(min=1)
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    return (losses * weight.flatten()).sum()


def target_weight(batch: dict[str, Tensor]) -> Tensor | None:
    """What each token's prediction counts, ``[B, T]``; None for a mean."""
    if "loss_weight" in batch:
        return F.pad(batch["loss_weight"][:, 1:], (0, 1))
    return batch.get("target_weight")


def counts(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Sum of losses, right guesses and number of targets, ``[3]`` float64, from ``logits [B, T, V]``."""
    targets = targets_of(batch)
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    valid = targets != IGNORED
    right = ((logits.argmax(-1) == targets) & valid).sum()
    return torch.stack([losses.double(), right.double(), valid.sum().double()])


def metrics(sums: Any) -> dict[str, float]:
    """Loss, perplexity and accuracy from summed :func:`counts`."""
    loss, right, tokens = (float(value) for value in sums)
    if tokens == 0:
        raise ValueError("validation holds no token to predict")
    mean = loss / tokens
    perplexity = math.exp(mean) if mean < _MAX_EXPONENT else math.inf
    return {"loss": mean, "perplexity": perplexity, "accuracy": right / tokens}
