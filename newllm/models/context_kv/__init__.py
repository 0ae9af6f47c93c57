"""Language models that attend over a few contexts of the past."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from newllm.models.context_kv.configuration import ContextKVConfig
from newllm.models.context_kv.modeling import ContextKVForCausalLM, ContextKVModel

AutoConfig.register("context_kv", ContextKVConfig, exist_ok=True)
AutoModel.register(ContextKVConfig, ContextKVModel, exist_ok=True)
AutoModelForCausalLM.register(ContextKVConfig, ContextKVForCausalLM, exist_ok=True)

__all__ = ["ContextKVConfig", "ContextKVForCausalLM", "ContextKVModel"]
