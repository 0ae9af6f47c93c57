"""Language models whose whole past is one vector of constant width."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from newllm.models.context_lm.configuration import ContextLMConfig
from newllm.models.context_lm.modeling import ContextLMForCausalLM, ContextLMModel

AutoConfig.register("context_lm", ContextLMConfig, exist_ok=True)
AutoModel.register(ContextLMConfig, ContextLMModel, exist_ok=True)
AutoModelForCausalLM.register(ContextLMConfig, ContextLMForCausalLM, exist_ok=True)

__all__ = ["ContextLMConfig", "ContextLMForCausalLM", "ContextLMModel"]
