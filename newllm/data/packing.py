"""Cutting a long row of token ids into pieces of one length."""

from __future__ import annotations

import torch
from torch import Tensor


def random_blocks(ids: Tensor, length: int, samples: int, generator: torch.Generator) -> Tensor:
    """``samples`` pieces of ``ids [N]`` (int64), ``[samples, length]``, every place alike likely.

    Places are drawn from ``generator``; the pieces are on the device of ``ids``.
    Raises ValueError where N < ``length``.
    """
    _check(ids, length)
    starts = torch.randint(len(ids) - length + 1, (samples, 1), generator=generator, device=generator.device)
    return ids[starts.to(ids.device) + torch.arange(length, device=ids.device)]


def _check(ids: Tensor, length: int) -> None:
    if ids.dim() != 1:
        raise ValueError(f"ids has shape {list(ids.shape)}, expected one row [N]")
    if length < 1:
        raise ValueError(f"length is {length}, expected at least 1")
    if len(ids) < length:
        raise ValueError(f"ids: the text is too short, it has {len(ids)} tokens and length asks for {length}")
