"""Configuration of Context-KV models."""

# Types are not postponed here: transformers checks fields against them.
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from newllm.modules.context_kv import SlotRule


@strict
class ContextKVConfig(PreTrainedConfig):
    """ContextBlocks side by side, attention over their contexts at chunk ends, a feed-forward layer.

    State is of constant size only with ``max_contexts``; the plain chunk rule keeps one slot more per chunk.

    Args:
        vocab_size: token ids.
        embed_dim: width of embeddings and attention.
        context_dims: widths of the ContextBlocks, one layer each.
        chunk_size: tokens of a chunk, or between slots of kind ``interval``.
        slot_kind: ``chunk`` or ``interval``, see ``SlotRule``.
        max_contexts: most contexts a query attends to, its own among them (None: all).
        duplicate_boundary: a query at the end of a chunk sees its own context twice, as the prototype did.
        num_attention_heads: heads.
        intermediate_size: width of the feed-forward layer.
        attention_dropout: of attention weights.

    Raises:
        ValueError: for sizes that do not fit.
    """

    model_type = "context_kv"
    attribute_map = {"hidden_size": "embed_dim"}

    vocab_size: int = 50257
    embed_dim: int = 768
    context_dims: list[int] | None = None
    chunk_size: int = 100
    slot_kind: str = "chunk"
    max_contexts: int | None = None
    duplicate_boundary: bool = False
    num_attention_heads: int = 8
    num_hidden_layers: int = 1
    intermediate_size: int = 3072
    attention_dropout: float | int = 0.1
    tie_word_embeddings: bool = True
    initializer_range: float | int = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.context_dims = [256] if self.context_dims is None else self.context_dims
        if not self.context_dims or min(self.context_dims) < 1:
            raise ValueError(f"context_dims must hold widths of at least 1, got {self.context_dims}")
        self.rule.checked()
        super().__post_init__(**kwargs)

    @property
    def rule(self) -> SlotRule:
        """Which contexts a query sees."""
        return SlotRule(self.chunk_size, self.slot_kind, self.max_contexts, self.duplicate_boundary)  # type: ignore[arg-type]

    @property
    def context_dim(self) -> int:
        """Numbers of all contexts together."""
        return sum(self.context_dims or ())
