"""The documents' Transformer: post-norm, learned positions, no cache."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils.generic import can_return_tuple

from newllm.models.baseline.configuration import BaselineConfig
from newllm.models.head import logits_and_loss


class BaselineBlock(nn.Module):
    """x <- LN(x + attention(x)), x <- LN(x + FFN(x))."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        width, inner = config.embed_dim, config.intermediate_size
        self.heads, self.rate = config.num_attention_heads, config.dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        self.ffn_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, E]`` to the same."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        rate = self.rate if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=rate)
        x = self.attention_norm(x + self.dropout(self.out(attended.transpose(1, 2).flatten(2))))
        normed: Tensor = self.ffn_norm(x + self.dropout(self.ffn(x)))
        return normed


class BaselineForCausalLM(PreTrainedModel):
    """A Transformer that predicts the next token, for texts no longer than its positions."""

    config_class = BaselineConfig

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embed_dim)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.embed_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(BaselineBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.embed_dim)
        self.lm_head = nn.Linear(config.embed_dim, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> CausalLMOutput:
        """Logits ``[B, T, vocab_size]`` of ``input_ids [B, T]``, padded, if at all, on the right.

        Raises ``ValueError`` for more tokens than there are positions.
        """
        tokens, most = input_ids.shape[1], self.config.max_position_embeddings
        if tokens > most:
            raise ValueError(
                f"input_ids must have at most {most} tokens, the model's positions, got {tokens}"
            )
        place = torch.arange(tokens, device=input_ids.device)
        x = self.dropout(self.embed_tokens(input_ids) + self.embed_positions(place))
        for block in self.blocks:
            x = block(x)
        logits, loss = logits_and_loss(self, self.norm(x), labels)
        return CausalLMOutput(loss=loss, logits=logits)
