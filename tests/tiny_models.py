"""Small random models for the tests of modules and models: every supported family, and Senri."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from newllm import InfiniAttention
from newllm.models import SenriConfig, SenriForCausalLM
from newllm.modules import MemoryFeature, MemoryGate
from newllm.modules.gate import MemoryDecay
from newllm.modules.short_conv import ShortConvolution

VOCABULARY = 48
PAD = 0
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "eos_token_id": None,
    # Far from the untrained 0.02: random logits then differ enough for greedy choices to mean something.
    "initializer_range": 0.3,
}
# One switch of the recipe each, and those that go together.
RECIPES: tuple[dict[str, Any], ...] = (
    {"write_gate": True},
    {"memory_decay": 0.7},
    {"short_conv": 4},
    {"share_memory": True},
    {"rule": "delta", "write_gate": True, "memory_decay": 0.7, "short_conv": 3},
    {"share_memory": True, "write_gate": True, "short_conv": 2},
)
WIDE_ROPE = {"rope_type": "default", "rope_theta": 1e6}
# Sums on the longest path through a model: each layer's projections, window of 8, and MLP.
ADDITIONS = SIZES["num_hidden_layers"] * (4 * SIZES["hidden_size"] + 8 + 2 * SIZES["intermediate_size"])
# SmolLM is a Llama with a tied head; the others differ in biases, norms of heads, and widths.
BASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True}),
    "smollm": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None, "head_dim": 12}),
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"rope_parameters": WIDE_ROPE},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
}


def tiny_base(family: str, **overrides: Any) -> PreTrainedModel:
    """A random model of ``family``, its biases and norms random too."""
    model_class, config_class, own = BASES[family]
    model = model_class(config_class(**{**SIZES, **own, **overrides})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return model


def with_memory(model: PreTrainedModel, layers: tuple[int, ...] | None = None, **options: Any) -> Any:
    """``model`` with ``InfiniAttention`` in ``layers`` (None: all of them)."""
    for index, layer in enumerate(model.model.layers):
        if layers is None or index in layers:
            layer.self_attn = InfiniAttention.from_attention(layer.self_attn, **options)
    return model


def tiny_senri(**overrides: Any) -> SenriForCausalLM:
    """A random Senri: window 8, segment 4, memory in layers 0 and 2 with open gates."""
    options = {"sliding_window": 8, "segment": 4, "memory_layers": [0, 2]}
    return open_gates(SenriForCausalLM(SenriConfig(**{**SIZES, **options, **overrides})).eval())


def open_gates(model: Any) -> Any:
    """``model`` with every head's gate somewhere else, and features that keep many keys apart.

    Write gates, decay and short convolutions, where there are any, are as if trained too.
    """
    for module in model.modules():
        if isinstance(module, MemoryFeature) and module.write is not None:
            nn.init.normal_(module.write)
        if isinstance(module, MemoryGate | MemoryDecay):
            nn.init.normal_(module.weight)
        elif isinstance(module, ShortConvolution):
            nn.init.normal_(module.weight, std=0.3)
        elif isinstance(module, MemoryFeature) and module.kind == "elu1":
            nn.init.normal_(module.scale, mean=2.0, std=0.3)
            nn.init.normal_(module.bias, mean=-1.0, std=0.3)
    return model


def random_tokens(*shape: int) -> Tensor:
    """Token ids, none of them padding."""
    return torch.randint(PAD + 1, VOCABULARY, shape)


def left_padded(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Ids ``[B, longest]`` padded on the left, and their attention mask."""
    longest = max(lengths)
    ids = random_tokens(len(lengths), longest)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return ids.where(mask, PAD), mask.long()


def greedy(model: Any, ids: Tensor, tokens: int = 12, **options: Any) -> Tensor:
    """The ``tokens`` new tokens ``[B, tokens]`` of greedy (or, by ``options``, other) decoding."""
    options = {"do_sample": False, "pad_token_id": PAD, "max_new_tokens": tokens, **options}
    return model.generate(ids, **options)[:, ids.shape[1] :]
