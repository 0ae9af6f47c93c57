"""Rows without their padding: a recurrence reads the real tokens alone, one behind the other.

B batch, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """How rows are packed: ``order [B, T]`` lists real tokens first, ``lengths [B]`` counts them."""

    order: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, real: Tensor) -> Packing:
        """The packing of rows whose real tokens are True in ``real [B, T]``."""
        return cls((~real).long().argsort(dim=1, stable=True), real.sum(1))

    def pack(self, x: Tensor) -> Tensor:
        """``[B, T, *]`` with each row's real tokens first."""
        return x.gather(1, _wide(self.order, x))

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`pack`, with zeros at padding."""
        place = torch.arange(x.shape[1], device=x.device)
        x = x.masked_fill(_wide(place >= self.lengths[:, None], x), 0)
        return torch.zeros_like(x).scatter(1, _wide(self.order, x), x)

    def last(self, x: Tensor, before: Tensor) -> Tensor:
        """Of packed ``x [B, T, *]`` each row's last real one, or of ``before [B, *]`` where there is none."""
        joined = torch.cat([before[:, None], x.to(before.dtype)], 1)
        return joined.gather(1, _wide(self.lengths[:, None], joined))[:, 0]

    def newest(self, x: Tensor, count: int) -> Tensor:
        """Each row's newest ``count`` of packed ``x [B, count + T, *]``, whose first ``count`` are older."""
        place = self.lengths[:, None] + torch.arange(count, device=x.device)
        return x.gather(1, _wide(place, x))


def _wide(index: Tensor, like: Tensor) -> Tensor:
    """``index [B, T]`` repeated over the further dimensions of ``like``."""
    extra = like.shape[2:]
    return index.view(*index.shape, *([1] * len(extra))).expand(*index.shape, *extra)
