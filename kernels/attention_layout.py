"""How a call of the attention kernels lies in memory: segments and phases, tables, the memory it reads."""

from typing import NamedTuple

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]


# More slots than a call can have, and small enough for sums of 32 bits.
NO_LIMIT = 2**30


class Attention(NamedTuple):
    """Which keys a query sees.

    ``window`` keys back, or the query's own segment when it is None. ``position [B]`` counts a row's
    tokens before this call (None: none), ``length [B]`` its real tokens in it (None: all).
    ``segmented`` makes query tiles start at segment borders, where the memory changes. ``aligned`` says that
    all rows begin at such a border, whatever their position.
    """

    window: int | None
    segment: int
    position: Tensor | None
    length: Tensor | None
    segmented: bool
    aligned: bool = False

    @property
    def reach(self) -> int:
        """How many slots back a query sees, its own included."""
        return NO_LIMIT if self.window is None else min(self.window, NO_LIMIT)

    def segments(self, tokens: int) -> int:
        """Most segments that ``tokens`` tokens touch."""
        behind = 0 if self.position is None or self.aligned else self.segment - 1
        return -(-(tokens + behind) // self.segment)

    def query_tiles(self, tokens: int, rows: int) -> int:
        """Tiles of ``rows`` queries that one head needs."""
        if not self.segmented:
            return -(-tokens // rows)
        return self.segments(tokens) * -(-min(self.segment, tokens) // rows)


class Recall(NamedTuple):
    """What queries recall from: ``states [B, HKV, N, K, V]`` before each segment, ``norms [B, HKV, N, K]``.

    ``gate [H]`` is the float32 share of the memory in the output, ``scale`` and ``bias`` ``[HKV]`` (float32)
    belong to the feature map; both or none are given. Without a memory all are None.
    """

    states: Tensor | None
    norms: Tensor | None
    gate: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    eps: float


NO_MEMORY = Recall(None, None, None, None, None, 0.0)


def rope_arguments(rope: Rope | None, rows: int) -> tuple[Tensor | None, Tensor | None, tuple[int, int]]:
    """cos, sin and their strides by batch and row, cut to the last ``rows`` rows."""
    if rope is None:
        return None, None, (0, 0)
    # One set of strides serves both tables.
    cos, sin = (table[..., table.shape[-2] - rows :, :].contiguous() for table in rope)
    return cos, sin, (0 if cos.ndim == 2 else cos.stride(0), cos.stride(-2))


def learned(scale: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Scale and bias in float32, both or none: a missing one is the paper's 1 or 0."""
    given = scale if scale is not None else bias
    if given is None:
        return None, None
    scale = torch.ones_like(given) if scale is None else scale
    bias = torch.zeros_like(given) if bias is None else bias
    return scale.float().contiguous(), bias.float().contiguous()
