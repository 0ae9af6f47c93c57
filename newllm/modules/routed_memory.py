"""Many small memories, each token's chosen by the direction of its key.

Sizes: H heads, S slots, K key width, F feature width, V value width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from newllm.modules.gate import MemoryFeature
from newllm.ops import checks
from newllm.reference.features import feature_map, feature_width, key_features
from newllm.reference.memory import state_dtype
from newllm.types import FeatureMap


class RoutedState(NamedTuple):
    """``matrix [B, H, S, F, V]`` and ``norm [B, H, S, F]``, float32 (float64 of float64 tokens)."""

    matrix: Tensor
    norm: Tensor


def orthogonal_directions(num_heads: int, slots: int, width: int, *, seed: int = 0) -> Tensor:
    """Orthonormal directions ``[H, S, K]``, float32, drawn from ``seed``.

    Raises ``ValueError`` for more slots than a key is wide: no more directions are orthogonal, and one that
    is never the nearest would be a slot that nothing reaches.
    """
    checks.require(1 <= slots <= width, "slots", slots, f"from 1 to the key width, {width}")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(num_heads, width, slots, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn)[0].mT.float().contiguous()


def route(x: Tensor, directions: Tensor, top: int = 1) -> Tensor:
    """The ``top`` slots whose directions are nearest to ``x [B, H, T, K]``: int64 ``[B, H, T, top]``.

    A function of each token alone: the same in training, prefill and decoding.
    """
    scores = x.to(directions.dtype) @ directions.mT
    return scores.topk(top, dim=-1).indices


def routed_update(
    k: Tensor,
    v: Tensor,
    state: RoutedState | None,
    directions: Tensor,
    *,
    feature: FeatureMap | None = None,
    padding_mask: Tensor | None = None,
) -> RoutedState:
    """Write each of ``k [B, H, T, K]``, ``v [B, H, T, V]`` to its slot: M += sigma(k)^T v, z += sigma(k).

    ``padding_mask`` is bool ``[B, T]``, True = real.
    """
    kind = state_dtype(k.dtype)
    features = key_features(k.to(kind), feature)
    if padding_mask is not None:
        features = features * padding_mask[:, None, :, None]
    chosen = nn.functional.one_hot(route(k, directions)[..., 0], directions.shape[1]).to(kind)
    matrix = torch.einsum("bhts,bhtf,bhtv->bhsfv", chosen, features, v.to(kind))
    norm = torch.einsum("bhts,bhtf->bhsf", chosen, features)
    return (
        RoutedState(matrix, norm) if state is None else RoutedState(state.matrix + matrix, state.norm + norm)
    )


def routed_retrieve(
    q: Tensor,
    state: RoutedState,
    directions: Tensor,
    *,
    top: int = 1,
    feature: FeatureMap | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Read ``q [B, H, T, K]`` from its ``top`` slots as one memory: ``[B, H, T, V]`` in q's dtype.

    With all slots it is the answer of a single memory that everything was written to.
    """
    features = feature_map(q.to(state.norm.dtype), feature)
    chosen = nn.functional.one_hot(route(q, directions, top), directions.shape[1]).sum(-2).to(features.dtype)
    found = torch.einsum("bhts,bhtf,bhsfv->bhtv", chosen, features, state.matrix)
    weight = torch.einsum("bhts,bhtf,bhsf->bht", chosen, features, state.norm)
    return (found / weight.clamp(min=eps)[..., None]).to(q.dtype)


class RoutedMemory(nn.Module):
    """``slots`` memories of orthogonal directions with explicit state.

    Args:
        num_heads: heads H of keys, queries and values.
        head_dim: width K of keys and queries.
        slots: memories a head, at most ``head_dim``.
        top: slots that a query reads.
        feature: feature map of keys and queries; None is ``MemoryFeature(num_heads)``.
        seed: of the directions, which are kept with the weights.

    Raises:
        ValueError: for more slots than directions, or a ``top`` outside 1 to ``slots``.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        slots: int,
        top: int = 1,
        feature: MemoryFeature | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.require(1 <= top <= slots, "top", top, f"from 1 to slots, {slots}")
        self.top = top
        self.feature = MemoryFeature(num_heads) if feature is None else feature
        self.directions: Tensor
        self.register_buffer("directions", orthogonal_directions(num_heads, slots, head_dim, seed=seed))

    def empty(self, batch_size: int, value_dim: int) -> RoutedState:
        """The state before the first token."""
        heads, slots, width = self.directions.shape
        features = feature_width(self.feature(), width)
        matrix = self.directions.new_zeros(batch_size, heads, slots, features, value_dim)
        return RoutedState(matrix, matrix.new_zeros(batch_size, heads, slots, features))

    def update(
        self, k: Tensor, v: Tensor, state: RoutedState | None = None, padding_mask: Tensor | None = None
    ) -> RoutedState:
        """See :func:`routed_update`."""
        return routed_update(k, v, state, self.directions, feature=self.feature(), padding_mask=padding_mask)

    def retrieve(self, q: Tensor, state: RoutedState) -> Tensor:
        """See :func:`routed_retrieve`."""
        return routed_retrieve(q, state, self.directions, top=self.top, feature=self.feature())
