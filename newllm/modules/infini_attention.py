"""Infini-attention as a module: on its own, or in place of a Llama-type attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from newllm import ops
from newllm.modules.gate import MemoryDecay, MemoryFeature, MemoryGate
from newllm.modules.norm import RMSNorm
from newllm.modules.rotary import Rotary
from newllm.modules.short_conv import ShortConvolution
from newllm.types import Detach, GateKind, InfiniState, Rule

if TYPE_CHECKING:
    from transformers import Cache

# Model types of transformers whose attention this module computes.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


class InfiniAttention(nn.Module):
    """Grouped-query sliding-window attention beside an associative memory (arXiv 2404.07143).

    Args:
        hidden_size: width of the hidden states.
        num_heads: query heads, H. num_kv_heads: key/value heads, Hkv (None: H). head_dim: K = V
            (None: ``hidden_size // num_heads``).
        window: keys a query sees, its own included; None attends within segments.
        segment: tokens folded into the memory at once (None: ``window``); at most ``window``.
        memory: False leaves a plain sliding window.
        gate, rule, eps, detach, bptt_segments: see ``newllm.ops.infini_attention``.
        feature: ``elu1`` with initial ``feature_scale`` and ``feature_bias``, or ``dpfp`` with
            ``feature_order``.
        write_gate: learn, from its key, how much a token counts in the memory.
        decay: share of itself that the memory first keeps when a segment is written, learned per key/value
            head (None: all of it, always).
        short_conv: taps of a causal convolution over q and k of a layer with a memory (None: none).
        rope_theta: base of this module's own rotary tables; None leaves position embedding to the
            ``position_embeddings`` argument of ``forward``.
        bias, out_bias: biases of the q, k, v and of the output projection.
        qk_norm: eps of RMSNorms of q and k heads (Qwen3); None has none.

    Raises:
        ValueError: for head counts that do not divide, ``segment > window``, decay outside 0 to 1, one tap.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        window: int | None,
        segment: int | None = None,
        memory: bool = True,
        gate: GateKind = "sigmoid",
        rule: Rule = "linear",
        feature: Literal["elu1", "dpfp"] = "elu1",
        feature_scale: float = 4.0,
        feature_bias: float = -4.0,
        feature_order: int = 1,
        write_gate: bool = False,
        decay: float | None = None,
        short_conv: int | None = None,
        eps: float = 1e-6,
        detach: Detach = "none",
        bptt_segments: int | None = None,
        rope_theta: float | None = 10000.0,
        bias: bool = False,
        out_bias: bool = False,
        qk_norm: float | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads ({num_kv_heads}), got {num_heads}"
            )
        segment = segment or window
        if segment is None:
            raise ValueError("segment must be given when window is None, got None")
        if window is not None and segment > window:
            raise ValueError(f"segment must be at most window ({window}), got {segment}")
        self.head_dim = head_dim or hidden_size // num_heads
        self.window, self.segment = window, segment
        self.rule, self.eps = rule, eps
        self.detach, self.bptt_segments = detach, bptt_segments
        # What attends over whole sequences and chunks; one sliced over many devices takes another.
        self.attend: Callable[..., tuple[Tensor, InfiniState]] = ops.infini_attention
        self.layer_idx: int | None = None
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=out_bias)
        self.q_norm = None if qk_norm is None else RMSNorm(self.head_dim, qk_norm)
        self.k_norm = None if qk_norm is None else RMSNorm(self.head_dim, qk_norm)
        self.rotary = None if rope_theta is None else Rotary.from_theta(self.head_dim, rope_theta)
        self.memory_gate = MemoryGate(num_heads, gate) if memory else None
        gated = self.head_dim if write_gate else None
        self.memory_feature = (
            MemoryFeature(num_kv_heads, feature, feature_scale, feature_bias, feature_order, gated)
            if memory
            else None
        )
        self.memory_decay = MemoryDecay(num_kv_heads, decay) if memory and decay is not None else None
        channels = (num_heads + num_kv_heads) * self.head_dim
        self.short_conv = ShortConvolution(channels, short_conv) if memory and short_conv else None

    @classmethod
    def from_attention(
        cls,
        attention: nn.Module,
        *,
        window: int | None,
        segment: int | None = None,
        memory: bool = True,
        gate: GateKind = "tanh",
        **options: Any,
    ) -> InfiniAttention:
        """Take the place of a Llama-type attention of transformers (Llama, Mistral, Qwen2, Qwen3).

        The projections are shared, not copied; the ``tanh`` gate starts shut, so that the result is the
        original attention within the window. ``options`` are those of the constructor.

        Raises ``ValueError`` for another kind of attention, attention dropout, and rotary embeddings whose
        frequencies depend on length.
        """
        from newllm.modules.rope_config import rotary_from_config

        config: Any = getattr(attention, "config", None)
        if not hasattr(attention, "q_proj") or getattr(config, "model_type", None) not in FAMILIES:
            raise ValueError(
                f"attention must be the self_attn of a {', '.join(FAMILIES)} model, "
                f"got {type(attention).__name__}"
            )
        if config.attention_dropout:
            raise ValueError(f"attention_dropout must be 0, got {config.attention_dropout}")
        norm: Any = getattr(attention, "q_norm", None)
        module = cls(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            attention.head_dim,  # type: ignore[arg-type]
            window=window,
            segment=segment,
            memory=memory,
            gate=gate,
            rope_theta=None,
            qk_norm=None if norm is None else norm.variance_epsilon,
            **options,
        )
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            setattr(module, name, getattr(attention, name, None))
        module.rotary = rotary_from_config(config)
        module.layer_idx = attention.layer_idx  # type: ignore[assignment]
        weight = module.q_proj.weight
        return module.to(weight.device).train(attention.training)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        *,
        padding: Tensor | None = None,
        state: InfiniState | None = None,
        in_place: bool = False,
        segment_weight: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, InfiniState]:
        """Attend over ``hidden_states [B, T, hidden_size]``.

        Args:
            position_embeddings: (cos, sin) as the operator's ``rope``; unused when the module has rotary
                tables of its own.
            attention_mask: padding as ``[B, >= T]`` (its last T columns), True or 1 = real; or the causal
                mask ``[B, 1, T, >= T]`` of a transformers model, where each token's own column says the same.
            past_key_values: a transformers cache whose layer ``layer_idx`` keeps the state.
            padding: bool ``[B, T]``, True = real, in place of ``attention_mask``; not asked whether all are.
            state: the stream so far, instead of ``past_key_values``.
            in_place: write a single new token into ``state`` itself; inference only.
            segment_weight: see ``newllm.ops.infini_attention``.

        Returns:
            Output ``[B, T, hidden_size]`` and the state after the tokens.
        """
        batch, tokens = hidden_states.shape[:2]
        layer, seen = None, None
        if past_key_values is not None:
            from newllm.modules.cache import cache_layer

            if self.layer_idx is None:
                raise ValueError("past_key_values needs a module with a layer_idx; got layer_idx None")
            layer = cache_layer(past_key_values, self.layer_idx)
            state, seen = layer.read(batch), layer.get_seq_length()
            in_place = tokens == 1 and state is not None and not torch.is_grad_enabled()
        if padding is None:
            padding = padding_mask(attention_mask, tokens, seen)
        q, k, v, recent = self._project(hidden_states, state, padding)
        if in_place and state is not None:
            out = self.decode(q, k, v, state, position_embeddings, None if padding is None else padding[:, 0])
            if recent is not None and state.recent is not None:
                state.recent.copy_(recent)
        else:
            beta, options = self._options(q, state, position_embeddings)
            out, state = self.attend(
                q,
                k,
                v,
                beta,
                state=state,
                detach=self.detach,
                bptt_segments=self.bptt_segments,
                segment_weight=segment_weight if beta is not None else None,
                padding_mask=padding,
                **options,
            )
            state = state._replace(recent=recent)
        if layer is not None:
            layer.write(state, tokens)
        return self.o_proj(out.transpose(1, 2).reshape(batch, tokens, -1)), state

    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: InfiniState,
        position_embeddings: tuple[Tensor, Tensor] | None,
        active: Tensor | None,
    ) -> Tensor:
        """One new token ``[B, H, 1, K]`` in the ``active [B]`` rows, written into ``state``."""
        beta, options = self._options(q, state, position_embeddings)
        return ops.infini_decode(q, k, v, beta, state, active=active, **options)

    def _options(
        self, q: Tensor, state: InfiniState | None, position_embeddings: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """beta, and what else the operators are told beside tokens and state."""
        options: dict[str, Any] = {
            "window": self.window,
            "segment": self.segment,
            "rope": self._rope(position_embeddings, q.shape[2], state, q),
            "rule": self.rule,
            "eps": self.eps,
        }
        if self.memory_gate is None or self.memory_feature is None:
            return None, options
        options |= {"gate": self.memory_gate.kind, "feature": self.memory_feature()}
        if self.memory_decay is not None:
            options["decay"] = self.memory_decay()
        return self.memory_gate(), options

    def _project(
        self, x: Tensor, state: InfiniState | None, padding: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k and v ``[B, H, T, K]``, and what the short convolution has read last."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        recent = None
        if self.short_conv is not None:
            if state is not None and state.recent is None:
                raise ValueError(
                    "state.recent must be a tensor for a layer with a short convolution, got None"
                )
            joined, recent = self.short_conv(
                torch.cat([q, k], -1), None if state is None else state.recent, padding
            )
            q, k = joined.split([q.shape[-1], k.shape[-1]], -1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), recent

    def _rope(
        self, given: tuple[Tensor, Tensor] | None, tokens: int, state: InfiniState | None, like: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        if self.rotary is None:
            return given
        ring = self.window or self.segment
        table = self.rotary.kept if tokens == 1 and state is not None else self.rotary
        return table(rope_rows(tokens, ring, state is not None), like)


def rope_rows(tokens: int, ring: int, continued: bool) -> int:
    """Rows of the rotary table: the new tokens and, in a continued stream, all a window can reach."""
    return tokens + ring - 1 if continued else tokens


def padding_mask(
    attention_mask: Tensor | None, tokens: int, seen: int | Tensor | None = None
) -> Tensor | None:
    """Which of the last ``tokens`` tokens are real, bool ``[B, T]``, from any mask of transformers.

    A causal mask made for other layers of the model has columns for the ``seen`` tokens before, and behind
    them those that a static cache has reserved; one made for a window has dropped some (None: no columns
    are reserved). None when all are real (not asked in compiled code, nor of a single token, where it costs
    more than it saves).

    Raises ``TypeError`` for the block masks of flex_attention, ``ValueError`` for a causal mask that keeps
    several texts of a row apart (not asked in compiled code).
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        raise TypeError(
            f"attention_mask must be a tensor, got {type(attention_mask).__name__}: "
            "set attn_implementation to 'sdpa' or 'eager'"
        )
    asks, apart = tokens > 1 and not torch.compiler.is_compiling(), None
    if attention_mask.ndim == 4:
        before = attention_mask.shape[-1] - tokens
        if isinstance(seen, Tensor):
            first: int | Tensor = seen.clamp(max=before)
        else:
            first = before if seen is None else min(seen, before)
        row = torch.arange(tokens, device=attention_mask.device)
        real = _seen(attention_mask, row, first + row)
        if asks:
            apart = real[:, 1:] & real[:, :-1] & ~_seen(attention_mask, row[1:], first + row[:-1])
    else:
        real = attention_mask[:, -tokens:].bool()
    if not asks:
        return real
    # Both at once: the host waits for the answer.
    answers = [real.all()] if apart is None else [real.all(), apart.any()]
    complete, *divided = torch.stack(answers).tolist()
    if any(divided):
        raise ValueError(
            "attention_mask must be causal with padding alone, got one that keeps neighbours apart, "
            "as those of packed texts do: give each text a row of its own"
        )
    return None if complete else real


def _seen(mask: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Whether each of ``queries`` may see its one of ``keys``, bool ``[B, len(queries)]``."""
    entries = mask[:, 0, queries, keys]
    return entries if entries.dtype == torch.bool else entries == 0
