"""New models to train."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from newllm.data.tokenizer import byte_tokenizer
from newllm.models.senri import SenriConfig, SenriForCausalLM
from newllm.training.config import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Vocabularies are rounded up to a multiple of this, which matrix products like.
_EVEN = 8


def scratch_model(
    config: ModelConfig, *, seed: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[SenriForCausalLM, PreTrainedTokenizerBase]:
    """A Senri with weights drawn from ``seed``, and its tokenizer (None: bytes).

    Raises ``ValueError`` for sizes that do not fit.
    """
    tokenizer = tokenizer or byte_tokenizer()
    torch.manual_seed(seed)
    model = SenriForCausalLM(
        SenriConfig(
            vocab_size=_EVEN * math.ceil(len(tokenizer) / _EVEN),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            sliding_window=config.window,
            segment=config.segment,
            memory_layers=config.memory_layers,
            gate=config.gate,
            rule=config.rule,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    return model, tokenizer


def window_only(config: ModelConfig) -> ModelConfig:
    """The control: the same model without a memory."""
    return replace(config, memory_layers=[])
