"""Controls beside a model: the same weights, its windows alone, its memories emptied or cleaned."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from newllm.models.senri import SenriForCausalLM
from newllm.modules import InfiniAttention
from newllm.modules.cache import cache_layer
from newllm.modules.memory_health import clean


def remove_memories(model: SenriForCausalLM) -> None:
    """Take the memories out of ``model``, which then sees what its stacked windows reach and no more."""
    for module in model.modules():
        if isinstance(module, InfiniAttention):
            module.memory_gate = module.memory_feature = module.memory_decay = None
    model.config.memory_layers = []


def zero_memories(cache: Cache) -> None:
    """Empty the memories of a stream, whose windows stay as they are."""
    _change(cache, lambda matrix, norm: (torch.zeros_like(matrix), torch.zeros_like(norm)))


def clean_memories(cache: Cache, energy_threshold: float = 0.95) -> None:
    """Drop the weakest singular directions of a stream's memories, see ``newllm.modules.memory_health``."""

    def cleaned(matrix: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        return clean(matrix, norm, energy_threshold=energy_threshold, max_rank=None, eps=1e-6)[:2]

    _change(cache, cleaned)


def _change(cache: Cache, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    for number in range(len(cache.layers)):
        layer = cache_layer(cache, number)
        state = layer.state
        if state is not None and state.matrix is not None and state.norm is not None:
            matrix, norm = change(state.matrix, state.norm)
            layer.state = state._replace(matrix=matrix, norm=norm)
