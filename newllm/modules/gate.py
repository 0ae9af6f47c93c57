"""The memory's own parameters: one gate per query head, one feature scale and bias per key/value head.

Small modules rather than bare parameters, so that adapters (PEFT's ``modules_to_save``) carry them and
optimisers find them by name. Float32 whatever the default dtype: steps of a gate are too small for bfloat16.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from newllm.reference.infini import gate_value
from newllm.types import FeatureMap, GateKind

HISTOGRAM_BINS = 10
# A write gate's bias at the start: nearly open, and alike for all tokens.
OPEN = 2.0


class MemoryGate(nn.Module):
    """``beta [H]``, zero at the start, of ``out = A_dot + g (A_mem - A_dot)``, g = sigmoid or tanh(beta).

    At zero the sigmoid gate mixes both halves equally (arXiv 2404.07143, eq. 6); the tanh gate is exactly
    shut and yet has a gradient, so that a converted model starts as its base and can learn.
    """

    def __init__(self, num_heads: int, kind: GateKind = "sigmoid") -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.zeros(num_heads, dtype=torch.float32))

    def forward(self) -> Tensor:
        """beta ``[H]``."""
        return self.weight

    def openness(self) -> Tensor:
        """g per head ``[H]``, detached."""
        return gate_value(self.weight.detach().float(), self.kind)


def gate_histogram(model: nn.Module) -> list[int]:
    """How many heads have a gate of absolute value in each tenth from 0 to 1."""
    gates = [module.openness().abs() for module in model.modules() if isinstance(module, MemoryGate)]
    if not gates:
        return [0] * HISTOGRAM_BINS
    return [int(count) for count in torch.cat(gates).cpu().histc(HISTOGRAM_BINS, 0, 1)]


class MemoryFeature(nn.Module):
    """The memory's feature map; for ``elu1`` a learnable scale and bias per key/value head.

    (4, -4) makes features sparse enough to keep many keys apart; (1, 0) is the paper's ELU + 1.
    ``gated_width``, the keys' width, adds a write gate, which at first counts all tokens alike.
    """

    def __init__(
        self,
        num_kv_heads: int,
        kind: Literal["elu1", "dpfp"] = "elu1",
        scale: float = 4.0,
        bias: float = -4.0,
        order: int = 1,
        gated_width: int | None = None,
    ) -> None:
        super().__init__()
        self.kind: Literal["elu1", "dpfp"] = kind
        self.initial = (scale, bias)
        self.order = order
        if kind == "elu1":
            self.scale = nn.Parameter(torch.full((num_kv_heads,), scale, dtype=torch.float32))
            self.bias = nn.Parameter(torch.full((num_kv_heads,), bias, dtype=torch.float32))
        self.write: nn.Parameter | None = None
        self.write_bias: nn.Parameter | None = None
        if gated_width is not None:
            self.write = nn.Parameter(torch.zeros(num_kv_heads, gated_width, dtype=torch.float32))
            self.write_bias = nn.Parameter(torch.full((num_kv_heads,), OPEN, dtype=torch.float32))

    def starts(self) -> dict[str, float]:
        """What each parameter is filled with at the start."""
        values = dict(zip(("scale", "bias", "write", "write_bias"), (*self.initial, 0.0, OPEN), strict=True))
        return {name: values[name] for name, _ in self.named_parameters()}

    def forward(self) -> FeatureMap:
        """The feature map as the operators take it."""
        if self.kind == "dpfp":
            return FeatureMap("dpfp", None, None, self.order, self.write, self.write_bias)
        return FeatureMap("elu1", self.scale, self.bias, None, self.write, self.write_bias)


class MemoryDecay(nn.Module):
    """What a memory keeps of itself when a segment is written, per key/value head: sigmoid(weight)."""

    def __init__(self, num_kv_heads: int, initial: float) -> None:
        super().__init__()
        if not 0 < initial < 1:
            raise ValueError(f"decay must be between 0 and 1, got {initial}")
        self.initial = math.log(initial / (1 - initial))
        self.weight = nn.Parameter(torch.full((num_kv_heads,), self.initial, dtype=torch.float32))

    def starts(self) -> dict[str, float]:
        """What each parameter is filled with at the start."""
        return {"weight": self.initial}

    def forward(self) -> Tensor:
        """Factors ``[Hkv]``."""
        return self.weight.sigmoid()
