"""The recurrent cell of the context language model, and the ways its context is rewritten.

E input width, H hidden width, C context width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from newllm import ops
from newllm.reference.context import LAYER_NORM_EPS, gated_drive, gated_hidden
from newllm.types import GatedParams

# A sigmoid at so many is 0 or 1 to the last bit of every dtype.
_SHUT = 100.0


class GatedUpdater(nn.Module):
    """c <- sigmoid(W_f h) c + sigmoid(W_i h) tanh(W_d h)."""

    def __init__(self, hidden_dim: int, context_dim: int) -> None:
        super().__init__()
        self.forget = nn.Linear(hidden_dim, context_dim)
        self.write = nn.Linear(hidden_dim, context_dim)
        self.candidate = nn.Linear(hidden_dim, context_dim)

    def gates(self) -> dict[str, Tensor]:
        """The gates' fields of ``GatedParams``."""
        return {
            "weight_f": self.forget.weight,
            "bias_f": self.forget.bias,
            "weight_i": self.write.weight,
            "bias_i": self.write.bias,
        }


class SimpleUpdater(nn.Module):
    """c <- tanh(W h): nothing of the context stays but what h took from it. A negative control."""

    def __init__(self, hidden_dim: int, context_dim: int) -> None:
        super().__init__()
        self.candidate = nn.Linear(hidden_dim, context_dim)

    def gates(self) -> dict[str, Tensor]:
        """The fields of ``GatedParams`` for a forget gate of 0 and a write gate of 1."""
        weight, bias = torch.zeros_like(self.candidate.weight), torch.zeros_like(self.candidate.bias)
        return {
            "weight_f": weight,
            "bias_f": bias - _SHUT,
            "weight_i": weight,
            "bias_i": bias + _SHUT,
        }


UPDATERS: dict[str, type[GatedUpdater] | type[SimpleUpdater]] = {
    "gated": GatedUpdater,
    "simple": SimpleUpdater,
}
"""Ways to rewrite a context, by name."""


def make_updater(name: str, hidden_dim: int, context_dim: int) -> GatedUpdater | SimpleUpdater:
    """The updater ``name``.

    Raises ``ValueError`` for an unknown one.
    """
    if name not in UPDATERS:
        raise ValueError(f"updater must be one of {', '.join(UPDATERS)}, got {name!r}")
    return UPDATERS[name](hidden_dim, context_dim)


def updater_of(names: Iterable[str]) -> str:
    """Which updater the weights called ``names`` belong to: only the gated one has a forget gate.

    Raises ``ValueError`` for weights of no updater.
    """
    ends = {".".join(name.split(".")[-2:]) for name in names}
    if "candidate.weight" not in ends:
        raise ValueError("weights must hold an updater's candidate.weight, got none")
    return "gated" if "forget.weight" in ends else "simple"


class RecurrentCell(nn.Module):
    """h = FNN([x ; c]), then the context by an updater, a layer norm and a clamp.

    The prediction for a token reads h, which saw the context before it.

    Args:
        embed_dim: E.
        hidden_dim: H.
        context_dim: C.
        layers: Linear-ReLU layers of the FNN.
        updater: ``gated`` or ``simple``.
        clamp: most that an entry of the context may be, None for no bound.

    Raises:
        ValueError: for an unknown updater or sizes below 1.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        context_dim: int,
        layers: int = 1,
        *,
        updater: str = "gated",
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        self.embed_dim, self.context_dim, self.clamp = embed_dim, context_dim, clamp
        self.first = nn.Linear(embed_dim + context_dim, hidden_dim)
        self.deeper = nn.ModuleList(nn.Linear(hidden_dim, hidden_dim) for _ in range(layers - 1))
        self.updater = make_updater(updater, hidden_dim, context_dim)
        self.norm = nn.LayerNorm(context_dim, LAYER_NORM_EPS)

    def params(self) -> GatedParams:
        """The parameters as ``ops.context_sweep`` takes them."""
        weight, hidden = self.first.weight, self.first.out_features
        weights, biases = weight.new_zeros(0, hidden, hidden), weight.new_zeros(0, hidden)
        if self.deeper:
            deeper: list[Any] = list(self.deeper)
            weights = torch.stack([layer.weight for layer in deeper])
            biases = torch.stack([layer.bias for layer in deeper])
        return GatedParams(
            weight_x=weight[:, : self.embed_dim],
            weight_c=weight[:, self.embed_dim :],
            bias=self.first.bias,
            weight_h=weights,
            bias_h=biases,
            weight_d=self.updater.candidate.weight,
            bias_d=self.updater.candidate.bias,
            ln_weight=self.norm.weight,
            ln_bias=self.norm.bias,
            clamp=self.clamp,
            **self.updater.gates(),
        )

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Read ``x [B, T, E]`` from ``state [B, C]`` (None: zeros).

        Returns the hidden features ``[B, T, H]`` at each token, the contexts ``[B, T, C]`` after each, and
        the state ``[B, C]`` after the last, as ``ops.context_sweep``.
        """
        params = self.params()
        contexts, last, _ = ops.context_sweep(x, params, cell="gated", state=state)
        if state is None:
            state = last.new_zeros(last.shape)
        before = torch.cat([state[:, None].to(contexts.dtype), contexts[:, :-1]], 1)
        return gated_hidden(gated_drive(x, params), before, params), contexts, last
