"""What each head takes from its memory, and how full the memories are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from newllm.evaluation.forced import evaluating
from newllm.models.senri import SenriForCausalLM
from newllm.modules import InfiniAttention
from newllm.modules.cache import cache_layer
from newllm.modules.memory_health import measure

_TINY = 1e-300


class HeadUse(NamedTuple):
    """One query head: its ``gate`` g, and its ``share``, how much of its output came from the memory.

    The share is |g A_mem| / (|g A_mem| + |(1 - g) A_dot|), lengths averaged over tokens and head widths.
    """

    layer: int
    head: int
    gate: float
    share: float


class LayerFill(NamedTuple):
    """One layer's memory: effective rank as a share of the largest, and the length of its norm vector."""

    layer: int
    rank_ratio: float
    norm: float


@torch.no_grad()
def memory_use(
    model: SenriForCausalLM, ids: Tensor, *, chunk: int = 1024
) -> tuple[list[HeadUse], list[LayerFill]]:
    """Read ``ids [N]`` and report every head with a memory, and every memory at the end.

    What a head outputs is split by computing each layer once more without its memory. Tokens of the first
    segment, whose memory is empty, count as the others.
    """
    cache = DynamicCache(config=model.config)
    with evaluating(model), _watched(model) as watches:
        for part in ids[None].split(chunk, 1):
            model(part.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    heads = [
        HeadUse(layer, head, float(gate), remembered / max(remembered + local, _TINY))
        for layer, watch in watches.items()
        for head, (gate, (remembered, local)) in enumerate(zip(watch.gate, watch.sums.tolist(), strict=True))
    ]
    fills = []
    for number in watches:
        state = cache_layer(cache, number).state
        assert state is not None
        if state.matrix is None or state.norm is None:  # another layer holds the memory that it shares
            continue
        health = measure(state.matrix, state.norm, clean_above=1.0, warn_above=1.0)
        fills.append(LayerFill(number, health.rank_ratio, health.normalizer_norm))
    return heads, fills


class _Watch:
    """Hooks of one layer with a memory: per head its gate and the lengths of what memory and window gave."""

    def __init__(self, module: InfiniAttention) -> None:
        assert module.memory_gate is not None
        self.gate = module.memory_gate.openness().cpu()
        self.sums = torch.zeros(len(self.gate), 2, dtype=torch.float64)
        self._heads = torch.zeros(0)
        self.handles = [
            module.o_proj.register_forward_pre_hook(self._keep),
            module.register_forward_hook(self._compare, with_kwargs=True),
        ]

    def _keep(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._heads = args[0].unflatten(-1, (len(self.gate), -1)).double().cpu()

    def _compare(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        mixed, state, gate = self._heads, kwargs["state"], module.memory_gate
        bare = None if state is None else state._replace(matrix=None, norm=None)
        module.memory_gate = None
        module.forward(*args, **{**kwargs, "state": bare})
        module.memory_gate = gate
        local = (1 - self.gate.double())[:, None] * self._heads
        lengths = torch.stack([(mixed - local).norm(dim=-1), local.norm(dim=-1)], -1)
        self.sums += lengths.sum((0, 1))


@contextmanager
def _watched(model: SenriForCausalLM) -> Iterator[dict[int, _Watch]]:
    """Watches on the layers with a memory, by their number."""
    layers: Any = enumerate(model.model.layers)
    found = {number: _Watch(layer.self_attn) for number, layer in layers if layer.self_attn.memory_gate}
    try:
        yield found
    finally:
        for watch in found.values():
            for handle in watch.handles:
                handle.remove()
