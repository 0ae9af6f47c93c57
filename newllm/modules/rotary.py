"""Tables of rotary position embedding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Rotary:
    """cos and sin tables (arXiv 2104.09864) from inverse frequencies.

    Only relative rotation matters to attention, so tables always start at position zero and never hold
    positions beyond a window and a chunk: float32 cosines are off by 0.013 at position one million (by
    0.0005 at 16,384). Float64 angles would be nearer, and a converted model no longer its base to the bit.
    The frequencies are plain numbers, no buffer: a cast of the model cannot round them.
    """

    def __init__(self, inverse_frequencies: Sequence[float], scaling: float = 1.0) -> None:
        self.inverse_frequencies = tuple(inverse_frequencies)
        self.scaling = scaling
        self._kept: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_theta(cls, width: int, theta: float = 10000.0) -> Rotary:
        """Frequencies ``theta ** (-2 i / width)`` for heads ``width`` wide (even)."""
        exponents = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
        return cls((1.0 / theta**exponents).tolist())

    def __call__(self, rows: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) ``[rows, width]`` in the dtype and on the device of ``like``."""
        wide = torch.promote_types(like.dtype, torch.float32)
        frequencies = torch.tensor(self.inverse_frequencies, dtype=wide, device=like.device)
        angles = torch.arange(rows, device=like.device).to(wide)[:, None] * frequencies
        angles = torch.cat([angles, angles], -1)
        cos, sin = angles.cos() * self.scaling, angles.sin() * self.scaling
        return cos.to(like.dtype), sin.to(like.dtype)

    def kept(self, rows: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The same, made once: decoding reads one table for ever, at one address.

        Compiled code that finds none makes one of its own: a table that it kept would be the graph's.
        """
        key = (rows, like.dtype, like.device)
        if key in self._kept:
            return self._kept[key]
        if torch.compiler.is_compiling():
            return self(rows, like)
        # Not an inference tensor: those cannot be used everywhere later.
        with torch.inference_mode(False):
            self._kept[key] = self(rows, like)
        return self._kept[key]
