"""How many random pairs an untrained memory keeps apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from newllm import ops
from newllm.types import FeatureMap, Rule


@torch.no_grad()
def capacity_curve(
    pairs: Sequence[int],
    *,
    width: int = 128,
    rule: Rule = "linear",
    feature: FeatureMap | None = None,
    trials: int = 20,
    segment: int = 16,
    seed: int = 0,
    device: str = "cpu",
) -> dict[int, float]:
    """Share of pairs found again among the values, by how many were written.

    Keys and values ``[trials, 1, pairs, width]`` are standard normal, ``segment`` pairs are written at once.
    A pair counts where its value is the one of all written values that is nearest in angle to what its key
    reads. ``feature`` None is the default of newllm's models, ELU(4 u - 4) + 1.
    """
    if feature is None:
        feature = FeatureMap(
            "elu1", torch.full((1,), 4.0, device=device), torch.full((1,), -4.0, device=device)
        )
    found = {}
    for count in pairs:
        generator = torch.Generator().manual_seed(seed)
        k, v = (torch.randn(trials, 1, count, width, generator=generator).to(device) for _ in "kv")
        state = None
        for part, values in zip(k.split(segment, 2), v.split(segment, 2), strict=True):
            state = ops.memory_update(part, values, state, rule=rule, feature=feature)
        assert state is not None
        read = ops.memory_retrieve(k, state, feature=feature)
        alike = torch.nn.functional.normalize(read, dim=-1) @ torch.nn.functional.normalize(v, dim=-1).mT
        right = alike.argmax(-1) == torch.arange(count, device=device)
        found[count] = float(right.double().mean())
    return found
