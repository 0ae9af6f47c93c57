"""A short causal convolution whose past is an argument and a result.

B batch, T tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from newllm.modules.padding import Packing
from newllm.ops import checks


class ShortConvolution(nn.Module):
    """y_t = x_t + sum_j w_j x_{t - j}, j from 0 to ``taps`` - 1, each channel apart (as in H3 and Mamba).

    The weights ``[taps, C]``, oldest token first, are zero at the start: y is x.

    Raises:
        ValueError: for fewer than two taps.
    """

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        checks.require(taps >= 2, "short_conv", taps, "None or at least 2 taps")
        self.taps = taps
        self.weight = nn.Parameter(torch.zeros(taps, channels))

    def starts(self) -> dict[str, float]:
        """What each parameter is filled with at the start."""
        return {"weight": 0.0}

    def forward(self, x: Tensor, recent: Tensor | None, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """``x [B, T, C]`` behind ``recent [B, taps - 1, C]`` (None: zeros) -> y, and what is recent then.

        ``real [B, T]`` (bool) marks the tokens that are no padding, which takes no place among the others
        and gives zeros.

        Raises ``ValueError`` for another shape of ``recent``.
        """
        shape = (len(x), self.taps - 1, x.shape[2])
        if recent is None:
            recent = x.new_zeros(shape)
        checks.shape("state.recent", recent, shape)
        packing = None if real is None else Packing.of(real)
        tokens = x.shape[1]
        joined = torch.cat([recent.to(x.dtype), x if packing is None else packing.pack(x)], 1)
        y = joined[:, self.taps - 1 :]
        # Term by term: one order of sums, so that no split of the tokens shows.
        for tap, weight in enumerate(self.weight.to(x.dtype)):
            y = torch.addcmul(y, joined[:, tap : tap + tokens], weight)
        if packing is None:
            return y, joined[:, tokens:].clone()
        return packing.unpack(y), packing.newest(joined, self.taps - 1)
