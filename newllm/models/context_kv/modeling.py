"""Context-KV: next-token prediction from the token's embedding and a few contexts of its own document."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from newllm.models.context_kv.configuration import ContextKVConfig
from newllm.models.context_lm.modeling import ContextBody, ContextPreTrainedModel
from newllm.models.head import logits_and_loss
from newllm.modules.context_block import ContextBlock, ContextLinear
from newllm.modules.context_kv import ContextKVAttention
from newllm.modules.padding import Packing
from newllm.types import ContextState


class SlotFeedForward(nn.Module):
    """z = y + LN(W_2 GELU(W_1 y))."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = ContextLinear(width, inner), ContextLinear(inner, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, y: Tensor) -> Tensor:
        """``[..., E]`` to the same."""
        return y + self.norm(self.down(nn.functional.gelu(self.up(y))))


class ContextKVModel(ContextBody):
    """The model without its head; every row is a document."""

    config_class = ContextKVConfig

    def __init__(self, config: ContextKVConfig) -> None:
        super().__init__(config)
        width, dims = config.embed_dim, config.context_dims or []
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.embed_norm = nn.LayerNorm(width)
        self.context_blocks = nn.ModuleList(ContextBlock(dim, width) for dim in dims)
        self.attention = ContextKVAttention(
            width, config.context_dim, config.num_attention_heads, dropout=config.attention_dropout
        )
        self.feed_forward = SlotFeedForward(width, config.intermediate_size)
        self.post_init()

    def contexts(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All blocks over ``x [B, T, E]`` from ``state [B, D]``: contexts ``[B, T, D]`` and the last."""
        dims = self.config.context_dims or []
        states = [None] * len(dims) if state is None else state.split(dims, -1)
        swept = [
            block(x, None if one is None else one.contiguous())
            for block, one in zip(self.context_blocks, states, strict=True)
        ]
        return torch.cat([found[0] for found in swept], -1), torch.cat([found[1] for found in swept], -1)

    def advance(
        self, x: Tensor, state: ContextState | None, packing: Packing | None, keep: bool
    ) -> tuple[Tensor, Tensor, ContextState | None]:
        """See ``ContextBody.advance``."""
        start = None if state is None else state.context
        contexts, last = self.contexts(x, start)
        if packing is None:
            packing = Packing.of(torch.ones_like(x[..., 0], dtype=torch.bool))
        else:
            last = packing.last(contexts, torch.zeros_like(last) if start is None else start)
        own = self.attention.project(contexts)
        after, positions = self._with_slots(state, last, own, packing)
        assert after.keys is not None and after.values is not None and after.slots is not None
        visible = self.config.rule.visible(after.slots, positions)
        features = self.feed_forward(self.attention(x, own, (after.keys, after.values), visible))
        return features, contexts, _newest(after, self.config.rule.capacity) if keep else None

    def _with_slots(
        self, state: ContextState | None, last: Tensor, own: tuple[Tensor, Tensor], packing: Packing
    ) -> tuple[ContextState, Tensor]:
        """The state with every slot that the new tokens or later ones may see, and the tokens' positions."""
        rows, tokens = packing.order.shape
        seen = packing.lengths.new_zeros(rows) if state is None else state.position
        place = torch.arange(tokens, device=last.device)
        positions = seen[:, None] + place
        stored = self.config.rule.stores(positions) & (place < packing.lengths[:, None])
        # Chunks begin at other columns in other rows: each row's slots move to the front, side by side.
        width = tokens if tokens < 2 else int(stored.sum(1).max())
        order = (~stored).long().argsort(dim=1, stable=True)[:, :width]
        slots = torch.where(stored, positions, -1).gather(1, order)
        picked = order[..., None].expand(-1, -1, own[0].shape[-1])
        keys, values = (one.gather(1, picked) for one in own)
        if state is not None and state.slots is not None:
            assert state.keys is not None and state.values is not None
            keys, values = torch.cat([state.keys, keys], 1), torch.cat([state.values, values], 1)
            slots = torch.cat([state.slots, slots], 1)
        after = ContextState(last, seen + packing.lengths, keys=keys, values=values, slots=slots)
        return after, positions


def _newest(state: ContextState, capacity: int | None) -> ContextState:
    """``state`` without slots that no later query sees: at most ``capacity``, or all that are filled."""
    assert state.slots is not None and state.keys is not None and state.values is not None
    if capacity is None:
        capacity = int((state.slots >= 0).sum(1).max()) if state.slots.numel() else 0
    order = state.slots.argsort(dim=1, stable=True)
    order = order[:, max(0, order.shape[1] - capacity) :]
    picked = order[..., None].expand(-1, -1, state.keys.shape[-1])
    return state._replace(
        slots=state.slots.gather(1, order),
        keys=state.keys.gather(1, picked),
        values=state.values.gather(1, picked),
    )


class ContextKVForCausalLM(ContextPreTrainedModel, GenerationMixin):
    """A Context-KV model that predicts the next token."""

    config_class = ContextKVConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ContextKVConfig) -> None:
        super().__init__(config)
        self.model = ContextKVModel(config)
        self.lm_head = nn.Linear(config.embed_dim, config.vocab_size, bias=not config.tie_word_embeddings)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``[B, T or logits_to_keep, vocab_size]``; arguments as in ``ContextKVModel.forward``."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )
        logits, loss = logits_and_loss(self, outputs.last_hidden_state, labels, logits_to_keep, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)
