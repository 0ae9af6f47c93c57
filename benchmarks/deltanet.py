"""DeltaNet as a peer: Senri's model with each attention layer exchanged for one of equal state.

The layer is flash-linear-attention's where that is installed beside a GPU, and otherwise this file's, in
plain PyTorch, chunk by chunk (Yang et al. 2024, arXiv 2406.06484): q and k through a short convolution, SiLU
and the unit sphere, v through the first two, S <- S + beta k^T (v - k S), o = q S behind an RMSNorm.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from newllm.backend import devices, installed
from newllm.models.senri import SenriForCausalLM

_TAPS, _CHUNK, _EVEN, _BYTES = 4, 64, 16, 4


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, chunk: int = _CHUNK) -> Tensor:
    """o_t = q_t S_t, S_t = S_{t-1} + beta_t k_t^T (v_t - k_t S_{t-1}), from S = 0.

    q and k ``[B, H, T, K]``, v ``[B, H, T, V]``, beta ``[B, H, T]`` -> ``[B, H, T, V]``. Within a chunk the
    tokens' corrections are solved for at once: (I + tril(beta k k^T, -1)) u = beta (v - k S).
    """
    tokens = q.shape[2]
    missing = -tokens % chunk
    q, k, v = (F.pad(x, (0, 0, 0, missing)).unflatten(2, (-1, chunk)) for x in (q, k, v))
    beta = F.pad(beta, (0, missing)).unflatten(2, (-1, chunk))[..., None]
    system = torch.eye(chunk, dtype=q.dtype, device=q.device) + (beta * k @ k.mT).tril(-1)
    solved = torch.linalg.solve_triangular(
        system, torch.cat([beta * k, beta * v], -1), upper=False, unitriangular=True
    )
    known, new = solved.split([k.shape[-1], v.shape[-1]], -1)
    within = (q @ k.mT).tril()
    state = q.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1])
    outputs = []
    for n in range(q.shape[2]):
        written = new[:, :, n] - known[:, :, n] @ state
        outputs.append(q[:, :, n] @ state + within[:, :, n] @ written)
        state = state + k[:, :, n].mT @ written
    return torch.cat(outputs, 2)[:, :, :tokens]


class DeltaNet(nn.Module):
    """One layer: ``hidden_states [B, T, hidden_size]`` to the same; heads of ``key`` by ``value``."""

    def __init__(self, hidden_size: int, heads: int, key: int, value: int) -> None:
        super().__init__()
        self.heads = heads
        self.widths = [heads * key, heads * key, heads * value]
        self.qkv_proj = nn.Linear(hidden_size, sum(self.widths), bias=False)
        self.conv = nn.Conv1d(sum(self.widths), sum(self.widths), _TAPS, groups=sum(self.widths), bias=False)
        self.b_proj = nn.Linear(hidden_size, heads, bias=False)
        self.o_norm = nn.RMSNorm(value, eps=1e-5)
        self.o_proj = nn.Linear(heads * value, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The output ``[B, T, hidden_size]``."""
        mixed = F.silu(self.conv(F.pad(self.qkv_proj(hidden_states).mT, (_TAPS - 1, 0))).mT)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in mixed.split(self.widths, -1)
        )
        beta = self.b_proj(hidden_states).sigmoid().transpose(1, 2)
        # Solving wants float32, whatever autocast made of the projections.
        with torch.autocast(q.device.type, enabled=False):
            q, k, v, beta = (x.float() for x in (q, k, v, beta))
            out = delta_rule(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, beta)
        out = self.o_norm(out).to(hidden_states.dtype)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class _InPlaceOfAttention(nn.Module):
    """A layer that a Senri block calls like its attention; whole sequences only."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        out = self.layer(hidden_states)
        return (out[0] if isinstance(out, tuple) else out), None


def state_bytes(heads: int, key: int, value: int) -> int:
    """Bytes of a layer's state in float32: its matrices, and what its convolutions read last."""
    return _BYTES * heads * (key * value + (_TAPS - 1) * (2 * key + value))


def with_deltanet(model: SenriForCausalLM, layer_bytes: int) -> tuple[SenriForCausalLM, str, int]:
    """``model`` with DeltaNet layers of at least ``layer_bytes`` of state each, whose, and all their bytes.

    Keys are as wide as the model's heads; values take what is left, in steps of 16.
    """
    config: Any = model.config
    heads, key, hidden = config.num_attention_heads, config.head_dim, config.hidden_size
    least = (layer_bytes / (_BYTES * heads) - 2 * (_TAPS - 1) * key) / (key + _TAPS - 1)
    value = _EVEN * math.ceil(least / _EVEN)
    whose = "fla" if installed("fla.layers") and len(devices()) > 1 else "plain torch"
    for block in model.model.layers:
        block.self_attn = _InPlaceOfAttention(_layer(whose, hidden, heads, key, value))  # type: ignore[assignment]
    return model, whose, config.num_hidden_layers * state_bytes(heads, key, value)


def _layer(whose: str, hidden: int, heads: int, key: int, value: int) -> nn.Module:
    if whose == "plain torch":
        return DeltaNet(hidden, heads, key, value)
    from fla.layers import DeltaNet as Peer

    return Peer(  # type: ignore[no-any-return]
        mode="chunk", hidden_size=hidden, num_heads=heads, expand_k=heads * key / hidden,
        expand_v=heads * value / hidden, conv_size=_TAPS,
    )  # fmt: skip
