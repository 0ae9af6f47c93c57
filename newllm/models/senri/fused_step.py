"""One token through a block by few kernels, where its modules are what those kernels compute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP

from newllm import backend as backends, ops
from newllm.modules.infini_attention import InfiniAttention
from newllm.modules.norm import RMSNorm
from newllm.ops.checks import autocast_dtype
from newllm.ops.gemv_fused import LENGTH, declined
from newllm.types import InfiniState

if TYPE_CHECKING:
    from newllm.models.senri.modeling import SenriBlock


def fits(block: SenriBlock, hidden_states: Tensor) -> bool:
    """Whether :func:`step` computes what ``block``'s modules do, by kernels.

    Not for adapters in place of a projection, quantised weights, biases, hooks, autocast, or many rows.
    """
    if backends.resolve("gemv", hidden_states.device) != "fused":
        return False
    attention, mlp, dtype = block.self_attn, block.mlp, hidden_states.dtype
    if not (_untouched(attention, InfiniAttention) and _untouched(mlp, LlamaMLP)):
        return False
    norms = (block.input_layernorm, block.post_attention_layernorm)
    linear = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    linear += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return (
        hidden_states.shape[1] == 1
        and all(_untouched(norm, RMSNorm) and _plain(norm.weight, dtype) for norm in norms)
        and all(_is_matrix(one, dtype) for one in linear)
        and attention.q_norm is None
        and attention.short_conv is None
        and _untouched(mlp.act_fn, SiLUActivation)
        and autocast_dtype(hidden_states.device.type) is None
        and declined(hidden_states[:, 0], (), None, None) is None
    )


def step(
    block: SenriBlock,
    hidden_states: Tensor,
    rope: tuple[Tensor, Tensor],
    padding: Tensor | None,
    state: InfiniState,
) -> Tensor:
    """``hidden_states [B, 1, hidden_size]`` -> the same, the token written into ``state``."""
    attention, mlp = block.self_attn, block.mlp
    x = hidden_states[:, 0]
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    joined = _normed(x, block.input_layernorm, *projections)
    parts = joined.split([each.out_features for each in projections], -1)
    q, k, v = (part.unflatten(-1, (-1, attention.head_dim))[:, :, None] for part in parts)
    out = attention.decode(q, k, v, state, rope, None if padding is None else padding[:, 0])
    x = ops.gemv(out.flatten(1), (attention.o_proj.weight,), residual=x)
    wide = _normed(x, block.post_attention_layernorm, mlp.gate_proj, mlp.up_proj, swiglu=True)
    return ops.gemv(wide, (mlp.down_proj.weight,), residual=x)[:, None]


def _normed(x: Tensor, norm: RMSNorm, *linear: nn.Linear, swiglu: bool = False) -> Tensor:
    weights = tuple(each.weight for each in linear)
    return ops.gemv(x, weights, norm=norm.weight, eps=norm.eps, swiglu=swiglu)


def _untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether nothing has taken the place of the class's own forward pass."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return type(module) is kind and not hooked and "forward" not in module.__dict__


def _is_matrix(linear: Any, dtype: torch.dtype) -> bool:
    """Whether a module is no more than a matrix that the kernel takes."""
    plain = _untouched(linear, nn.Linear) and _plain(linear.weight, dtype)
    return plain and linear.bias is None and linear.in_features <= LENGTH


def _plain(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a weight is a table of numbers of this dtype, and no subclass that stands for others."""
    return type(weight) is nn.Parameter and weight.dtype == dtype and weight.is_contiguous()
