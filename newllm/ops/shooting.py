"""Ways to use a sequential sweep: one run over all tokens, or many side by side (multiple shooting).

A sweep is a function of which tokens to run and of what enters each run, ``[B, parts, C]``, to what leaves
it; it fills in its results on the way, so that runs side by side must not share a token. Backwards in time,
what enters a run comes from the one after it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from newllm.ops.native import Runs
from newllm.reference.context import NotContracting

Sweep = Callable[[Runs, Tensor], Tensor]

# The most rows that a device sweeps side by side.
# A GPU's are those of seven clusters: tensor cores take more, but round contexts: borders would never agree.
ROWS = {"cpu": 8, "cuda": 28}
# What each row costs beyond the first, in steps of one row, by kernel. On the grid the rows share the blocks,
# which leaves fewer to hold the matrices for each: 28 take 11 times as long as one.
SHARE = {"cpu": 0.5, "cluster": 0.045, "tensor": 0.045, "grid": 0.37}
# Tokens from which auto estimates rho: on a GPU that takes as long as some 500 steps.
LEAST_TOKENS = {"cpu": 0, "cuda": 8192}
# The block method has to promise so many times the speed of a single run: an estimate of rho that is too low
# costs some of it.
LEAST_GAIN = 1.4
# Tokens of the first pass before each border, at least.
WARM_UP = 32
# Passes that the block method tries by default.
SWEEPS = 4
# What a warm-up has to spare, as rho is an estimate. A CPU needs nothing: its later passes end early, where a
# GPU sweeps all tokens again.
MARGIN = {"cpu": 1.0, "cuda": 1.25}
# Power iteration: cycles of so many tokens, between which the difference is scaled back.
CYCLES, CYCLE = 3, 16

# A difference of contexts to begin with, with some to spare, and more tokens than there ever are.
LARGEST, NEVER = 16.0, 1 << 40
# A run is swept in segments, the first of so many tokens and each twice the one before: what enters it
# wrong is put right without sweeping it to its end again. On a GPU launches would cost more.
SEGMENT = {"cpu": 64, "cuda": NEVER}


class Outcome(NamedTuple):
    """How a sweep was carried out: the fields of ``SweepInfo``, and how the block method cut it."""

    block: bool
    sweeps: int
    residual: float
    rho: float
    parts: int = 1
    warm_up: int = 0


def carry(
    sweep: Sweep,
    entering: Tensor,
    tokens: int,
    kernel: str,
    method: str,
    tol: float,
    sweeps: int | None,
    fallback: bool,
) -> tuple[Tensor, Outcome]:
    """Sweep all tokens by ``method``, auto, sequential or block: ``entering [B, C]`` to what leaves.

    ``kernel`` carries ``sweep`` out, see ``native.kernel_of``. Raises NotContracting for a block sweep that
    does not converge and has no ``fallback``.
    """
    batch, device = len(entering), entering.device
    least = {"auto": LEAST_GAIN, "block": 0.0}.get(method, math.inf)
    if method == "auto" and tokens < LEAST_TOKENS[device.type]:
        least = math.inf
    if parts_of(batch, tokens, device, kernel, WARM_UP, least) == 1:
        return once(sweep, Runs(1, tokens), entering), Outcome(method == "block", 1, 0.0, math.nan)
    rho = contraction(sweep, entering, tokens)
    warm_up = math.ceil(MARGIN[device.type] * _forgetting(rho, tol))
    parts = parts_of(batch, tokens, device, kernel, warm_up, least)
    if parts == 1:
        if method == "block" and not fallback:
            raise NotContracting(
                f"a token multiplies differences by about {rho:.3g}, which keeps them above tol = {tol:g} "
                f"for more than half of the {tokens} tokens"
            )
        return once(sweep, Runs(1, tokens), entering), Outcome(False, 1, 0.0, rho)
    fallback = fallback or method == "auto"
    leaving, outcome = block(
        sweep, entering, tokens, parts, warm_up, tol=tol, sweeps=sweeps, fallback=fallback
    )
    return leaving, outcome._replace(rho=rho)


def parts_of(
    batch: int, tokens: int, device: torch.device, kernel: str, warm_up: int, least_gain: float
) -> int:
    """Into how many runs the block method best cuts each row; 1 where it does not promise ``least_gain``."""
    gains = {1: least_gain}
    share = SHARE[kernel]
    for parts in range(2, min(ROWS[device.type] // batch, tokens // warm_up) + 1):
        steps = tokens / parts + warm_up
        gains[parts] = tokens / steps * (1 - share + share * batch) / (1 - share + share * batch * parts)
    return max(gains, key=lambda parts: gains[parts])


def block(
    sweep: Sweep,
    entering: Tensor,
    tokens: int,
    parts: int,
    warm_up: int,
    *,
    tol: float,
    sweeps: int | None = None,
    fallback: bool = True,
    backwards: bool = False,
) -> tuple[Tensor, Outcome]:
    """``parts`` runs side by side until what leaves each is what enters the next, to within ``tol``.

    The first pass covers only ``warm_up`` tokens before each border, begun at zeros: where the recurrence
    forgets within them, the second pass is the result. Later ones end where they leave what the one before
    left. Backwards ``tol`` is a share of the largest that leaves a run, since gradients have no scale of
    their own. When ``sweeps`` passes (None: 4) reach no agreement or the jumps do not shrink, one run over
    all tokens is the result; where ``fallback`` is False, NotContracting is raised.
    """
    length = tokens // parts
    # Tokens too few to go round are swept after all others, which backwards is before.
    rest = Runs(1, tokens % parts, parts * length)
    if rest.tokens and backwards:
        entering = once(sweep, rest, entering)
    border = Runs(parts, warm_up, 0 if backwards else length - warm_up, length)
    segments = _segments(Runs(parts, length, 0, length), SEGMENT[entering.device.type], backwards)
    leaving, outcome = _shoot(sweep, entering, border, segments, tol, sweeps or SWEEPS, backwards)
    outcome = outcome._replace(parts=parts, warm_up=warm_up)
    if not outcome.block:
        if not fallback:
            raise NotContracting(
                f"chunks of {length} tokens differ by {outcome.residual:.3g} at their borders after "
                f"{outcome.sweeps} sweeps, and tol is {tol:g}"
            )
        leaving = once(sweep, Runs(1, parts * length), entering)
        outcome = outcome._replace(sweeps=outcome.sweeps + 1, residual=0.0)
    if rest.tokens and not backwards:
        leaving = once(sweep, rest, leaving)
    return leaving, outcome


def _segments(runs: Runs, least: int, backwards: bool) -> list[Runs]:
    """``runs`` cut, in the order of sweeping, into segments of ``least`` tokens and ever twice as many."""
    ends, size = [0], least
    while ends[-1] < runs.tokens:
        ends.append(min(ends[-1] + size, runs.tokens))
        size *= 2
    return [
        runs._replace(tokens=end - done, first=runs.tokens - end if backwards else done)
        for done, end in itertools.pairwise(ends)
    ]


def _shoot(
    sweep: Sweep,
    entering: Tensor,
    border: Runs,
    segments: list[Runs],
    tol: float,
    sweeps: int,
    backwards: bool,
) -> tuple[Tensor, Outcome]:
    """What leaves the last of the runs that ``segments`` make up, after what leaves ``border`` entered them.

    The outcome is not ``block`` where they did not come to agree.
    """
    last = 0 if backwards else -1

    def joined(leaving: Tensor) -> Tensor:
        """What enters each run: what left its neighbour."""
        if backwards:
            return torch.cat([leaving[:, 1:], entering[:, None]], 1)
        return torch.cat([entering[:, None], leaving[:, :-1]], 1)

    nothing = entering.new_zeros(len(entering), border.parts, entering.shape[-1])
    starts = joined(sweep(border, joined(nothing)))
    left: list[Tensor] = []
    largest, outcome = 1.0, Outcome(False, 1, math.inf, math.nan)
    for done in range(2, sweeps + 1):
        left, jump = _sweep_segments(sweep, segments, starts, left, tol * largest)
        reached = joined(left[-1])
        largest = left[-1].abs().amax().item() if backwards else 1.0
        # In this order a NaN is the larger one.
        before, residual = outcome.residual, max((reached - starts).abs().amax().item(), jump)
        outcome = outcome._replace(block=residual <= tol * largest, sweeps=done, residual=residual)
        if outcome.block:
            return left[-1][:, last], outcome
        if not residual < before:
            break
        starts = reached
    return entering, outcome


def _sweep_segments(
    sweep: Sweep, segments: list[Runs], starts: Tensor, earlier: list[Tensor], tol: float
) -> tuple[list[Tensor], float]:
    """What leaves each segment, begun at ``starts``, and by how much what enters one differs from that.

    Where a segment leaves what it left ``earlier``, to within ``tol``, what was swept after it stands.
    """
    leaving, found = starts, []
    for segment in segments:
        leaving = sweep(segment, leaving)
        found.append(leaving)
        if rest := earlier[len(found) :]:
            jump = (leaving - earlier[len(found) - 1]).abs().amax().item()
            if jump <= tol:
                return found + rest, jump
    return found, 0.0


def contraction(sweep: Sweep, entering: Tensor, tokens: int) -> float:
    """By what a token multiplies a small difference between two contexts, the largest of all rows.

    Power iteration along the first tokens: a random difference, carried on by a few of them and scaled back,
    again and again. What ``sweep`` fills in is of no use afterwards. NaN for fewer than two cycles of tokens.
    """
    cycles = min(CYCLES, tokens // CYCLE)
    if cycles < 2:
        return math.nan
    noise = torch.Generator(entering.device).manual_seed(0)
    difference = torch.randn(entering.shape, generator=noise, device=entering.device, dtype=entering.dtype)
    # A hundredth of a context: small beside it, large beside its rounding.
    size = entering.shape[-1] ** 0.5 / 100
    growth = []
    for cycle in range(cycles):
        difference = difference * (size / difference.norm(dim=-1, keepdim=True).clamp(min=1e-30))
        # One after the other: side by side they would write the same tokens, and a sweep may read them again.
        run = Runs(1, CYCLE, cycle * CYCLE)
        entering, moved = (once(sweep, run, start) for start in (entering, entering + difference))
        difference = moved - entering
        growth.append(difference.norm(dim=-1) / size)
    # Left out is the first cycle, which still holds directions that fade at once.
    return float((torch.stack(growth[1:]).log().mean(0) / CYCLE).amax().exp())


def _forgetting(rho: float, tol: float) -> int:
    """Tokens after which contexts of any difference differ by less than ``tol``; NEVER where they do not."""
    if rho == 0:
        return WARM_UP
    if not (0 < rho < 1 and tol > 0):
        return NEVER
    return max(WARM_UP, math.ceil(math.log(min(1.0, tol / LARGEST)) / math.log(rho)))


def once(sweep: Sweep, runs: Runs, entering: Tensor) -> Tensor:
    """A single run in each row: ``entering [B, C]`` to what leaves."""
    return sweep(runs, entering[:, None])[:, 0]
