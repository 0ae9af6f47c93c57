"""Context language models: gated recurrent, and ContextBlock with TokenBlock; explicit state throughout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel, initialization
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from newllm.models.context_lm.configuration import ContextLMConfig
from newllm.models.head import logits_and_loss
from newllm.modules.cache import ContextCacheLayer, cache_layer
from newllm.modules.context_block import BIAS_STD, WEIGHT_STD, ContextBlock, ContextLinear
from newllm.modules.infini_attention import padding_mask
from newllm.modules.padding import Packing
from newllm.modules.token_block import TokenBlock
from newllm.modules.updaters import RecurrentCell, updater_of
from newllm.types import ContextState


@dataclass
class ContextModelOutput(BaseModelOutputWithPast):
    """What the body makes: with ``last_hidden_state [B, T, D]`` the contexts ``[B, T, C]`` after each token.

    ``inputs [B, T, E]`` are the embeddings it read, ``before [B, T, C]`` the contexts before each token.
    """

    contexts: Tensor | None = None
    inputs: Tensor | None = None
    before: Tensor | None = None


@dataclass
class ContextLMOutput(CausalLMOutputWithPast):
    """Logits and losses; ``loss`` is ``token_loss`` plus the weighted ``reconstruction_loss``.

    ``reconstruction [B, T, C + E]`` is the decoder's guess of ``target``, the context before each token and
    the token's embedding. ``contexts [B, T, C]`` come after each token.
    """

    token_loss: Tensor | None = None
    reconstruction_loss: Tensor | None = None
    reconstruction: Tensor | None = None
    target: Tensor | None = None
    contexts: Tensor | None = None


class Read(NamedTuple):
    """What a body makes of packed embeddings: ``features [B, T, D]``, ``contexts [B, T, C]``, the last."""

    features: Tensor
    contexts: Tensor
    last: Tensor


class ContextPreTrainedModel(PreTrainedModel):
    """Weights, their initialisation, and what transformers may do with them."""

    base_model_prefix = "model"
    _skip_keys_device_placement = ["past_key_values"]
    _is_stateful = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ContextLinear):
            initialization.normal_(module.weight, std=WEIGHT_STD)
            if module.bias is not None:
                initialization.normal_(module.bias, std=BIAS_STD)


def check_ids(ids: Tensor, vocabulary: int) -> None:
    """Raise ``ValueError`` for ids outside the vocabulary; only on a CPU, where looking waits for nobody."""
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or ids.numel() == 0:
        return
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= vocabulary:
        wrong = least if least < 0 else most
        raise ValueError(
            f"input_ids must lie between 0 and {vocabulary - 1}, the vocabulary of the model, got {wrong}"
        )


class ContextBody(ContextPreTrainedModel):
    """What all bodies do around their sweep: embeddings, padding, and the state in a cache."""

    embed_tokens: nn.Embedding

    def embed(self, ids: Tensor | None) -> Tensor:
        """The embeddings ``[..., E]`` that the body reads, of ``ids [...]``."""
        assert ids is not None
        check_ids(ids, self.config.vocab_size)
        return self.normalised(self.embed_tokens(ids))

    def normalised(self, embeddings: Tensor) -> Tensor:
        """``embeddings [..., E]`` through the layer norm, if the model has one."""
        return embeddings if self.embed_norm is None else self.embed_norm(embeddings)

    def advance(
        self, x: Tensor, state: ContextState | None, packing: Packing | None, keep: bool
    ) -> tuple[Tensor, Tensor, ContextState | None]:
        """Read packed embeddings ``x [B, T, E]``: features ``[B, T, D]``, contexts ``[B, T, C]``, the state.

        Without ``packing`` all tokens are real. The state after them is only asked for where ``keep`` is set.
        """
        raise NotImplementedError

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> ContextModelOutput:
        """Read ``input_ids [B, T]`` or ``inputs_embeds [B, T, E]``.

        ``attention_mask`` is padding only, ``[B, >= T]``, its last T columns those of the new tokens; padding
        is skipped, wherever it stands. ``position_ids`` are ignored. A cache that is passed is continued;
        without one the context starts at zero.

        Raises ``ValueError`` for ids out of the vocabulary and a cache of another batch size or model.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        x = self.embed(input_ids) if inputs_embeds is None else self.normalised(inputs_embeds)
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        layer = None if past_key_values is None else context_layer(past_key_values)
        state = None if layer is None else layer.read_context(len(x), self.config.context_dim)
        real = real_tokens(attention_mask, x.shape[1])
        packing = None if real is None else Packing.of(real)
        packed = x if packing is None else packing.pack(x)
        features, contexts, after = self.advance(packed, state, packing, keep=layer is not None)
        before = contexts_before(contexts, None if state is None else state.context)
        if layer is not None:
            layer.write(after, x.shape[1])  # type: ignore[arg-type]
        if packing is not None:
            features, contexts, before = map(packing.unpack, (features, contexts, before))
        return ContextModelOutput(
            last_hidden_state=features,
            past_key_values=past_key_values,
            contexts=contexts,
            inputs=x,
            before=before,
        )


