"""Gated context models in one phase: next tokens and, where the model has a decoder, reconstruction.

B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from newllm.models import ContextLMForCausalLM
from newllm.training.phase_two import perplexity

_TOLD = ("token_loss", "reconstruction_loss", "reconstruction_accuracy", "context_change", "accuracy")
METRICS = ("loss", *_TOLD)


def batch_metrics(model: ContextLMForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    """What is said of a batch ``ids [B, T]``, in training and in evaluation; ``loss`` has gradients.

    ``reconstruction_accuracy`` is the mean cosine of the decoder's guess with its target, ``context_change``
    the mean norm of what a token changes; without a decoder the former are 0. Every id counts, 0 too.
    """
    outputs = model(ids, labels=ids, use_cache=False)
    zero = outputs.token_loss.detach().new_zeros(())
    told = {"reconstruction_loss": zero, "reconstruction_accuracy": zero}
    with torch.no_grad():
        if outputs.reconstruction is not None:
            told["reconstruction_loss"] = outputs.reconstruction_loss.detach()
            cosine = F.cosine_similarity(outputs.reconstruction, outputs.target, dim=-1)
            told["reconstruction_accuracy"] = cosine.mean()
        told["token_loss"] = outputs.token_loss.detach()
        told["context_change"] = outputs.contexts.diff(dim=1).norm(dim=-1).mean()
        told["accuracy"] = (outputs.logits[:, :-1].argmax(-1) == ids[:, 1:]).float().mean()
    return {"loss": outputs.loss, **told}


def evaluate_batches(model: ContextLMForCausalLM, batches: Sequence[Tensor]) -> dict[str, float]:
    """Means of :func:`batch_metrics` over ``batches``, weighted by their tokens, and the perplexity."""
    model.eval()
    with torch.no_grad():
        return _means([(ids.numel(), batch_metrics(model, ids.to(model.device))) for ids in batches])


def train_epoch(
    model: ContextLMForCausalLM,
    batches: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    gradient_clip: float = 1.0,
    log: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, float]:
    """One pass with a clipped step for each of ``batches [B, T]``; means on the way.

    Raises ``RuntimeError`` for a loss that is not finite, with its batch.
    """
    model.train()
    seen = []
    for number, ids in enumerate(batches):
        found = batch_metrics(model, ids.to(model.device))
        if not torch.isfinite(found["loss"]):
            raise RuntimeError(f"the loss of batch {number} is {found['loss'].item()}")
        optimizer.zero_grad()
        found["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), gradient_clip)
        optimizer.step()
        seen.append((ids.numel(), {name: value.detach() for name, value in found.items()}))
    means = _means(seen)
    if log is not None:
        log(means)
    return means


def _means(seen: Sequence[tuple[int, dict[str, Tensor]]]) -> dict[str, float]:
    whole = sum(count for count, _ in seen)
    means = {
        name: sum(count * found[name].double().item() for count, found in seen) / whole for name in METRICS
    }
    return {**means, "perplexity": perplexity(means["token_loss"])}
