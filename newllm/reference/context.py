"""Context recurrences: a vector of constant width that is rewritten at every token.

    context   c <- LN(c + GELU(W_c c + W_x x + b)), layer after layer
    gated     h = FNN([x ; c]);  c <- LN(sigmoid(W_f h) c + sigmoid(W_i h) tanh(W_d h)), then clamp

Layer l reads layer l-1 at the same token, layer 1 the last layer's result at the token before. Cells
(one token's update) know nothing of sweeps (how a sequence of them is evaluated), nor sweeps of cells.

B batch, T tokens, E input width, C context width; other sizes as in ``ContextParams``, ``GatedParams``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from newllm.types import ContextParams, GatedParams, SweepInfo

LAYER_NORM_EPS = 1e-5
"""Added to the variance in every layer norm; torch's default."""

BLOCK_SWEEPS = 4
"""Sweeps that the block method tries by default: a contraction that pays needs two."""

Params = ContextParams | GatedParams


class Cell(NamedTuple):
    """One token's update, in two pure functions.

    ``drive(x [..., E], params)`` is what the update takes from the input alone, computed for all
    tokens at once; ``step(drive, context [..., C], params)`` is the context after the token.
    """

    drive: Callable[[Tensor, Any], Tensor]
    step: Callable[[Tensor, Tensor, Any], Tensor]


def context_drive(x: Tensor, params: ContextParams) -> Tensor:
    """W_x x + b of every layer: ``[..., E]`` to ``[..., L, C]``, one matrix product."""
    return F.linear(x, params.weight_x.flatten(0, 1), params.bias.flatten()).unflatten(-1, params.bias.shape)


def context_cell(drive: Tensor, context: Tensor, params: ContextParams) -> Tensor:
    """One token through all layers: ``drive [..., L, C]``, ``context [..., C]`` to ``[..., C]``."""
    layers = zip(drive.unbind(-2), params.weight_c, params.ln_weight, params.ln_bias, strict=True)
    for added, weight, gain, shift in layers:
        change = F.gelu(F.linear(context.to(weight.dtype), weight) + added)
        context = _layer_norm(context + change, gain, shift)
    return context


def gated_drive(x: Tensor, params: GatedParams) -> Tensor:
    """The input's share of the first hidden layer: ``[..., E]`` to ``[..., H]``."""
    return F.linear(x, params.weight_x, params.bias)


def gated_hidden(drive: Tensor, context: Tensor, params: GatedParams) -> Tensor:
    """h = FNN([x ; c]): ``drive [..., H]``, ``context [..., C]`` before the token, to ``[..., H]``."""
    hidden = F.relu(drive + F.linear(context.to(drive.dtype), params.weight_c))
    for weight, bias in zip(params.weight_h, params.bias_h, strict=True):
        hidden = F.relu(F.linear(hidden, weight, bias))
    return hidden


def gated_cell(drive: Tensor, context: Tensor, params: GatedParams) -> Tensor:
    """One token: ``drive [..., H]``, ``context [..., C]`` to ``[..., C]``."""
    hidden = gated_hidden(drive, context, params)
    forget = F.linear(hidden, params.weight_f, params.bias_f).sigmoid()
    write = F.linear(hidden, params.weight_i, params.bias_i).sigmoid()
    candidate = F.linear(hidden, params.weight_d, params.bias_d).tanh()
    context = _layer_norm(forget * context + write * candidate, params.ln_weight, params.ln_bias)
    return context if params.clamp is None else context.clamp(-params.clamp, params.clamp)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, LAYER_NORM_EPS)


CONTEXT_CELL = Cell(context_drive, context_cell)
GATED_CELL = Cell(gated_drive, gated_cell)


