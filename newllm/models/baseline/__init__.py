"""The documents' Transformer, beside which their context models were measured."""

from transformers import AutoConfig, AutoModelForCausalLM

from newllm.models.baseline.configuration import BaselineConfig
from newllm.models.baseline.modeling import BaselineForCausalLM

AutoConfig.register("newllm_baseline", BaselineConfig, exist_ok=True)
AutoModelForCausalLM.register(BaselineConfig, BaselineForCausalLM, exist_ok=True)

__all__ = ["BaselineConfig", "BaselineForCausalLM"]
