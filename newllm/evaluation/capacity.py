"""How many random pairs a memory keeps apart, by its rule and features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from newllm import ops
from newllm.evaluation.intervals import mean95
from newllm.evaluation.rows import Row
from newllm.modules import InfiniAttention
from newllm.reference.features import feature_width
from newllm.types import FeatureMap, Rule

_BYTES = 4


class Kind(NamedTuple):
    """A memory of one head: how it is written, and by which features."""

    rule: Rule
    feature: FeatureMap

    def state_bytes(self, width: int) -> int:
        """Bytes of matrix and norm for keys and values of ``width``."""
        return _BYTES * feature_width(self.feature, width) * (width + 1)


def elu1(scale: float, bias: float) -> FeatureMap:
    """ELU(scale u + bias) + 1, of one head."""
    return FeatureMap("elu1", torch.full((1,), scale), torch.full((1,), bias))


UNTRAINED: dict[str, Kind] = {
    "linear (4, -4)": Kind("linear", elu1(4.0, -4.0)),
    "delta (4, -4)": Kind("delta", elu1(4.0, -4.0)),
    "linear (8, -8)": Kind("linear", elu1(8.0, -8.0)),
    "delta (8, -8)": Kind("delta", elu1(8.0, -8.0)),
    "linear (1, 0), the paper's": Kind("linear", elu1(1.0, 0.0)),
    "linear DPFP-1": Kind("linear", FeatureMap("dpfp", order=1)),
    "delta DPFP-1": Kind("delta", FeatureMap("dpfp", order=1)),
    "gamma DPFP-3": Kind("gamma", FeatureMap("dpfp", order=3)),
}
"""Memories as they are before any training; the first is the default of newllm's models."""


def trained(model: nn.Module) -> dict[str, Kind]:
    """The memories of ``model``, by layer and key/value head; write gates and decay are left out.

    Raises ``ValueError`` for a model without a memory.
    """
    found: dict[str, Kind] = {}
    layers = [module for module in model.modules() if isinstance(module, InfiniAttention)]
    for number, module in enumerate(layers):
        if module.memory_feature is None:
            continue
        feature = module.memory_feature()
        for head in range(module.k_proj.out_features // module.head_dim):
            scale, bias = (
                None if part is None else part[head : head + 1].detach().cpu()
                for part in (feature.scale, feature.bias)
            )
            own = FeatureMap(feature.kind, scale, bias, feature.order)
            found[f"layer {number}, head {head}"] = Kind(module.rule, own)
    if not found:
        raise ValueError("model must have a memory, got none")
    return found


@torch.no_grad()
def capacity_shares(
    count: int,
    *,
    width: int = 128,
    rule: Rule = "linear",
    feature: FeatureMap | None = None,
    trials: int = 20,
    segment: int = 16,
    seed: int = 0,
    device: str = "cpu",
) -> Tensor:
    """Shares ``[trials]`` of ``count`` pairs that are found again among the values.

    Keys and values ``[trials, 1, count, width]`` are standard normal, ``segment`` pairs are written at once.
    A pair counts where its value is the one of all written values that is nearest in angle to what its key
    reads. ``feature`` None is the default of newllm's models, ELU(4 u - 4) + 1.
    """
    feature = UNTRAINED["linear (4, -4)"].feature if feature is None else feature
    scale, bias = (None if part is None else part.to(device) for part in (feature.scale, feature.bias))
    feature = feature._replace(scale=scale, bias=bias)
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(trials, 1, count, width, generator=generator).to(device) for _ in "kv")
    state = None
    for part, values in zip(k.split(segment, 2), v.split(segment, 2), strict=True):
        state = ops.memory_update(part, values, state, rule=rule, feature=feature)
    assert state is not None
    read = ops.memory_retrieve(k, state, feature=feature)
    alike = nn.functional.normalize(read, dim=-1) @ nn.functional.normalize(v, dim=-1).mT
    right = alike.argmax(-1) == torch.arange(count, device=device)
    return right.double().mean((1, 2))


def capacity_curve(pairs: Sequence[int], **options: Any) -> dict[int, float]:
    """The mean of :func:`capacity_shares` by how many pairs were written."""
    return {count: float(capacity_shares(count, **options).mean()) for count in pairs}


def measure_capacity(
    kinds: Mapping[str, Kind],
    pairs: Sequence[int],
    *,
    width: int,
    trials: int,
    facts: Row,
    seed: int = 0,
    on_row: Callable[[Row], object] = lambda row: None,
) -> list[Row]:
    """A row for every kind of memory and number of pairs: ``score`` is the share found, ``length`` the pairs.

    ``ci95`` is that of the mean over ``trials`` memories; ``facts`` are the fields that all rows share.
    """
    rows = []
    for name, kind in kinds.items():
        for count in pairs:
            shares = capacity_shares(count, width=width, trials=trials, seed=seed, **kind._asdict())
            low, high = mean95(float(shares.sum()), float(shares.square().sum()), trials)
            row = {
                "suite": "capacity", "memory": name, "length": count, "depth": None, "width": width,
                "state_bytes": kind.state_bytes(width), "samples": trials, "seed": seed,
                "score": float(shares.mean()), "ci95": (max(0.0, low), min(1.0, high)), **facts,
            }  # fmt: skip
            on_row(row)
            rows.append(row)
    return rows
