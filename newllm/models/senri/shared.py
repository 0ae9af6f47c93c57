"""One memory for several layers: lent to each as it was before a segment, together with what all wrote.

Each layer reads the memory that stood before the segment, so a token sees no later one, whatever the layer;
segments are therefore read one after the other. The first of the layers holds the memory in its state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from newllm.types import InfiniState

States = list[InfiniState | None]


def segment_ends(position: Tensor | None, real: Tensor | None, tokens: int, segment: int) -> set[int]:
    """Numbers of new tokens, below ``tokens``, after which some row completes a segment.

    ``position [B]`` are the rows' real tokens before (None: none), ``real [B, tokens]`` those that are no
    padding (None: all).
    """
    if position is None and real is None:
        return set(range(segment, tokens, segment))
    if real is None:
        assert position is not None
        real = torch.ones(len(position), tokens, dtype=torch.bool, device=position.device)
    seen = real.cumsum(1) if position is None else real.cumsum(1) + position[:, None]
    ends = (real & (seen % segment == 0)).any(0)[: tokens - 1]
    return set((ends.nonzero()[:, 0] + 1).tolist())


def lend(states: States, layers: Sequence[int]) -> States:
    """``states`` with the memory of the first of ``layers`` in all of them; as they are before any token."""
    lender = states[layers[0]] if layers else None
    if lender is None:
        return states
    lent = {layer: _with(states[layer], lender.matrix, lender.norm) for layer in layers}
    return [lent.get(layer, state) for layer, state in enumerate(states)]


def collect(lent: States, after: States, layers: Sequence[int]) -> States:
    """``after`` with what all ``layers`` added to what they were ``lent`` in the first one's state."""
    if not layers:
        return after
    sums: list[Tensor | None] = []
    for name in ("matrix", "norm"):
        before = getattr(lent[layers[0]], name, None)
        written = torch.stack([getattr(after[layer], name) for layer in layers])
        # A memory that nobody wrote to keeps its bits: each difference is an exact zero.
        sums.append(written.sum(0) if before is None else before + (written - before).sum(0))
    kept = {layer: _with(after[layer], None, None) for layer in layers[1:]}
    kept[layers[0]] = _with(after[layers[0]], *sums)
    return [kept.get(layer, state) for layer, state in enumerate(after)]


def _with(state: InfiniState | None, matrix: Tensor | None, norm: Tensor | None) -> InfiniState:
    assert state is not None
    return state._replace(matrix=matrix, norm=norm)
