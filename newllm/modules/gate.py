"""The memory's own parameters: one gate per query head, one feature scale and bias per key/value head.

Small modules rather than bare parameters, so that adapters (PEFT's ``modules_to_save``) carry them and
optimisers find them by name. Float32 whatever the default dtype: steps of a gate are too small for bfloat16.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from newllm.reference.infini import gate_value
from newllm.types import FeatureMap, GateKind

HISTOGRAM_BINS = 10


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
    """

    def __init__(
        self,
        num_kv_heads: int,
        kind: Literal["elu1", "dpfp"] = "elu1",
        scale: float = 4.0,
        bias: float = -4.0,
        order: int = 1,
    ) -> None:
        super().__init__()
        self.kind: Literal["elu1", "dpfp"] = kind
        self.initial = (scale, bias)
        self.order = order
        if kind == "elu1":
            self.scale = nn.Parameter(torch.full((num_kv_heads,), scale, dtype=torch.float32))
            self.bias = nn.Parameter(torch.full((num_kv_heads,), bias, dtype=torch.float32))

    def forward(self) -> FeatureMap:
        """The feature map as the operators take it."""
        if self.kind == "dpfp":
            return FeatureMap("dpfp", order=self.order)
        return FeatureMap("elu1", self.scale, self.bias)
