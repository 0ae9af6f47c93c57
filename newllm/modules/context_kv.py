"""Attention over a few contexts of the past instead of every key and value.

B batch, T queries, M slots, E embedding width, D width of a context (of all blocks together).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from newllm.modules.context_block import ContextLinear

SlotKind = Literal["chunk", "interval"]


class SlotRule(NamedTuple):
    """Which positions' contexts a query at position p attends to, besides its own.

    ``kind="chunk"``: those at the ends of whole chunks, ``chunk_size - 1``, ``2 chunk_size - 1`` and so on up
    to p. One at p itself counts once, as its own; ``duplicate_boundary`` lets it count twice. ``kind=
    "interval"``: p - I, p - 2 I and so on, I being ``chunk_size``. ``max_contexts`` keeps the newest so many,
    its own among them; None keeps all, so that memory grows by one slot a chunk. Positions are counted from
    the start of a document.
    """

    chunk_size: int = 100
    kind: SlotKind = "chunk"
    max_contexts: int | None = None
    duplicate_boundary: bool = False

    def checked(self) -> SlotRule:
        """Itself; raises ``ValueError`` for sizes and kinds that do not exist."""
        if self.kind not in ("chunk", "interval"):
            raise ValueError(f"kind must be 'chunk' or 'interval', got {self.kind!r}")
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {self.chunk_size}")
        if self.max_contexts is not None and self.max_contexts < 1:
            raise ValueError(f"max_contexts must be at least 1 or None, got {self.max_contexts}")
        if self.kind == "interval" and self.max_contexts is None:
            raise ValueError("max_contexts must be given for kind 'interval', got None")
        return self

    def stores(self, positions: Tensor) -> Tensor:
        """Whether the context at each of ``positions`` is kept as a slot, bool of the same shape."""
        if self.kind == "interval":
            return torch.ones_like(positions, dtype=torch.bool)
        return (positions + 1) % self.chunk_size == 0

    def visible(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Which of ``slots [..., M]`` queries at ``positions [..., T]`` see, bool ``[..., T, M]``.

        Both are positions in a document; -1 is an empty slot. A query's own context is not among them, except
        by ``duplicate_boundary``.
        """
        slot, query = slots[..., None, :], positions[..., :, None]
        own = query if self.duplicate_boundary else query - 1
        seen = (slot >= 0) & (slot <= own) & self.stores(slot)
        if self.kind == "interval":
            assert self.max_contexts is not None
            age = query - slot
            return seen & (age % self.chunk_size == 0) & (age < self.max_contexts * self.chunk_size)
        if self.max_contexts is None:
            return seen
        # The newest slot that this query sees ends chunk number `newest`.
        newest = (own + 1) // self.chunk_size
        return seen & ((slot + 1) // self.chunk_size > newest - (self.max_contexts - 1))

    @property
    def capacity(self) -> int | None:
        """How many slots any later query may still see; None without a bound."""
        if self.max_contexts is None:
            return None
        if self.kind == "interval":
            return (self.max_contexts - 1) * self.chunk_size
        return self.max_contexts - 1


def visible_positions(position: int, rule: SlotRule) -> list[int]:
    """All positions whose contexts a query at ``position`` attends to, in order, its own last."""
    slots = torch.arange(position + 1)
    seen = rule.checked().visible(slots, torch.tensor([position]))[0]
    return [*slots[seen].tolist(), position]


class ContextKVAttention(nn.Module):
    """softmax(q K^T / sqrt(d)) V over contexts: q from the token's embedding x, K and V from contexts.

    y = LN(x + W_o attention). Keys and values of a slot are projected once, by :meth:`project`, and used by
    every query that sees it.

    Args:
        embed_dim: E.
        context_dim: D.
        heads: heads of E / heads numbers.
        dropout: of attention weights, in training.

    Raises:
        ValueError: when heads do not divide E.
    """

    def __init__(self, embed_dim: int, context_dim: int, heads: int = 8, *, dropout: float = 0.1) -> None:
        super().__init__()
        if heads < 1 or embed_dim % heads:
            raise ValueError(f"heads must divide embed_dim ({embed_dim}), got {heads}")
        self.heads = heads
        self.query = ContextLinear(embed_dim, embed_dim)
        self.key = ContextLinear(context_dim, embed_dim)
        self.value = ContextLinear(context_dim, embed_dim)
        self.out = ContextLinear(embed_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)

    def project(self, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[..., E]`` of ``contexts [..., D]``."""
        return self.key(contexts), self.value(contexts)

    def forward(
        self, x: Tensor, own: tuple[Tensor, Tensor], slots: tuple[Tensor, Tensor], visible: Tensor
    ) -> Tensor:
        """Attend from ``x [B, T, E]``.

        Args:
            x: normalised embeddings.
            own: key and value of each query's own context, ``[B, T, E]`` both.
            slots: keys and values of earlier contexts, ``[B, M, E]`` both; M may be 0.
            visible: which slots a query sees, bool ``[B, T, M]``. Others take no part at all.

        Returns:
            ``[B, T, E]``.
        """
        query = self._split(self.query(x)) / (x.shape[-1] // self.heads) ** 0.5
        (key, value), (keys, values) = map(self._split, own), map(self._split, slots)
        scores = torch.einsum("bthd,bmhd->bhtm", query, keys)
        scores = scores.masked_fill(~visible[:, None], -torch.inf)
        itself = (query * key).sum(-1).transpose(1, 2)[..., None]
        weights = self.dropout(torch.cat([scores, itself], -1).softmax(-1))
        mixed = torch.einsum("bhtm,bmhd->bthd", weights[..., :-1], values)
        mixed = mixed + weights[..., -1].transpose(1, 2)[..., None] * value
        attended: Tensor = self.norm(x + self.out(mixed.flatten(-2)))
        return attended

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))
