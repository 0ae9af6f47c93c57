"""Modules: attention with a memory, and the memory alone."""

from newllm.modules.gate import MemoryFeature, MemoryGate
from newllm.modules.infini_attention import InfiniAttention
from newllm.modules.tensor_memory import TensorMemory

__all__ = ["InfiniAttention", "MemoryFeature", "MemoryGate", "TensorMemory"]
