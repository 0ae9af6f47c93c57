"""ContextBlock and TokenBlock trained together by the next token, to compare with frozen contexts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from newllm.models import ContextLMForCausalLM
from newllm.training.phase_cache import TokenCache
from newllm.training.phase_config import Phase2Config
from newllm.training.phase_two import PhaseTwoResult, evaluate, is_stale, perplexity, validation_perplexity
from newllm.training.two_phase import Stream


def train_end_to_end(
    model: ContextLMForCausalLM,
    train: Stream,
    validation: Stream,
    config: Phase2Config,
    *,
    length: int = 64,
    warm_up: int = 32,
    log: Callable[[dict[str, Any]], None] | None = None,
) -> PhaseTwoResult:
    """Train all of ``model`` but, if so configured, its embedding, with gradients through the contexts.

    A batch has as many positions as phase 2's, in rows of ``length`` tokens of the stream, each behind
    ``warm_up`` tokens that only bring its context up to date. Judged and stopped as phase 2 is, on exact
    contexts; the best epoch's weights come back.

    Raises ``ValueError`` for a stream shorter than a row, ``RuntimeError`` for a loss that is not finite.
    """
    if len(train.ids) <= warm_up + length:
        raise ValueError(f"train must hold more than {warm_up + length} tokens, got {len(train.ids)}")
    trainable = []
    for name, parameter in model.named_parameters():
        frozen = config.freeze_embedding and ("embed" in name or "lm_head" in name)
        parameter.requires_grad_(not frozen)
        trainable += [] if frozen else [parameter]
    optimizer = torch.optim.AdamW(trainable, config.learning_rate, weight_decay=config.weight_decay)
    generator = torch.Generator().manual_seed(config.seed)
    rows = max(1, (config.batch_size or 512) // length)
    history: list[dict[str, Any]] = []
    best: list[torch.Tensor] = []
    for epoch in range(1, config.epochs + 1):
        model.train()
        losses = []
        starts = torch.arange(0, len(train.ids) - warm_up - length, length)
        for chosen in starts[torch.randperm(len(starts), generator=generator)].split(rows):
            places = chosen[:, None] + torch.arange(warm_up + length + 1)
            ids = train.ids[places.to(train.ids.device)].to(model.device)
            logits = model(ids[:, :-1], use_cache=False, logits_to_keep=length).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, -length:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, config.gradient_clip)
            optimizer.step()
            losses.append(loss.detach())
        mean = torch.stack(losses).double().mean().item()
        if mean != mean:
            raise RuntimeError(f"a loss of epoch {epoch} is not finite")
        row = {"epoch": epoch, "train_loss": mean, "train_perplexity": perplexity(mean)}
        figures = evaluate(model, TokenCache(model, validation.ids))
        history.append(row | {f"validation_{name}": value for name, value in figures.items()})
        if log is not None:
            log(history[-1])
        if history[-1] is min(history, key=validation_perplexity):
            best = [parameter.detach().clone() for parameter in trainable]
        if is_stale(history, config):
            break
    with torch.no_grad():
        for parameter, kept in zip(trainable, best, strict=True):
            parameter.copy_(kept)
    found = min(history, key=validation_perplexity)
    loss_value, value, accuracy = (found[f"validation_{key}"] for key in ("loss", "perplexity", "accuracy"))
    stopped = "patience" if is_stale(history, config) else "epochs"
    return PhaseTwoResult(found["epoch"], loss_value, value, accuracy, stopped, history)
