"""A context language model with more numbers in its context."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from newllm.models.context_lm.configuration import ContextLMConfig
from newllm.models.context_lm.modeling import ContextLMForCausalLM


def expand_context(
    model: ContextLMForCausalLM, context_dim: int, *, freeze_base: bool = False
) -> ContextLMForCausalLM:
    """A copy of a recurrent ``model`` whose contexts have ``context_dim`` numbers.

    New rows and columns are zero, the layer norm's new weights one. With ``freeze_base`` the gradients of all
    old entries of the cell's weights are zeroed, so that only new ones (and the embedding and head) learn.

    Raises:
        ValueError: for another kind of model, or fewer numbers than it has.
    """
    config = model.config
    if config.cell == "context" or context_dim < config.context_dim:
        raise ValueError(
            f"context_dim must be at least that of a recurrent model ({config.context_dim}, cell "
            f"{config.cell!r}), got {context_dim}"
        )
    fields = {**config.to_dict(), "context_dim": context_dim, "reconstruction_weight": 0.0}
    wider = ContextLMForCausalLM(ContextLMConfig(**fields)).to(model.device, model.dtype)
    wider.train(model.training)
    old = model.state_dict()
    with torch.no_grad():
        for name, parameter in wider.named_parameters():
            _widen(parameter, old[name], fill=float(name.endswith("norm.weight")))
            if freeze_base and ".recurrent." in name:
                parameter.register_hook(partial(_without_base, shape=old[name].shape))
    return wider


def _widen(parameter: Tensor, old: Tensor, fill: float) -> None:
    """Put ``old`` into the first entries of ``parameter`` along every dimension."""
    parameter.fill_(fill)
    parameter[tuple(slice(size) for size in old.shape)] = old


def _without_base(gradient: Tensor, shape: torch.Size) -> Tensor:
    gradient = gradient.clone()
    gradient[tuple(slice(size) for size in shape)] = 0
    return gradient