class NotContracting(RuntimeError):
    """The block method was asked for without a way back, and does not converge for this ``reason``."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"method 'block' does not converge: {reason}; take method='sequential' or allow fallback=True"
        )


class _Problem(NamedTuple):
    """A recurrence ready to be swept: ``drive [B, T, ...]``, ``start [B, C]``, ``step(drive, context)``."""

    drive: Tensor
    start: Tensor
    step: Callable[[Tensor, Tensor], Tensor]


def sequential_sweep(
    x: Tensor, params: Params, state: Tensor | None = None, *, compute_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, SweepInfo]:
    """The definition: one token after the other.

    Args:
        x: inputs ``[B, T, E]``, T >= 1.
        params: ``ContextParams`` or ``GatedParams``; their type chooses the cell.
        state: last layer's output ``[B, C]`` before the first token; None is zeros.
        compute_dtype: dtype of matrices and intermediates. Default: that of the state. The context
            itself, and its layer norm, always stay in the state's dtype.

    Returns:
        contexts ``[B, T, C]`` after each token, in x's dtype; the state ``[B, C]`` after the last one, in
        x's dtype promoted to at least float32 (so cutting a sequence into calls changes nothing); info.
    """
    problem = _problem(x, params, state, compute_dtype)
    contexts, last = _scan(problem.step, problem.drive, problem.start)
    return contexts.to(x.dtype), last, SweepInfo("sequential", 1, _zero(last), _unknown(last))


def jacobi_sweep(
    x: Tensor,
    params: Params,
    state: Tensor | None = None,
    *,
    tol: float = 1e-5,
    sweeps: int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, SweepInfo]:
    """All tokens at once from the previous sweep's contexts, moved on by one token; first zeros.

    After k sweeps the first k contexts are exact, and every later one is what the k tokens up to it
    make of a zero context. Ends after ``sweeps`` sweeps (default and maximum T, which is exact), or
    when no context changed by more than ``tol``; ``tol=0`` never looks and so never waits for a device.
    Gradients are those of the sweeps done: they reach as many tokens back, and take memory for each
    sweep. The rest as ``sequential_sweep``.
    """
    problem = _problem(x, params, state, compute_dtype)
    contexts = problem.start[:, None].new_zeros(*x.shape[:2], problem.start.shape[-1])
    residual, done, limit = _zero(contexts) + torch.inf, 0, min(sweeps or x.shape[1], x.shape[1])
    first = residual
    while done < limit and not (tol > 0 and residual <= tol):
        previous, done = contexts, done + 1
        contexts = problem.step(problem.drive, torch.cat([problem.start[:, None], previous[:, :-1]], 1))
        residual = _distance(contexts, previous)
        first = residual if done == 1 else first
    # The residuals of a Jacobi sweep are those of a power iteration.
    info = SweepInfo("jacobi", done, residual, _rate(residual, first, done - 1))
    return contexts.to(x.dtype), contexts[:, -1].clone(), info


def block_sweep(
    x: Tensor,
    params: Params,
    state: Tensor | None = None,
    *,
    chunk: int = 64,
    tol: float = 1e-5,
    sweeps: int | None = None,
    fallback: bool = True,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, SweepInfo]:
    """Multiple shooting: chunks of ``chunk`` tokens side by side, each from where its left one last ended.

    The certificate is the largest jump between a chunk's end and the next one's start. A sweep whose
    jumps are all within ``tol`` is the result; when ``sweeps`` of them (default 4) reach no such one,
    or the jumps do not shrink, the sequential sweep is, or with ``fallback=False`` raises
    ``NotContracting``. Gradients are those of the sweeps done: they reach as many chunks back. The rest as
    ``sequential_sweep``.
    """
    problem = _problem(x, params, state, compute_dtype)
    drive = _chunked(problem.drive, chunk)
    first = problem.start[:, None]
    starts = torch.cat([first, first.new_zeros(len(first), drive.shape[1] - 1, first.shape[-1])], 1)
    residual, rho, done = _zero(first) + torch.inf, _unknown(first), 0
    for done in range(1, (sweeps or BLOCK_SWEEPS) + 1):
        contexts, ends = _scan(problem.step, drive, starts)
        reached = torch.cat([first, ends[:, :-1]], 1)
        previous, residual = residual, _distance(reached, starts)
        rho = _rate(residual, previous, chunk) if done > 1 else rho
        if residual <= tol:
            contexts = contexts.flatten(1, 2)[:, : x.shape[1]]
            return contexts.to(x.dtype), contexts[:, -1].clone(), SweepInfo("block", done, residual, rho)
        if not residual < previous:
            break
        starts = reached
    if not fallback:
        raise NotContracting(
            f"chunks of {chunk} tokens differ by {float(residual):.3g} at their borders after {done} sweeps, "
            f"and tol is {tol:g}"
        )
    contexts, last = _scan(problem.step, problem.drive, problem.start)
    return contexts.to(x.dtype), last, SweepInfo("sequential", done + 1, _zero(last), rho)


def _problem(x: Tensor, params: Params, state: Tensor | None, compute_dtype: torch.dtype | None) -> _Problem:
    carried = torch.promote_types(x.dtype, torch.float32)
    cell = CONTEXT_CELL if isinstance(params, ContextParams) else GATED_CELL
    cast = _cast(params, compute_dtype or carried, carried)
    if state is None:
        state = x.new_zeros(len(x), params.weight_c.shape[-1])
    drive = cell.drive(x.to(cast.weight_x.dtype), cast)
    return _Problem(drive, state.to(carried), lambda token, context: cell.step(token, context, cast))


def _cast(params: Params, compute: torch.dtype, carried: torch.dtype) -> Params:
    """Matrices and their biases in ``compute``; layer norms, which work on the context, in ``carried``."""
    values: dict[str, Any] = {
        name: value.to(carried if name in ("ln_weight", "ln_bias") else compute)
        for name, value in params._asdict().items()
        if isinstance(value, Tensor)
    }
    return params._replace(**values)


def _scan(step: Callable[[Tensor, Tensor], Tensor], drive: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """``drive [..., T, *]`` stepped through from ``context [..., C]``: contexts ``[..., T, C]``, the last."""
    time = context.ndim - 1
    contexts = []
    for token in drive.unbind(time):
        context = step(token, context)
        contexts.append(context)
    return torch.stack(contexts, time), context


def _chunked(drive: Tensor, chunk: int) -> Tensor:
    """``[B, T, *]`` to ``[B, ceil(T / chunk), chunk, *]``, zeros at the end: nothing comes after them."""
    batch, tokens, *rest = drive.shape
    count = -(-tokens // chunk)
    padding = drive.new_zeros(batch, count * chunk - tokens, *rest)
    return torch.cat([drive, padding], 1).unflatten(1, (count, chunk))


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).detach().abs().amax()


def _rate(residual: Tensor, first: Tensor, tokens: int) -> Tensor:
    """By what each of ``tokens`` multiplies a difference that they take from ``first`` to ``residual``."""
    return (residual / first) ** (1 / tokens) if tokens else _unknown(residual)


def _zero(like: Tensor) -> Tensor:
    return like.new_zeros(())


def _unknown(like: Tensor) -> Tensor:
    return like.new_full((), torch.nan)