class ContextLMModel(ContextBody):
    """The model without its head."""

    config_class = ContextLMConfig

    def __init__(self, config: ContextLMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embed_dim)
        self.embed_norm = nn.LayerNorm(config.embed_dim) if config.embed_norm else None
        layers = config.num_hidden_layers
        if config.cell == "context":
            k = config.input_tokens
            self.context_block = ContextBlock(config.context_dim, config.embed_dim, layers, input_tokens=k)
            self.token_block = TokenBlock(
                config.context_dim,
                config.embed_dim,
                config.token_layers or layers,
                plan=config.plan,  # type: ignore[arg-type]
                input_tokens=k,
            )
        else:
            self.recurrent = RecurrentCell(
                config.embed_dim,
                config.hidden_dim,
                config.context_dim,
                layers,
                updater=config.cell,
                clamp=config.clamp,
            )
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def read(self, x: Tensor, context: Tensor | None, recent: Tensor | None) -> Read:
        """Packed embeddings ``[B, T, E]`` behind a context ``[B, C]`` and ``recent`` embeddings."""
        if self.config.cell != "context":
            hidden, contexts, last = self.recurrent(x, context)
            return Read(self.dropout(hidden), contexts, last)
        joined = self.context_block.inputs(x, recent)
        contexts, last, _ = self.context_block(joined, context)
        before = contexts_before(contexts, context)
        single = len(self.context_block.layers) == 1
        outputs = [contexts] if single else self.context_block.step(before, joined)
        return Read(self.token_block(joined, self.token_block.choose(outputs, before)), contexts, last)

    def advance(
        self, x: Tensor, state: ContextState | None, packing: Packing | None, keep: bool
    ) -> tuple[Tensor, Tensor, ContextState | None]:
        """See ``ContextBody.advance``."""
        context, recent = (None, None) if state is None else (state.context, state.recent)
        features, contexts, last = self.read(x, context, recent)
        return features, contexts, self._state(x, contexts, last, state, packing) if keep else None

    def _state(
        self,
        x: Tensor,
        contexts: Tensor,
        last: Tensor,
        state: ContextState | None,
        packing: Packing | None,
    ) -> ContextState:
        """What is remembered after the packed embeddings ``x``."""
        position = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        start, recent, kept = torch.zeros_like(last), None, self.config.input_tokens - 1
        if self.config.cell == "context" and kept:
            recent = x.new_zeros(len(x), kept, x.shape[-1])
        if state is not None:
            start, position, recent = state.context, state.position, state.recent
        if packing is None:
            packing = Packing(position, torch.full_like(position, x.shape[1]))
        else:
            last = packing.last(contexts, start)
        if recent is not None:
            recent = packing.newest(torch.cat([recent, x], 1), kept)
        return ContextState(last, position + packing.lengths, recent)


def contexts_before(contexts: Tensor, start: Tensor | None) -> Tensor:
    """The context before each token: ``contexts [B, T, C]`` after each, ``start [B, C]`` (None: zeros)."""
    first = torch.zeros_like(contexts[:, 0]) if start is None else start.to(contexts.dtype)
    return torch.cat([first[:, None], contexts[:, :-1]], 1)


def context_layer(cache: Cache) -> ContextCacheLayer:
    """The layer of ``cache`` that holds the model's state; ``ValueError`` for another model's cache."""
    layer = cache_layer(cache, 0, ContextCacheLayer)
    assert isinstance(layer, ContextCacheLayer)
    if any(int(other.get_seq_length()) > 0 for other in cache.layers[1:]):
        raise ValueError("past_key_values has layers of another model: pass a fresh cache")
    return layer


def real_tokens(attention_mask: Tensor | dict[str, Tensor | None] | None, tokens: int) -> Tensor | None:
    """Which of the last ``tokens`` tokens are real, bool ``[B, T]``; None when all are."""
    if isinstance(attention_mask, dict):
        return attention_mask["padding"]
    return padding_mask(attention_mask, tokens)


class ReconstructionDecoder(nn.Sequential):
    """From the context after a token, the context before it and the token's embedding: C to C + E."""

    def __init__(self, context_dim: int, embed_dim: int) -> None:
        both = context_dim + embed_dim
        super().__init__(nn.Linear(context_dim, both), nn.ReLU(), nn.Linear(both, both))


class ContextLMForCausalLM(ContextPreTrainedModel, GenerationMixin):
    """A context language model that predicts the next token."""

    config_class = ContextLMConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ContextLMConfig) -> None:
        super().__init__(config)
        self.model = ContextLMModel(config)
        self.lm_head = nn.Linear(config.head_dim, config.vocab_size, bias=not config.tie_word_embeddings)
        decodes = config.reconstruction_weight > 0
        self.decoder = ReconstructionDecoder(config.context_dim, config.embed_dim) if decodes else None
        self.post_init()

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor], **config: Any) -> ContextLMForCausalLM:
        """A recurrent model from bare weights, its updater told by their names; ``config`` says the rest.

        Raises ``ValueError`` for weights of another model, ``RuntimeError`` for sizes that do not fit.
        """
        model = cls(ContextLMConfig(**{**config, "cell": updater_of(weights)}))
        model.load_state_dict(dict(weights))
        return model

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
    ) -> ContextLMOutput:
        """Logits ``[B, T or logits_to_keep, vocab_size]``; arguments as in ``ContextLMModel.forward``."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )
        logits, loss = logits_and_loss(self, outputs.last_hidden_state, labels, logits_to_keep, **kwargs)
        made = ContextLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            contexts=outputs.contexts,
            token_loss=loss,
        )
        if self.decoder is not None and labels is not None:
            real = real_tokens(attention_mask, logits.shape[1])
            self._reconstruct(made, outputs, real)
        return made

    def _reconstruct(self, made: ContextLMOutput, outputs: ContextModelOutput, real: Tensor | None) -> None:
        """Add the reconstruction of each context's token and past, and its loss."""
        assert self.decoder is not None and outputs.before is not None and outputs.inputs is not None
        made.target = torch.cat([outputs.before, outputs.inputs], -1).detach()
        made.reconstruction = self.decoder(outputs.contexts)
        error = F.mse_loss(made.reconstruction, made.target, reduction="none").mean(-1)
        made.reconstruction_loss = error.mean() if real is None else error[real].mean()
        made.loss = made.token_loss + self.config.reconstruction_weight * made.reconstruction_loss  # type: ignore[operator]
