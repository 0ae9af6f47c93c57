"""Perplexity by position of a text that is streamed through one session, and the memory that takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from newllm.evaluation.intervals import mean95
from newllm.evaluation.process import resident_bytes
from newllm.models.session import Session

if TYPE_CHECKING:
    from newllm.distributed.sequence_parallel import Mesh

# Bins smaller than this tell too little.
_LEAST_BIN = 16


class Bin(NamedTuple):
    """Positions ``start`` to ``end`` (exclusive): ``tokens`` predicted there and their mean loss in nats.

    ``ci95`` is the 95 % interval of that mean, tokens taken as independent.
    """

    start: int
    end: int
    tokens: int
    nll: float
    ci95: tuple[float, float]

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(self.nll)

    @property
    def perplexity_ci95(self) -> tuple[float, float]:
        """exp of the interval of the mean loss."""
        low, high = self.ci95
        return math.exp(low), math.exp(high)


class Chunk(NamedTuple):
    """After a chunk: tokens read in all, the chunk's mean ``nll`` (None: none predicted), bytes and seconds.

    ``resident_bytes`` is the process's main memory, ``state_bytes`` all that the session's layers keep.
    """

    tokens: int
    nll: float | None
    resident_bytes: int
    state_bytes: int
    seconds: float


class PerplexityReport(NamedTuple):
    """Perplexity by position: ``bins`` that predicted a token, the ``total`` of them, and each chunk."""

    window: int
    bins: tuple[Bin, ...]
    total: Bin
    chunks: tuple[Chunk, ...]

    def settled(self) -> Chunk:
        """The first chunk that ends a whole window or more into the stream, else the last."""
        return next((chunk for chunk in self.chunks if chunk.tokens >= self.window), self.chunks[-1])


def log_borders(window: int, tokens: int) -> list[int]:
    """Borders of bins below ``tokens``: ``window`` times powers of two, a sixteenth the least."""
    first = window
    while first % 2 == 0 and first // 2 >= max(_LEAST_BIN, window // 16):
        first //= 2
    return [first << power for power in range((max(1, tokens - 1) // first).bit_length())]


def perplexity_by_position(
    session: Session,
    ids: Tensor,
    *,
    bins: Sequence[int] | None = None,
    progress: bool = True,
    on_chunk: Callable[[Chunk], None] | None = None,
    mesh: Mesh | None = None,
) -> PerplexityReport:
    """Stream ``ids [N]`` (int64) through ``session``, ``session.chunk`` tokens at a time.

    Nothing is kept but sums, so N has no bound. The first token of a stream is predicted by nothing and
    counts nowhere.

    Args:
        session: of one row; what it has read already comes before ``ids``.
        bins: rising borders between bins of positions in the stream (None: ``log_borders``).
        on_chunk: called after each chunk.
        mesh: ranks that share the reading, about ``session.chunk`` tokens of a chunk each; they all call
            this and all get the report (see :func:`newllm.distributed.prefill.prefill`).

    Raises:
        ValueError: for fewer than two tokens, or borders that do not rise from 1 on.
    """
    if ids.ndim != 1 or len(ids) < 2:
        raise ValueError(f"ids must be a row of at least 2 tokens, got shape {list(ids.shape)}")
    start = session.tokens[0]
    window = session.model.config.sliding_window or session.model.config.segment
    borders = list(log_borders(window, start + len(ids)) if bins is None else bins)
    if any(low >= high for low, high in zip([0, *borders], borders, strict=False)):
        raise ValueError(f"bins must be rising positions of at least 1, got {borders}")
    sums = torch.zeros(3, len(borders) + 1, dtype=torch.float64)
    chunks, position, began = [], start, time.monotonic()
    with tqdm(total=len(ids), unit="tok", unit_scale=True, disable=not progress) as bar:
        for found in _scores(session, ids, mesh):
            losses = found.double().cpu()
            read, position = len(losses), position + len(losses)
            # The stream's first token has no loss.
            losses = losses[1:] if position == len(losses) else losses
            _add(sums, losses, position - len(losses), borders)
            chunk = Chunk(
                position,
                float(losses.mean()) if len(losses) else None,
                resident_bytes(),
                session.state_bytes,
                time.monotonic() - began,
            )
            chunks.append(chunk)
            if on_chunk is not None:
                on_chunk(chunk)
            bar.update(read)
            so_far = float((sums[1].sum() / sums[0].sum()).exp())
            bar.set_postfix_str(f"perplexity {so_far:.2f}, {chunk.resident_bytes / 2**20:,.0f} MiB resident")
    edges = [start, *(min(max(border, start), position) for border in borders), position]
    cells = [_bin(*ends, column) for ends, column in zip(pairwise(edges), sums.T, strict=True)]
    filled = tuple(cell for cell in cells if cell.tokens)
    return PerplexityReport(window, filled, _bin(start, position, sums.sum(1)), tuple(chunks))


def _scores(session: Session, ids: Tensor, mesh: Mesh | None) -> Iterator[Tensor]:
    """The losses of ``ids``, chunk by chunk."""
    if mesh is None:
        return map(session.score, ids.split(session.chunk))
    from newllm.distributed.prefill import score

    return filter(len, score(session, ids, mesh=mesh))


def _add(sums: Tensor, losses: Tensor, position: int, borders: list[int]) -> None:
    """Count, sum and sum of squares of ``losses``, the first at ``position``, each to its bin."""
    places = torch.arange(position, position + len(losses))
    index = torch.bucketize(places, torch.tensor(borders, dtype=torch.int64), right=True)
    for row, values in zip(sums, (torch.ones_like(losses), losses, losses**2), strict=True):
        row.index_add_(0, index, values)


def _bin(start: int, end: int, sums: Tensor) -> Bin:
    count, total, squares = sums.tolist()
    if count == 0:
        return Bin(start, end, 0, math.nan, (math.nan, math.nan))
    return Bin(start, end, int(count), total / count, mean95(total, squares, int(count)))
