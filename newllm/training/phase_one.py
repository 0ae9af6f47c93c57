"""Phase 1: contexts that neither move nor coincide, learnt without targets.

N positions of the stream, C context width, E input width of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from newllm.modules.context_block import ContextBlock, shift_contexts
from newllm.modules.context_health import effective_rank
from newllm.training.diversity import diversity_loss
from newllm.training.phase_checkpoints import PhaseCheckpoints
from newllm.training.phase_config import Phase1Config

_FIRST_STD = 0.01
_EVALUATED_AT_ONCE = 65536
_COMPARED_AT_ONCE = 100_000


class PhaseOneResult(NamedTuple):
    """How it went: ``sweeps`` with the first, the last ``rate``, why it ``stopped``, its ``history``.

    ``contexts [N, C]`` are those of the last sweep, on the CPU; ``history`` has a row per sweep.
    """

    contexts: Tensor
    sweeps: int
    rate: float
    stopped: str
    history: list[dict[str, Any]]


def train_contexts(
    block: ContextBlock,
    x: Tensor,
    config: Phase1Config,
    *,
    validation: Tensor | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
    keep: PhaseCheckpoints | None = None,
    state: dict[str, Any] | None = None,
) -> PhaseOneResult:
    """Train ``block`` on the stream ``x [N, E]`` by sweeps over all positions at once.

    In every sweep each position starts from the context that the sweep before left at its left neighbour; no
    gradient goes from one position or sweep to another. Gradients of all batches make one step of Adam. The
    stream and its contexts stay where ``x`` is, batches go to the block's device. Noise is drawn where ``x``
    is: runs on a CPU and on a GPU differ by it.

    Args:
        validation: stream ``[M, E]`` whose effective rank ends the training, for ``config.stop == "rank"``.
        log: called with each row of the history.
        keep: told of every sweep.
        state: what ``keep`` held of a training that was cut off, to go on from.

    Raises:
        ValueError: for a stream of one position, or no validation stream where one is needed.
        RuntimeError: for a loss that is not finite, with its sweep and batch.
    """
    if len(x) < 2:
        raise ValueError(f"x must have at least 2 positions, got {len(x)}")
    if config.stop == "rank" and validation is None:
        raise ValueError("validation must be given for stop 'rank', got None")
    generator = torch.Generator(x.device).manual_seed(config.seed)
    contexts = _FIRST_STD * torch.randn(
        len(x), block.context_dim, generator=generator, dtype=x.dtype, device=x.device
    )
    optimizer = torch.optim.Adam(block.parameters(), config.learning_rate)
    history: list[dict[str, Any]] = []
    if state is not None:
        block.load_state_dict(state["block"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        contexts, history = state["contexts"].to(x), state["history"]
    block.train()
    stopped, sweep = "sweeps", 1 + len(history)
    for sweep in range(2 + len(history), config.max_iterations + 1):
        moved, losses = _sweep(block, x, contexts, config, generator, optimizer, sweep)
        rate = convergence_rate(contexts, moved, config.convergence_threshold)
        contexts = moved
        history.append({"sweep": sweep, "convergence_rate": rate, **losses})
        if config.stop == "rank" and (sweep - 1) % config.rank_every == 0:
            assert validation is not None
            history[-1]["validation_rank"] = validation_rank(block, validation, config.rank_rows)
            block.train()
        if log is not None:
            log(history[-1])
        reason = stop_reason(history, config)
        if reason is not None:
            stopped = reason
            break
        if keep is not None:
            now = {"contexts": contexts, "history": history, "generator": generator.get_state()}
            keep.reached(partial(_held, block, optimizer, now))
    block.eval()
    return PhaseOneResult(contexts, sweep, history[-1]["convergence_rate"], stopped, history)


def _held(block: ContextBlock, optimizer: torch.optim.Optimizer, now: dict[str, Any]) -> dict[str, Any]:
    """What goes on from here needs."""
    return {"block": block.state_dict(), "optimizer": optimizer.state_dict(), **now}


def _sweep(
    block: ContextBlock,
    x: Tensor,
    contexts: Tensor,
    config: Phase1Config,
    generator: torch.Generator,
    optimizer: torch.optim.Optimizer,
    sweep: int,
) -> tuple[Tensor, dict[str, float]]:
    """All positions once and one step: their contexts, and the losses."""
    device = next(block.parameters()).device
    diversity = diversity_loss(config.diversity)
    before = shift_contexts(contexts, config.start)
    if config.context_noise:
        noise = torch.randn(before.shape, generator=generator, dtype=before.dtype, device=before.device)
        before = before + config.context_noise * noise
    moved = torch.empty_like(contexts)
    slices = batches(len(x), config.batch_size)
    sums = torch.zeros(2, dtype=torch.float64)
    optimizer.zero_grad()
    for number, part in enumerate(slices):
        out = block.step(before[part].to(device), x[part].to(device))[-1]
        change = (out - contexts[part].to(device)).square().mean()
        apart = diversity(out)
        loss = (1 - config.dist_reg_weight) * change + config.dist_reg_weight * apart
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss of sweep {sweep}, batch {number} is {loss.item()}")
        (loss / len(slices)).backward()
        moved[part] = out.detach().to(moved.device)
        sums += torch.stack([change, apart]).detach().double().cpu()
    torch.nn.utils.clip_grad_norm_(block.parameters(), config.gradient_clip)
    optimizer.step()
    change_mean, apart_mean = (sums / len(slices)).tolist()
    return moved, {"change": change_mean, "diversity": apart_mean}


def batches(positions: int, size: int) -> list[slice]:
    """Slices of ``size`` positions; a last one of a single position joins the one before."""
    starts = list(range(0, positions, size))
    if len(starts) > 1 and positions - starts[-1] == 1:
        starts.pop()
    ends = [*starts[1:], positions]
    return [slice(start, end) for start, end in zip(starts, ends, strict=True)]


def convergence_rate(before: Tensor, after: Tensor, threshold: float) -> float:
    """The share of contexts ``[N, C]`` whose mean squared change is below ``threshold``."""
    converged = 0
    for start in range(0, len(before), _COMPARED_AT_ONCE):
        part = slice(start, start + _COMPARED_AT_ONCE)
        converged += int(((after[part] - before[part]).square().mean(-1) < threshold).sum())
    return converged / len(before)


def stop_reason(history: Sequence[dict[str, Any]], config: Phase1Config) -> str | None:
    """Why the training ends here: ``rate``, ``standstill`` or ``rank``; None if it goes on."""
    if history[-1]["sweep"] < config.min_iterations:
        return None
    if config.stop == "rank":
        ranks = [row["validation_rank"] for row in history if "validation_rank" in row]
        since_best = len(ranks) - 1 - ranks.index(max(ranks)) if ranks else 0
        return "rank" if since_best >= config.rank_patience else None
    rates = [row["convergence_rate"] for row in history]
    if rates[-1] >= config.stop_rate:
        return "rate"
    last = rates[-config.improvement_patience - 1 :]
    if len(last) <= config.improvement_patience or last[0] < config.improvement_from:
        return None
    gains = [after - before for before, after in pairwise(last)]
    return "standstill" if max(gains) < config.min_improvement else None


@torch.no_grad()
def exact_contexts(block: ContextBlock, x: Tensor) -> Tensor:
    """The recurrence itself over the stream ``x [N, E]`` from a zero context: ``[N, C]``, where ``x`` is.

    Vectorised by the block method of ``ops.context_sweep``, exact to its tolerance.
    """
    device, state, found = next(block.parameters()).device, None, []
    block.eval()
    for part in x.split(_EVALUATED_AT_ONCE):
        contexts, state, _ = block(part[None].to(device), state)
        found.append(contexts[0].to(x.device))
    return torch.cat(found)


def validation_rank(block: ContextBlock, x: Tensor, rows: int) -> float:
    """The effective rank's share, of the first ``rows`` exact contexts of ``x``: also the final figure."""
    return effective_rank(exact_contexts(block, x[:rows]), rows=rows).share
