"""Rotary frequencies of a transformers configuration."""

from __future__ import annotations

from typing import Any

import torch

from newllm.modules.rotary import Rotary

KINDS = ("default", "linear", "llama3", "yarn")


def rotary_from_config(config: Any) -> Rotary:
    """The rotary tables that a Llama-type ``config`` describes.

    Raises ``ValueError`` for types other than ``KINDS``: the frequencies of ``dynamic`` and ``longrope``
    depend on the length of the text, and a stream has none.
    """
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    kind = config.rope_parameters["rope_type"]
    if kind not in KINDS:
        raise ValueError(
            f"rope_type must be one of {', '.join(KINDS)}, whose frequencies do not depend on the text's "
            f"length, got {kind!r}"
        )
    # Not on the meta device, where from_pretrained builds its models: the numbers are needed.
    with torch.device("cpu"):
        embedding = LlamaRotaryEmbedding(config=config)
    return Rotary(embedding.inv_freq.tolist(), float(embedding.attention_scaling))
