"""Context layers and blocks: contexts of a fixed width that every token rewrites.

N or T tokens, E embedding width, C context width, L layers, k input tokens.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from newllm import ops
from newllm.reference.context import LAYER_NORM_EPS
from newllm.types import ContextParams, SweepInfo

Start = Literal["zero", "wrap"]
Method = Literal["auto", "sequential", "block", "jacobi"]
WEIGHT_STD, BIAS_STD = 0.1, 0.01
"""Standard deviations of the initial weights and biases of every linear map in these blocks."""


class ContextLinear(nn.Linear):
    """A linear map with weights from N(0, 0.1^2) and biases from N(0, 0.01^2)."""

    def reset_parameters(self) -> None:
        """Draw weights and biases anew."""
        nn.init.normal_(self.weight, std=WEIGHT_STD)
        nn.init.normal_(self.bias, std=BIAS_STD)


class ContextLayer(nn.Module):
    """c <- LN(c + GELU(W [c ; x] + b)), which reads the token at every layer.

    Args:
        context_dim: C.
        input_dim: width of x.
    """

    def __init__(self, context_dim: int, input_dim: int) -> None:
        super().__init__()
        self.linear = ContextLinear(context_dim + input_dim, context_dim)
        self.norm = nn.LayerNorm(context_dim, LAYER_NORM_EPS)

    def forward(self, context: Tensor, x: Tensor) -> Tensor:
        """``context [..., C]`` before and ``x [..., input_dim]`` at a token, to the context after it."""
        context = self.norm(context + F.gelu(self.linear(torch.cat([context, x], -1))))
        return context


class ContextBlock(nn.Module):
    """A stack of context layers, and its sweeps over sequences.

    Args:
        context_dim: C, of all layers.
        embed_dim: E.
        layers: L.
        input_tokens: k, embeddings that a token brings: its own and those of the k - 1 tokens before.

    Raises:
        ValueError: for sizes below 1.
    """

    def __init__(self, context_dim: int, embed_dim: int, layers: int = 1, *, input_tokens: int = 1) -> None:
        super().__init__()
        for name, value in (
            ("context_dim", context_dim),
            ("embed_dim", embed_dim),
            ("layers", layers),
            ("input_tokens", input_tokens),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.context_dim, self.embed_dim, self.input_tokens = context_dim, embed_dim, input_tokens
        self.layers = nn.ModuleList(
            ContextLayer(context_dim, input_tokens * embed_dim) for _ in range(layers)
        )

    def params(self) -> ContextParams:
        """The layers' parameters, stacked as ``ops.context_sweep`` takes them."""
        layers: list[Any] = list(self.layers)
        weight = torch.stack([layer.linear.weight for layer in layers])
        return ContextParams(
            weight_c=weight[..., : self.context_dim],
            weight_x=weight[..., self.context_dim :],
            bias=torch.stack([layer.linear.bias for layer in layers]),
            ln_weight=torch.stack([layer.norm.weight for layer in layers]),
            ln_bias=torch.stack([layer.norm.bias for layer in layers]),
        )

    def inputs(self, embeddings: Tensor, before: Tensor | None = None) -> Tensor:
        """What the layers read: ``[B, T, E]`` to ``[B, T, k * E]``, as ``recent_tokens``."""
        return recent_tokens(embeddings, self.input_tokens, before)

    def forward(
        self, x: Tensor, state: Tensor | None = None, *, method: Method = "auto"
    ) -> tuple[Tensor, Tensor, SweepInfo]:
        """The recurrence itself over ``x [B, T, k * E]``: arguments and results of ``ops.context_sweep``."""
        return ops.context_sweep(x, self.params(), state=state, method=method)

    def step(self, context: Tensor, x: Tensor) -> list[Tensor]:
        """All tokens side by side: the context before each ``[..., C]`` to those after each layer."""
        outputs = []
        for layer in self.layers:
            context = layer(context, x)
            outputs.append(context)
        return outputs


def recent_tokens(x: Tensor, count: int, before: Tensor | None = None) -> Tensor:
    """Each token's embedding behind those of the ``count - 1`` tokens before it.

    Args:
        x: embeddings ``[B, T, E]``.
        count: embeddings that are joined, the token's own included.
        before: those of the tokens before the first, ``[B, count - 1, E]``; None is zeros.

    Returns:
        ``[B, T, count * E]``, the oldest first.
    """
    if count == 1:
        return x
    if before is None:
        before = x.new_zeros(len(x), count - 1, x.shape[-1])
    joined = torch.cat([before, x], 1)
    return torch.cat([joined[:, place : place + x.shape[1]] for place in range(count)], -1)


def shift_contexts(contexts: Tensor, start: Start = "zero") -> Tensor:
    """The context before each token from that after each: ``[..., N, C]`` to the same.

    Before the first token stand zeros, or with ``start="wrap"`` the context after the last.

    Raises ``ValueError`` for another ``start``.
    """
    if start not in ("zero", "wrap"):
        raise ValueError(f"start must be 'zero' or 'wrap', got {start!r}")
    rolled = contexts.roll(1, -2)
    if start == "zero":
        rolled[..., 0, :] = 0
    return rolled
