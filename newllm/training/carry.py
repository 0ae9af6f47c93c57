"""States that are carried from batch to batch in training, one set of rows each (truncated BPTT)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from newllm.modules.cache import cache_layer
from newllm.types import InfiniState

Saved = dict[int, list[tuple[int, list[Tensor | None]]]]


class CarriedStates:
    """The caches of the sets of rows that take turns; gradients end at the border of a batch.

    For models whose cache layers hold a ``state`` with ``map``, as Senri's do.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.caches: dict[int, DynamicCache] = {}

    def enter(self, chosen: int, reset: Tensor) -> DynamicCache:
        """The cache for the next batch of set ``chosen``; rows in ``reset [B]`` (bool) start empty."""
        cache = self.caches.setdefault(chosen, DynamicCache(config=self.config))
        _each(cache, lambda tensor: torch.where(_rows(~reset, tensor), tensor.detach(), 0))
        return cache

    def leave(self) -> None:
        """Let the graphs of all batches go."""
        for cache in self.caches.values():
            _each(cache, Tensor.detach)

    def state_dict(self) -> Saved:
        """Per set and layer, the tokens seen and the state's tensors."""
        return {
            chosen: [(int(layer.get_seq_length()), list(layer.state)) for layer in cache.layers]
            for chosen, cache in self.caches.items()
        }

    def load_state_dict(self, saved: Saved, device: torch.device) -> None:
        """Take up what :meth:`state_dict` gave."""
        self.caches = {chosen: DynamicCache(config=self.config) for chosen in saved}
        for chosen, layers in saved.items():
            for place, (tokens, tensors) in enumerate(layers):
                moved = (None if tensor is None else tensor.to(device) for tensor in tensors)
                cache_layer(self.caches[chosen], place).write(InfiniState(*moved), tokens)  # type: ignore[arg-type]


def _each(cache: DynamicCache, change: Callable[[Tensor], Tensor]) -> None:
    for layer in cache.layers:
        state = getattr(layer, "state", None)
        if state is not None:
            layer.state = state.map(change)


def _rows(keep: Tensor, like: Tensor) -> Tensor:
    return keep.to(like.device).view(-1, *[1] * (like.ndim - 1))
