"""Critical checks of contexts: do they differ, do they differ from what went in, does the past fade.

N tokens of a stream, E input width, C context width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Sweep = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""Inputs ``[1, N, E]`` behind a state ``[1, C]`` (None: zeros) to contexts ``[1, N, C]`` and the last one."""

FORGOTTEN = 1e-3
"""Two contexts whose mean squared distance is below this are the same for what follows."""

LONGEST_HORIZON = 256
"""Tokens after which two random starts are not looked at any more."""

_DEAD, _COPIED = 0.1, 0.95
_FINAL = ((1e-4, "excellent"), (1e-3, "good"), (1e-2, "moderate"))
_SLOPE, _SPREAD = 1e-3, 0.01
_PROFILE = 64
_FIRST_STD, _CONVERGED, _AT_ONCE = 0.01, 0.03, 65536


class Recurrence(NamedTuple):
    """One recurrence of a model: its ``name``, context ``width``, ``inputs`` of ids, and its ``sweep``.

    ``step`` is one token from contexts ``[n, C]`` by inputs ``[n, E]``; ``input_width`` is E.
    """

    name: str
    width: int
    input_width: int
    inputs: Callable[[Tensor], Tensor]
    sweep: Sweep
    step: Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def recurrences(model: Any) -> list[Recurrence]:
    """The recurrences of a context model: one, or one for every block of Context-KV.

    Raises ``ValueError`` for a model without contexts.
    """
    kind = model.config.model_type
    if kind not in ("context_lm", "context_kv"):
        raise ValueError(f"model must be a context_lm or a context_kv, got {kind!r}")
    body = model.model
    if kind == "context_lm" and model.config.cell != "context":
        cell = body.recurrent
        return [
            Recurrence(
                "cell",
                cell.context_dim,
                cell.embed_dim,
                body.embed,
                lambda x, state: cell(x, state)[1:],
                lambda context, x: cell(x[:, None], context)[2],
            )
        ]
    blocks = list(body.context_blocks) if kind == "context_kv" else [body.context_block]

    def one(number: int, block: Any) -> Recurrence:
        def inputs(ids: Tensor) -> Tensor:
            made: Tensor = block.inputs(body.embed(ids)[None])[0]
            return made

        def sweep(x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
            contexts, last, _ = block(x, state)
            return contexts, last

        def step(context: Tensor, x: Tensor) -> Tensor:
            made: Tensor = block.step(context, x)[-1]
            return made

        width = block.input_tokens * block.embed_dim
        return Recurrence(f"block {number}", block.context_dim, width, inputs, sweep, step)

    return [one(number, block) for number, block in enumerate(blocks)]


class ContextIdentity(NamedTuple):
    """Whether contexts are all zero, all alike, or the embeddings over again.

    ``deviation`` is the mean distance from the mean context. ``embed_similarity`` is the mean cosine with the
    embeddings, None where widths differ. ``dead`` contexts are near zero or near their mean; ``copied`` ones
    point where the embeddings do.
    """

    norm: float
    deviation: float
    embed_similarity: float | None
    dead: bool
    copied: bool


def context_identity(contexts: Tensor, x: Tensor) -> ContextIdentity:
    """Judge ``contexts [N, C]`` beside their inputs ``x [N, E]``.

    Dead with a mean norm or a mean deviation below 0.1, copied with a mean cosine above 0.95.
    """
    contexts, x = contexts.double(), x.double()
    norm = contexts.norm(dim=-1).mean().item()
    deviation = (contexts - contexts.mean(0)).norm(dim=-1).mean().item()
    similar = None
    if contexts.shape == x.shape:
        similar = F.cosine_similarity(contexts, x, dim=-1).mean().item()
    dead = norm < _DEAD or deviation < _DEAD
    return ContextIdentity(norm, deviation, similar, dead, similar is not None and similar > _COPIED)


class MappingIdentity(NamedTuple):
    """Cosines of contexts before and after one random token, of ``pairs`` pairs; ``above`` exceed 0.95."""

    mean: float
    least: float
    most: float
    above: int
    pairs: int
    identity: bool


@torch.no_grad()
def mapping_identity(one: Recurrence, *, pairs: int = 100, seed: int = 42) -> MappingIdentity:
    """Whether a token changes a context at all: ``identity`` for a mean cosine above 0.95.

    Contexts and inputs are drawn as a layer norm would leave them.
    """
    generator = torch.Generator().manual_seed(seed)
    before, x = (
        F.layer_norm(torch.randn(pairs, width, generator=generator), (width,))
        for width in (one.width, one.input_width)
    )
    after = one.step(before, x)
    cosines = F.cosine_similarity(before.double(), after.double(), dim=-1)
    mean = cosines.mean().item()
    above = int((cosines > _COPIED).sum())
    return MappingIdentity(mean, cosines.min().item(), cosines.max().item(), above, pairs, mean > _COPIED)


class SweepCheck(NamedTuple):
    """Of ``positions``, how many a last sweep moved by less than 0.03, and by how much it moved all.

    ``cvfp_loss`` is the mean squared change by that sweep, ``final_difference`` the mean squared distance of
    its contexts from the exact ones.
    """

    converged: int
    positions: int
    cvfp_loss: float
    final_difference: float


@torch.no_grad()
def sweep_check(one: Recurrence, x: Tensor, contexts: Tensor, *, sweeps: int, seed: int = 42) -> SweepCheck:
    """Sweeps over ``x [N, E]`` as phase 1 makes them, without noise or training; ``contexts`` are exact.

    The first of ``sweeps`` draws contexts; in each other one a position starts from where the sweep before
    left its left neighbour.
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    now = _FIRST_STD * torch.randn(contexts.shape, generator=generator, device=x.device, dtype=x.dtype)
    before = now
    for _ in range(max(1, sweeps - 1)):
        shifted = torch.cat([torch.zeros_like(now[:1]), now[:-1]])
        parts = zip(shifted.split(_AT_ONCE), x.split(_AT_ONCE), strict=True)
        before, now = now, torch.cat([one.step(context, part) for context, part in parts])
    changes = (now - before).square().mean(-1)
    apart = (now - contexts.to(now)).square().mean().item()
    return SweepCheck(int((changes < _CONVERGED).sum()), len(x), changes.mean().item(), apart)


class PassConvergence(NamedTuple):
    """What passes over one stream change, each starting where the one before ended.

    ``differences`` are the mean norms of the changes of passes 2, 3, ...; ``profile`` holds the mean squared
    change of the second pass at each of the first positions, and ``two_starts`` that between two random
    starts. ``horizon`` is the first position from which on two starts agree to 0.001, None if they never do:
    so many tokens back reaches the memory.
    """

    differences: list[float]
    verdict: str
    profile: list[float]
    two_starts: list[float]
    horizon: int | None


@torch.no_grad()
def pass_convergence(
    one: Recurrence, x: Tensor, *, passes: int = 5, starts: int = 8, seed: int = 42
) -> PassConvergence:
    """Sequential passes over ``x [N, E]`` with the state carried over, and streams from random starts.

    The last difference is ``excellent`` below 1e-4, ``good`` below 1e-3, ``moderate`` below 1e-2, and
    ``fail`` otherwise or where differences grow. By itself that only says that a start is forgotten in N
    tokens; the profile and the horizon say how fast.
    """
    contexts = _passes(one, x, passes)
    differences = [(b - a).norm(dim=-1).mean().item() for a, b in pairwise(contexts)]
    profile = (contexts[1] - contexts[0])[:_PROFILE].square().mean(-1).tolist()
    apart = _two_starts(one, x, starts, seed)
    return PassConvergence(differences, _judged(differences), profile, apart, horizon(apart))


def _judged(differences: Sequence[float]) -> str:
    """The verdict; differences that grow by more than rounding are a failure."""
    grown = max(differences[1:], default=0.0) > differences[0]
    said = next((name for bound, name in _FINAL if differences[-1] < bound), "fail")
    return "fail" if grown and differences[-1] >= _FINAL[0][0] else said


def _passes(one: Recurrence, x: Tensor, passes: int) -> list[Tensor]:
    """Contexts ``[N, C]`` of each pass, in float64 on the CPU."""
    if passes < 2:
        raise ValueError(f"passes must be at least 2, got {passes}")
    found, state = [], None
    for _ in range(passes):
        contexts, state = one.sweep(x[None], state)
        found.append(contexts[0].double().cpu())
    return found


@torch.no_grad()
def stream_checks(model: Any, ids: Tensor, sweeps: Sequence[int]) -> list[dict[str, Any]]:
    """For every recurrence of ``model`` on ``ids [N]``: :func:`sweep_check` and the horizon of two starts.

    ``sweeps`` has a number for each.
    """
    found = []
    for one, count in zip(recurrences(model), sweeps, strict=True):
        x = one.inputs(ids.to(model.device))
        check = sweep_check(one, x, one.sweep(x[None], None)[0][0], sweeps=count)
        found.append({**check._asdict(), "horizon": horizon(_two_starts(one, x, 8, 42))})
    return found


def _two_starts(one: Recurrence, x: Tensor, starts: int, seed: int) -> list[float]:
    """Mean squared distance by position of pairs of random starts, each pair on tokens of its own."""
    generator = torch.Generator().manual_seed(seed)
    length = min(LONGEST_HORIZON, len(x) // starts)
    if length < 1:
        raise ValueError(f"x must have at least {starts} positions, got {len(x)}")
    rows = torch.stack([x[n * length : (n + 1) * length] for n in range(starts)])
    draw = torch.randn(2, starts, one.width, generator=generator)
    states = F.layer_norm(draw, (one.width,)).to(x.device)
    first, second = (one.sweep(rows, state.to(x.dtype))[0].double() for state in states)
    found: list[float] = (first - second).square().mean((0, 2)).cpu().tolist()
    return found


def horizon(distances: Sequence[float], bound: float = FORGOTTEN) -> int | None:
    """Tokens until ``distances`` by position stay below ``bound``; None if they end above it."""
    above = [place for place, value in enumerate(distances) if not value < bound]
    if above and above[-1] == len(distances) - 1:
        return None
    return above[-1] + 2 if above else 1


class TrialVerdict(NamedTuple):
    """What repeated passes over validation tokens come to, by the trend of their losses."""

    initial: float | None
    final: float | None
    reduction: float | None
    slope: float | None
    verdict: str
    losses: list[float]


@torch.no_grad()
def validation_trials(one: Recurrence, x: Tensor, *, trials: int = 10) -> TrialVerdict:
    """The verdict on mean squared changes between ``trials`` consecutive sequential passes over ``x [N, E]``.

    Of N tokens, a fixed point is where a pass begins as it ended: see :func:`trial_verdict`.
    """
    contexts = _passes(one, x, trials)
    return trial_verdict([(b - a).square().mean().item() for a, b in pairwise(contexts)])


def trial_verdict(losses: Sequence[float]) -> TrialVerdict:
    """CONVERGING, CONVERGED, DIVERGING, UNSTABLE or INSUFFICIENT_DATA, by least-squares slope and spread.

    In this order: a slope below -0.001 per trial converges; one of at most 0.001 either way with a standard
    deviation below 0.01 has converged; one above 0.001 diverges. Fewer than two losses show nothing.
    """
    losses = list(losses)
    if len(losses) < 2:
        first = losses[0] if losses else None
        return TrialVerdict(first, first, None, None, "INSUFFICIENT_DATA", losses)
    slope, spread = float(np.polyfit(range(len(losses)), losses, 1)[0]), float(np.std(losses))
    if slope < -_SLOPE:
        said = "CONVERGING"
    elif abs(slope) < _SLOPE and spread < _SPREAD:
        said = "CONVERGED"
    elif slope > _SLOPE:
        said = "DIVERGING"
    else:
        said = "UNSTABLE"
    reduction = 100 * (1 - losses[-1] / losses[0]) if losses[0] else None
    return TrialVerdict(losses[0], losses[-1], reduction, slope, said, losses)
