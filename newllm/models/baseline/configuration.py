"""Configuration of the documents' Transformer."""

# Types are not postponed here: transformers checks fields against them.
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class BaselineConfig(PreTrainedConfig):
    """A post-norm Transformer with learned positions.

    Args:
        vocab_size: token ids.
        embed_dim: width.
        num_attention_heads: heads.
        intermediate_size: width of the feed-forward networks.
        num_hidden_layers: depth.
        max_position_embeddings: most tokens of an input.
        dropout: of embeddings, attention weights and sublayers.

    Raises:
        ValueError: when heads do not divide the width.
    """

    model_type = "newllm_baseline"
    attribute_map = {"hidden_size": "embed_dim"}

    vocab_size: int = 1000
    embed_dim: int = 256
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    num_hidden_layers: int = 6
    max_position_embeddings: int = 32
    dropout: float | int = 0.1
    initializer_range: float | int = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.embed_dim % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads must divide embed_dim ({self.embed_dim}), "
                f"got {self.num_attention_heads}"
            )
        super().__post_init__(**kwargs)
