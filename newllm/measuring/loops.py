"""The Infini layer as its papers write it: a Python loop over segments. What users have without newllm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def segment_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: Tensor,
    bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    window: int,
    segment: int,
    eps: float = 1e-6,
) -> Tensor:
    """Retrieve, attend, mix, update, segment by segment, with a float32 state; linear rule, empty at first.

    q ``[B, H, T, K]``, k ``[B, Hkv, T, K]``, v ``[B, Hkv, T, V]``, beta ``[H]``, scale and bias ``[Hkv]``,
    cos and sin ``[T, K]`` -> ``[B, H, T, V]``.
    """
    batch, heads, tokens, width = q.shape
    groups = heads // k.shape[1]
    rotated_q = _rotate(q, cos, sin)
    # Repeated, because SDPA's kernels with a mask do not share keys between query heads.
    rotated_k, repeated_v = (x.repeat_interleave(groups, 1) for x in (_rotate(k, cos, sin), v))
    wide = torch.promote_types(q.dtype, torch.float32)
    matrix = torch.zeros(batch, k.shape[1], width, v.shape[3], device=q.device, dtype=wide)
    norm = torch.zeros(batch, k.shape[1], width, device=q.device, dtype=wide)
    gate = beta.sigmoid().to(q.dtype)[:, None, None]
    outputs = []
    for start in range(0, tokens, segment):
        end, first = min(start + segment, tokens), max(0, start - window + 1)
        queries = _features(
            q[:, :, start:end], scale.repeat_interleave(groups), bias.repeat_interleave(groups)
        )
        queries = queries.unflatten(1, (-1, groups)).flatten(2, 3)
        weight = queries @ norm.to(q.dtype)[..., None]
        recalled = (queries @ matrix.to(q.dtype) / weight.clamp(min=eps)).view(batch, heads, end - start, -1)
        local = F.scaled_dot_product_attention(
            rotated_q[:, :, start:end],
            rotated_k[:, :, first:end],
            repeated_v[:, :, first:end],
            attn_mask=_band(start, end, first, window, q.device),
        )
        outputs.append(local + gate * (recalled - local))
        keys = _features(k[:, :, start:end], scale, bias)
        matrix = matrix + (keys.transpose(-1, -2) @ v[:, :, start:end]).to(wide)
        norm = norm + keys.to(wide).sum(2)
    return torch.cat(outputs, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def _features(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.elu(x * scale.to(x.dtype)[:, None, None] + bias.to(x.dtype)[:, None, None]) + 1


def _band(start: int, end: int, first: int, window: int, device: torch.device) -> Tensor:
    query = torch.arange(start, end, device=device)[:, None]
    distance = query - torch.arange(first, end, device=device)
    return (distance >= 0) & (distance < window)
