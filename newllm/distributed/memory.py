"""The memory along a line of ranks: the fold of segments from left to right, its adjoint from right to left.

A rank adds its segments one after the other to what came from the left, exactly as a single process does, so
that the linear rule's memory has the same bits for any number of ranks; a rank's segments are never summed
first. The delta rule ``M <- (I - A') M + B`` is a chain of matrix products: there each rank composes its own
segments' maps beforehand, and applies one map to what comes.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from newllm.distributed.line import Line, Messages
from newllm.reference.slices import Begun, Call, Chain, Slice

Pair = tuple[Tensor | None, Tensor | None]


class Unfolded(NamedTuple):
    """Gradients of the memory after each segment, what the delta rule adds, and messages to wait for."""

    matrix: Tensor
    norm: Tensor
    rest: Any
    sent: list[Messages]


def fold(
    steps: ModuleType, line: Line, x: Slice, call: Call, added: tuple[Tensor, Tensor], own: Pair
) -> tuple[Chain, list[Messages]]:
    """The memory before each segment of the slice and after it, and messages to wait for.

    ``steps`` computes: ``newllm.reference.slices`` or its fused counterpart. ``added`` is what each segment
    adds, ``own`` the memory before the sequence, on the first rank.
    """
    matrix, norm = added
    if call.rule == "linear":
        return _linear(steps, line, x, matrix, norm, own, back=False)
    norms, last_norm, sent = _norms(steps, line, norm, own[1], back=False)
    corrections = steps.corrections(x, call, norms)
    before, last, sent_matrix = _matrices(steps, line, x, corrections, matrix, own[0], back=False)
    return Chain(before, norms, last, last_norm), [sent, sent_matrix]


def unfold(
    steps: ModuleType, line: Line, x: Slice, call: Call, before: Tensor, norms: Tensor, read: Begun, own: Pair
) -> Unfolded:
    """The adjoint of :func:`fold`.

    ``before`` and ``norms`` are what it returned, ``read`` holds their gradients, ``own`` are the gradients
    of the memory after this rank's slice, beside those that come from the right.
    """
    assert read.matrix is not None
    assert read.norm is not None
    if call.rule == "linear":
        found, sent = _linear(steps, line, x, read.matrix, read.norm, own, back=True)
        return Unfolded(found.before, found.norms, None, sent)
    corrections = steps.corrections(x, call, norms)
    after, _, sent_matrix = _matrices(steps, line, x, corrections, read.matrix, own[0], back=True)
    slopes, rest = steps.norm_slopes(x, call, before, norms, after)
    after_norm, _, sent_norm = _norms(steps, line, slopes + read.norm, own[1], back=True)
    return Unfolded(after, after_norm, rest, [sent_matrix, sent_norm])


def _linear(
    steps: ModuleType, line: Line, x: Slice, matrix: Tensor, norm: Tensor, own: Pair, *, back: bool
) -> tuple[Chain, list[Messages]]:
    found: list[Chain] = []
    shapes = [(*each.shape[:2], *each.shape[3:]) for each in (matrix, norm)]
    sizes = [math.prod(shape) for shape in shapes]

    def step(incoming: Tensor | None) -> Tensor:
        # One message, of which each part lies without gaps.
        parts = (None, None) if incoming is None else incoming.split(sizes)
        pairs = zip(parts, shapes, strict=True)
        came = (None if part is None else part.view(shape) for part, shape in pairs)
        start = tuple(_sum(*each) for each in zip(came, own, strict=True))
        found.append(steps.chain(x, matrix, norm, *start, reverse=back))
        return torch.cat([found[0].matrix.flatten(), found[0].norm.flatten()])

    sent = line.carry(matrix.new_empty(sum(sizes)), step, _name("the memory", back), back=back)
    return found[0], [sent]


def _norms(
    steps: ModuleType, line: Line, norm: Tensor, own: Tensor | None, *, back: bool
) -> tuple[Tensor, Tensor, Messages]:
    """The chain of norms along the line: before each segment, the last, and what is on its way."""
    found: list[Tensor] = []

    def step(incoming: Tensor | None) -> Tensor:
        found.extend(steps.norm_chain(norm, _sum(incoming, own), reverse=back))
        return found[1]

    sent = line.carry(norm[:, :, 0], step, _name("the memory's norm", back), back=back)
    return found[0], found[1], sent


def _matrices(
    steps: ModuleType,
    line: Line,
    x: Slice,
    corrections: Tensor,
    added: Tensor,
    own: Tensor | None,
    *,
    back: bool,
) -> tuple[Tensor, Tensor, Messages]:
    """The delta rule's chain of matrices along the line: as :func:`_norms`."""
    turn, offset, starts = None, None, []
    between = not (line.first or line.last)
    if between:
        unit = torch.eye(corrections.shape[-1], dtype=corrections.dtype, device=corrections.device)
        unit = unit.expand(*corrections.shape[:2], -1, -1).contiguous()
        turn = steps.delta_chain(x, corrections, None, unit, reverse=back)[1]
        offset = steps.delta_chain(x, corrections, added, None, reverse=back)[1]
    whole: list[Tensor] = []

    def step(incoming: Tensor | None) -> Tensor:
        start = _sum(incoming, own)
        starts.append(start)
        if turn is not None and start is not None:
            return turn @ start + offset
        whole.extend(steps.delta_chain(x, corrections, added, start, reverse=back))
        return whole[1]

    sent = line.carry(added[:, :, 0], step, _name("the memory", back), back=back)
    before, last = whole or steps.delta_chain(x, corrections, added, starts[0], reverse=back)
    return before, last, sent


def _name(what: str, back: bool) -> str:
    return f"the gradient of {what}" if back else what


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return (b if a is None else a) if a is None or b is None else a + b
