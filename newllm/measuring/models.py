"""Random models of the sizes at which serving is measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from newllm.measuring.ours import Site
from newllm.measuring.shapes import Shape

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from newllm.models.senri import SenriForCausalLM


class Sizes(NamedTuple):
    """What a layer's shape does not say of a model; ``steps`` are the tokens of one timed call."""

    layers: int
    intermediate: int
    vocabulary: int
    steps: int


# SmolLM2-135M, and what a CPU decodes in a moment.
SIZES = {"cuda": Sizes(30, 1536, 49152, 128), "cpu": Sizes(2, 64, 128, 4)}


def senri(shape: Shape, site: Site, layers: int | None = None) -> SenriForCausalLM:
    """A random model of ``shape``, its gates open, its memories in float32 as loading leaves them."""
    from newllm.models.senri import SenriConfig, SenriForCausalLM
    from newllm.modules.gate import MemoryFeature, MemoryGate

    memory = None if layers is None else list(range(layers))
    sizes = {**_sizes(shape, site), **({} if layers is None else {"num_hidden_layers": layers})}
    config = SenriConfig(**sizes, sliding_window=shape.window, segment=shape.segment, memory_layers=memory)
    model = _random(SenriForCausalLM, config, site)
    for module in model.modules():
        if isinstance(module, MemoryGate | MemoryFeature):
            module.float()
        if isinstance(module, MemoryGate):
            torch.nn.init.normal_(module.weight)
    return model


def llama(shape: Shape, site: Site) -> LlamaForCausalLM:
    """A random Llama of the same sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _random(LlamaForCausalLM, LlamaConfig(**_sizes(shape, site)), site)


def _sizes(shape: Shape, site: Site) -> dict[str, Any]:
    sizes = SIZES[site.device.type]
    return {
        "vocab_size": sizes.vocabulary,
        "hidden_size": shape.heads * shape.width,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.width,
        "max_position_embeddings": 2**20,
        "tie_word_embeddings": True,
        "eos_token_id": None,
    }


def _random(kind: Any, config: Any, site: Site) -> Any:
    with site.device:
        torch.manual_seed(0)
        model = kind(config)
    return model.to(site.dtype).eval()
