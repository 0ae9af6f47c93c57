"""Hugging Face models; importing this package registers them with the Auto classes."""

from newllm.models.senri import SenriConfig, SenriForCausalLM, SenriModel

__all__ = ["SenriConfig", "SenriForCausalLM", "SenriModel"]
