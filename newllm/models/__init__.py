"""Hugging Face models; importing this package registers them with the Auto classes."""

from newllm.models.baseline import BaselineConfig, BaselineForCausalLM
from newllm.models.context_kv import ContextKVConfig, ContextKVForCausalLM, ContextKVModel
from newllm.models.context_lm import ContextLMConfig, ContextLMForCausalLM, ContextLMModel
from newllm.models.senri import SenriConfig, SenriForCausalLM, SenriModel

__all__ = [
    "BaselineConfig",
    "BaselineForCausalLM",
    "ContextKVConfig",
    "ContextKVForCausalLM",
    "ContextKVModel",
    "ContextLMConfig",
    "ContextLMForCausalLM",
    "ContextLMModel",
    "SenriConfig",
    "SenriForCausalLM",
    "SenriModel",
]
