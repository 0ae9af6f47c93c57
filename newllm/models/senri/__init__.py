"""Senri: sliding windows everywhere, an associative memory in chosen layers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from newllm.models.senri.configuration import SenriConfig
from newllm.models.senri.modeling import SenriForCausalLM, SenriModel

AutoConfig.register("senri", SenriConfig, exist_ok=True)
AutoModel.register(SenriConfig, SenriModel, exist_ok=True)
AutoModelForCausalLM.register(SenriConfig, SenriForCausalLM, exist_ok=True)

__all__ = ["SenriConfig", "SenriForCausalLM", "SenriModel"]
