"""Configuration of context language models."""

# Types are not postponed here: transformers checks fields against them.
from typing import Any, Literal, get_args

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from newllm.modules.token_block import Plan

CellName = Literal["gated", "simple", "context"]


@strict
class ContextLMConfig(PreTrainedConfig):
    """A model that reads a token and a context, and rewrites the context.

    Args:
        vocab_size: token ids.
        embed_dim: width of embeddings.
        context_dim: numbers of the context, all that is kept of the past.
        num_hidden_layers: Linear-ReLU layers of the recurrent cells, or layers of the ContextBlock.
        cell: ``gated``; ``simple``, a negative control that overwrites the context; ``context``, a
            ContextBlock and a TokenBlock, trained in two phases.
        hidden_dim: width of the recurrent cells' layers.
        clamp: most that an entry of a recurrent cell's context may be (None: no bound).
        dropout: of what the head of a recurrent cell reads.
        reconstruction_weight: weight of the loss by which a decoder tells the last context and token from the
            context (0: no decoder).
        plan: which contexts the TokenBlock reads.
        token_layers: its layers (None: as many as the ContextBlock's).
        input_tokens: embeddings that a token brings, with those of the tokens before it.
        embed_norm: a layer norm on embeddings (None: for the context cell alone).
        tie_word_embeddings: the head is the embedding, without a bias (None: for the context cell alone).

    Raises:
        ValueError: for an unknown choice, or a tied head of another width.
    """

    model_type = "context_lm"
    attribute_map = {"hidden_size": "embed_dim"}

    vocab_size: int = 10000
    embed_dim: int = 256
    context_dim: int = 256
    num_hidden_layers: int = 1
    cell: str = "gated"
    hidden_dim: int = 512
    clamp: float | int | None = 10.0
    dropout: float | int = 0.1
    reconstruction_weight: float | int = 0.0
    plan: str = "E"
    token_layers: int | None = None
    input_tokens: int = 1
    embed_norm: bool | None = None
    tie_word_embeddings: bool | None = None
    initializer_range: float | int = 0.02
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 3
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        two_phase = self.cell == "context"
        self.embed_norm = two_phase if self.embed_norm is None else self.embed_norm
        self.tie_word_embeddings = two_phase if self.tie_word_embeddings is None else self.tie_word_embeddings
        self.token_layers = self.token_layers or self.num_hidden_layers
        for name, value, choices in (
            ("cell", self.cell, get_args(CellName)),
            ("plan", self.plan, get_args(Plan)),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if self.tie_word_embeddings and self.head_dim != self.embed_dim:
            raise ValueError(
                f"tie_word_embeddings needs hidden_dim equal to embed_dim ({self.embed_dim}), "
                f"got {self.head_dim}"
            )
        if two_phase and self.plan == "E" and self.token_layers != self.num_hidden_layers:
            raise ValueError(
                f"token_layers must equal num_hidden_layers ({self.num_hidden_layers}) for plan E, "
                f"got {self.token_layers}"
            )
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        """Width of what the head reads."""
        return self.embed_dim if self.cell == "context" else self.hidden_dim
