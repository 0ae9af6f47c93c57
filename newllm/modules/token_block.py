"""Token blocks: next-token features from the embedding of a token and the contexts at it.

E embedding width, C context width, L layers, k input tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from newllm.modules.context_block import ContextLinear

Plan = Literal["A", "D", "E", "F", "G"]


class TokenLayer(nn.Module):
    """t <- LN(R(t) + GELU(W [c ; t] + b)), R the identity, or a linear map where widths differ.

    Args:
        context_dim: width of the context it reads, 0 for none.
        in_dim: width of the token features it reads.
        out_dim: width of those it makes.
        moves_context: it also makes a new context, from the same linear map.
    """

    def __init__(self, context_dim: int, in_dim: int, out_dim: int, *, moves_context: bool = False) -> None:
        super().__init__()
        self.out_dim = out_dim
        self.linear = ContextLinear(context_dim + in_dim, out_dim + (context_dim if moves_context else 0))
        self.residual = nn.Identity() if in_dim == out_dim else ContextLinear(in_dim, out_dim)
        self.norm = nn.LayerNorm(out_dim)
        self.context_norm = nn.LayerNorm(context_dim) if moves_context else None

    def forward(self, tokens: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``tokens [..., in_dim]``, ``context [..., C]`` to ``[..., out_dim]`` and the next context."""
        joined = tokens if context is None else torch.cat([context, tokens], -1)
        change = F.gelu(self.linear(joined))
        if self.context_norm is not None and context is not None:
            context = self.context_norm(context + change[..., self.out_dim :])
        return self.norm(self.residual(tokens) + change[..., : self.out_dim]), context


class TokenBlock(nn.Module):
    """A stack of token layers over frozen or living contexts.

    Which contexts layer i reads is the ``plan``: A the final one; D the same, changed by every layer on the
    way; E that of layer i of the ContextBlock; F the final one in layer 1 alone; G the one before the token
    in layer 1 and the final one in the others.

    Args:
        context_dim: C.
        embed_dim: E, the width of the result.
        layers: L.
        plan: A, D, E, F or G.
        input_tokens: k; features shrink from k * E to E in equal steps over the layers.

    Raises:
        ValueError: for an unknown plan, sizes below 1, or plan G with a single layer.
    """

    def __init__(
        self,
        context_dim: int,
        embed_dim: int,
        layers: int = 1,
        *,
        plan: Plan = "E",
        input_tokens: int = 1,
    ) -> None:
        super().__init__()
        if plan not in get_args(Plan):
            raise ValueError(f"plan must be one of {', '.join(get_args(Plan))}, got {plan!r}")
        least = 2 if plan == "G" else 1
        if layers < least:
            raise ValueError(f"layers must be at least {least} for plan {plan}, got {layers}")
        self.plan: Plan = plan
        wide = input_tokens * embed_dim
        widths = [wide + (embed_dim - wide) * layer // layers for layer in range(layers + 1)]
        self.layers = nn.ModuleList(
            TokenLayer(
                0 if plan == "F" and layer > 0 else context_dim,
                widths[layer],
                widths[layer + 1],
                moves_context=plan == "D",
            )
            for layer in range(layers)
        )

    @property
    def reads(self) -> int:
        """How many contexts :meth:`forward` takes: L by plan E, 2 by plan G, otherwise 1."""
        return len(self.layers) if self.plan == "E" else 2 if self.plan == "G" else 1

    def choose(self, outputs: Sequence[Tensor], before: Tensor) -> list[Tensor]:
        """Of a ContextBlock's layer outputs and the context ``before`` each token, those that are read."""
        if self.plan == "E":
            return list(outputs)
        return [before, outputs[-1]] if self.plan == "G" else [outputs[-1]]

    def forward(self, tokens: Tensor, contexts: Sequence[Tensor]) -> Tensor:
        """``tokens [..., k * E]`` and ``reads`` contexts ``[..., C]`` to ``[..., E]``.

        Raises ``ValueError`` for another number of contexts.
        """
        if len(contexts) != self.reads:
            raise ValueError(
                f"contexts must hold {self.reads} tensors for plan {self.plan} with "
                f"{len(self.layers)} layers, got {len(contexts)}"
            )
        carried: Tensor | None = contexts[0]
        for place, layer in enumerate(self.layers):
            given = self._context(place, contexts, carried)
            tokens, carried = layer(tokens, given)
        return tokens

    def _context(self, place: int, contexts: Sequence[Tensor], carried: Tensor | None) -> Tensor | None:
        if self.plan == "E":
            return contexts[place]
        if self.plan == "G":
            return contexts[min(place, 1)]
        if self.plan == "F":
            return contexts[0] if place == 0 else None
        return carried
