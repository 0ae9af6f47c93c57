"""Rotary frequencies of a transformers configuration."""

from __future__ import annotations

from typing import Any

import torch

from newllm.modules.rotary import Rotary

LENGTH_DEPENDENT = ("dynamic", "longrope")


def rotary_from_config(config: Any) -> Rotary:
    """The rotary tables that a Llama-type ``config`` describes.

    Raises ``ValueError`` for types whose frequencies depend on the length of the text: a stream has none.
    """
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    kind = config.rope_parameters["rope_type"]
    if kind in LENGTH_DEPENDENT:
        raise ValueError(
            f"rope_type must not depend on the text's length, got {kind!r}: "
            "a constant-memory stream has no length (default, linear, llama3 and yarn work)"
        )
    # Not on the meta device, where from_pretrained builds its models: the numbers are needed.
    with torch.device("cpu"):
        embedding = LlamaRotaryEmbedding(config=config)
    return Rotary(embedding.inv_freq.tolist(), float(embedding.attention_scaling))
