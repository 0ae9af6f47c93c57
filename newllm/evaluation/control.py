"""The control beside a model with memory: the same weights, its windows alone."""

from __future__ import annotations

from newllm.models.senri import SenriForCausalLM
from newllm.modules import InfiniAttention


def remove_memories(model: SenriForCausalLM) -> None:
    """Take the memories out of ``model``, which then sees what its stacked windows reach and no more."""
    for module in model.modules():
        if isinstance(module, InfiniAttention):
            module.memory_gate = module.memory_feature = None
    model.config.memory_layers = []
