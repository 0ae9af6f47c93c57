"""What every language model makes of its hidden states."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def logits_and_loss(
    model: Any, hidden_states: Tensor, labels: Tensor | None, logits_to_keep: int | Tensor = 0, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Logits ``[B, K, vocab_size]`` of ``hidden_states [B, T, D]`` by the head of ``model``, and their loss.

    ``logits_to_keep`` says of how many tokens, the last ones (0: all), or at which places. Without ``labels``
    there is no loss; ``kwargs`` go to it.
    """
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    logits = model.lm_head(hidden_states[:, kept])
    if labels is None:
        return logits, None
    return logits, model.loss_function(logits, labels, vocab_size=model.config.vocab_size, **kwargs)
