"""New models to train."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from newllm.data.tokenizer import byte_tokenizer
from newllm.models.context_lm import ContextLMConfig, ContextLMForCausalLM
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
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return senri_of(config, len(tokenizer), seed=seed, **special), tokenizer


def senri_of(config: ModelConfig, vocabulary: int, *, seed: int, **special: int | None) -> SenriForCausalLM:
    """A Senri of ``vocabulary`` symbols with weights drawn from ``seed``; ``special`` token ids, if any."""
    torch.manual_seed(seed)
    return SenriForCausalLM(
        SenriConfig(
            vocab_size=_EVEN * math.ceil(vocabulary / _EVEN),
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
            feature=config.feature,
            feature_scale=config.feature_scale,
            feature_bias=config.feature_bias,
            feature_order=config.feature_order,
            write_gate=config.write_gate,
            memory_decay=config.memory_decay,
            short_conv=config.short_conv,
            share_memory=config.share_memory,
            tie_word_embeddings=True,
            **{"pad_token_id": None, "bos_token_id": None, "eos_token_id": None, **special},
        )
    )


def context_of(cell: str, context_dim: int, vocabulary: int, *, seed: int) -> ContextLMForCausalLM:
    """A recurrent context language model of ``vocabulary`` symbols, without dropout or a bound."""
    torch.manual_seed(seed)
    return ContextLMForCausalLM(
        ContextLMConfig(
            vocab_size=vocabulary, embed_dim=context_dim, context_dim=context_dim, hidden_dim=2 * context_dim,
            cell=cell, clamp=None, dropout=0.0, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


def window_only(config: ModelConfig) -> ModelConfig:
    """The control: the same model without a memory."""
    return replace(config, memory_layers=[])
