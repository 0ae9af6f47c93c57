"""Modules: attention with a memory, the memory alone, contexts and attention over them."""

from newllm.modules.context_block import ContextBlock, ContextLayer
from newllm.modules.context_kv import ContextKVAttention, SlotRule
from newllm.modules.gate import MemoryFeature, MemoryGate
from newllm.modules.infini_attention import InfiniAttention
from newllm.modules.tensor_memory import TensorMemory
from newllm.modules.token_block import TokenBlock, TokenLayer
from newllm.modules.updaters import RecurrentCell

__all__ = [
    "ContextBlock",
    "ContextKVAttention",
    "ContextLayer",
    "InfiniAttention",
    "MemoryFeature",
    "MemoryGate",
    "RecurrentCell",
    "SlotRule",
    "TensorMemory",
    "TokenBlock",
    "TokenLayer",
]
