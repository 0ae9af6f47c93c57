"""The controls beside a model with memory: the same weights, its windows alone or its memories emptied."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from newllm.models.senri import SenriForCausalLM
from newllm.modules import InfiniAttention
from newllm.modules.cache import cache_layer


def remove_memories(model: SenriForCausalLM) -> None:
    """Take the memories out of ``model``, which then sees what its stacked windows reach and no more."""
    for module in model.modules():
        if isinstance(module, InfiniAttention):
            module.memory_gate = module.memory_feature = None
    model.config.memory_layers = []


def zero_memories(cache: Cache) -> None:
    """Empty the memories of a stream, whose windows stay as they are."""
    for number in range(len(cache.layers)):
        layer = cache_layer(cache, number)
        state = layer.state
        if state is not None and state.matrix is not None and state.norm is not None:
            layer.state = state._replace(
                matrix=torch.zeros_like(state.matrix), norm=torch.zeros_like(state.norm)
            )
