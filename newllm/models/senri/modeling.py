"""Senri: a Llama-type decoder whose layers keep a constant-size state instead of a growing cache."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel, initialization
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from newllm.models.head import logits_and_loss
from newllm.models.senri import fused_step
from newllm.models.senri.configuration import SenriConfig
from newllm.models.senri.shared import collect, lend, segment_ends
from newllm.modules.cache import InfiniCacheLayer, cache_layer
from newllm.modules.gate import MemoryDecay, MemoryFeature, MemoryGate
from newllm.modules.infini_attention import InfiniAttention, padding_mask, rope_rows
from newllm.modules.norm import RMSNorm
from newllm.modules.rope_config import rotary_from_config
from newllm.modules.short_conv import ShortConvolution
from newllm.ops import checks
from newllm.types import InfiniState


class SenriBlock(GradientCheckpointingLayer):
    """Attention and MLP with pre-normalisation; the layer's state comes in and goes out.

    The state is an argument, not a cache: activation checkpointing drops caches but keeps arguments.
    """

    def __init__(self, config: SenriConfig, layer: int) -> None:
        super().__init__()
        # The configuration has checked the choices.
        choices: Any = {name: getattr(config, name) for name in ("gate", "rule", "feature", "detach")}
        self.self_attn = InfiniAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            window=config.sliding_window,
            segment=config.segment,
            memory=layer in (config.memory_layers or ()),
            feature_scale=config.feature_scale,
            feature_bias=config.feature_bias,
            feature_order=config.feature_order,
            write_gate=config.write_gate,
            decay=config.memory_decay,
            short_conv=config.short_conv,
            eps=config.memory_eps,
            bptt_segments=config.bptt_segments,
            rope_theta=None,
            bias=config.attention_bias,
            out_bias=config.attention_out_bias,
            qk_norm=config.rms_norm_eps if config.qk_norm else None,
            **choices,
        )
        self.mlp = LlamaMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        rope: tuple[Tensor, Tensor],
        padding: Tensor | None,
        state: InfiniState | None,
        in_place: bool = False,
        segment_weight: Tensor | None = None,
    ) -> tuple[Tensor, InfiniState]:
        """``hidden_states [B, T, hidden_size]``, bool ``padding [B, T]`` -> the same and the new state."""
        if in_place and state is not None and fused_step.fits(self, hidden_states):
            return fused_step.step(self, hidden_states, rope, padding, state), state
        attended, state = self.self_attn(
            _for_products(self.input_layernorm(hidden_states)),
            position_embeddings=rope,
            padding=padding,
            state=state,
            in_place=in_place,
            segment_weight=segment_weight,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(_for_products(self.post_attention_layernorm(hidden_states))), state


def _for_products(x: Tensor) -> Tensor:
    """``x`` as autocast hands it to products: once, where each of several would do so on its own."""
    dtype = checks.autocast_dtype(x.device.type)
    return x if dtype is None or x.dtype not in checks.CAST else x.to(dtype)


class SenriPreTrainedModel(PreTrainedModel):
    """Weights, their initialisation, and what transformers may do with them."""

    # Not an annotation: as a string it could not be registered with the Auto classes.
    config_class = SenriConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SenriBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _is_stateful = True
    _can_record_outputs = {"hidden_states": SenriBlock}
    _keep_in_fp32_modules_strict = ["memory_gate", "memory_feature", "memory_decay"]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MemoryGate):
            initialization.zeros_(module.weight)
        elif isinstance(module, MemoryFeature | MemoryDecay | ShortConvolution):
            for name, value in module.starts().items():
                initialization.constant_(getattr(module, name), value)


class SenriModel(SenriPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: SenriConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(SenriBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = rotary_from_config(config)
        self.gradient_checkpointing = False
        # Whether this process holds a slice of each sequence, behind another's.
        self.sliced = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        segment_weight: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Read ``input_ids [B, T]`` or ``inputs_embeds [B, T, hidden_size]``.

        ``attention_mask`` is padding only, ``[B, >= T]``; its last T columns belong to the new tokens.
        ``position_ids`` are ignored: positions are relative and padding takes none. A cache that is passed
        is continued; without one the state starts empty. ``segment_weight [B, ceil(T / segment)]`` scales
        what each segment adds to the memories.

        Raises ``ValueError`` for a cache of another batch size or model.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        tokens = hidden_states.shape[1]
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        caches = _layers(past_key_values, len(self.layers))
        if caches:
            # What compiled decoding will look for, where it can still be made.
            self.rotary.kept(self._ring, hidden_states)
        states = [cache.read(len(hidden_states)) for cache in caches] or [None] * len(self.layers)
        if isinstance(attention_mask, dict):
            padding = attention_mask["padding"]
        else:
            padding = padding_mask(attention_mask, tokens)
        pieces = self._pieces(tokens, states[0], padding)
        if segment_weight is not None and (len(pieces) > 1 or self.config.share_memory):
            raise ValueError(
                f"segment_weight needs memories of their own and at most prefill_chunk "
                f"({self.config.prefill_chunk}) tokens, got {tokens}"
            )
        outputs = []
        for start, stop in pieces:
            # Of a part it is asked anew whether all are real: once, for the host waits for the answer.
            part = padding
            if padding is not None and len(pieces) > 1:
                part = padding_mask(padding[:, start:stop], stop - start)
            out, states = self._read(hidden_states[:, start:stop], part, states, segment_weight)
            outputs.append(out)
        for cache, state in zip(caches, states, strict=False):
            assert state is not None
            cache.write(state, tokens)
        hidden_states = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )

    @property
    def _ring(self) -> int:
        """Tokens that a window reaches, the new one among them."""
        return self.config.sliding_window or self.config.segment  # type: ignore[no-any-return]

    def _pieces(
        self, tokens: int, state: InfiniState | None, padding: Tensor | None
    ) -> list[tuple[int, int]]:
        """First token of each piece that is read at once, and the one behind its last."""
        chunk = tokens if self.sliced else self.config.prefill_chunk
        stops = set(range(chunk, tokens, chunk))
        if self.config.share_memory and tokens > 1:
            assert self.config.segment is not None
            position = None if state is None else state.position
            stops |= segment_ends(position, padding, tokens, self.config.segment)
        return list(pairwise([0, *sorted(stops), tokens]))

    def _read(
        self,
        hidden_states: Tensor,
        padding: Tensor | None,
        states: list[InfiniState | None],
        segment_weight: Tensor | None,
    ) -> tuple[Tensor, list[InfiniState | None]]:
        """All layers over one chunk."""
        tokens, continued = hidden_states.shape[1], states[0] is not None
        rows = tokens + self._ring if self.sliced else rope_rows(tokens, self._ring, continued)
        sharing = self.config.memory_layers or () if self.config.share_memory else ()
        in_place = continued and tokens == 1 and not (self.sliced or sharing or torch.is_grad_enabled())
        table = self.rotary.kept if in_place else self.rotary
        rope = table(rows, hidden_states)
        states = lend(states, sharing)
        after: list[InfiniState | None] = []
        for layer, state in zip(self.layers, states, strict=True):
            hidden_states, state = layer(hidden_states, rope, padding, state, in_place, segment_weight)
            after.append(state)
        return hidden_states, collect(states, after, sharing)


def _layers(cache: Cache | None, count: int) -> list[InfiniCacheLayer]:
    if cache is None:
        return []
    layers = [cache_layer(cache, layer) for layer in range(count)]
    filled = sum(layer.state is not None for layer in layers)
    if len(cache.layers) > count or filled not in (0, count):
        raise ValueError(
            f"past_key_values must be empty or of a model of {count} layers, got {len(cache.layers)} layers, "
            f"{filled} of the first {count} filled: pass a fresh cache"
        )
    return layers


class SenriForCausalLM(SenriPreTrainedModel, GenerationMixin):
    """Senri with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SenriConfig) -> None:
        super().__init__(config)
        self.model = SenriModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
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
        segment_weight: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``[B, T or logits_to_keep, vocab_size]``; arguments as in ``SenriModel.forward``."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            segment_weight=segment_weight,
            **kwargs,
        )
        logits, loss = logits_and_loss(self, outputs.last_hidden_state, labels, logits_to_keep, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    @staticmethod
    def create_masks_for_generate(
        config: SenriConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> dict[str, Tensor | None]:
        """The padding of the new tokens, made outside the compiled graph, where its shape grows."""
        return {"padding": padding_mask(attention_mask, inputs_embeds.shape[1])}
