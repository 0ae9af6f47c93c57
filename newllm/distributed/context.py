"""Context sweeps over ranks: every rank sweeps its own tokens, again and again until the borders agree.

This is block-Jacobi (multiple shooting) with a rank's slice for a chunk. A rank begins with zeros, then with
what left its neighbour's last pass; the largest jump at a border is the certificate. A recurrence that
forgets within a slice takes two passes, whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from newllm.distributed.line import Line, line_of
from newllm.distributed.sequence_parallel import Mesh
from newllm.ops import checks
from newllm.ops.context_sweep import context_sweep
from newllm.reference.context import NotContracting
from newllm.types import ContextParams, GatedParams, SweepInfo

Params = ContextParams | GatedParams
SWEEPS = 4


class _Outcome(NamedTuple):
    """What enters this rank, how many passes that took, and the largest jump at a border."""

    entering: Tensor
    sweeps: int
    residual: Tensor
    block: bool


def sequence_sweep(
    x: Tensor,
    params: Params,
    *,
    mesh: Mesh,
    cell: Literal["context", "gated"] = "context",
    state: Tensor | None = None,
    tol: float = 1e-5,
    sweeps: int | None = None,
    fallback: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, SweepInfo]:
    """``newllm.ops.context_sweep`` with ``method="block"`` over a sequence whose slices lie on the ranks.

    Args:
        x: this rank's inputs ``[B, T, E]``; T may differ from rank to rank.
        params, cell, tol, backend: see ``newllm.ops.context_sweep``; params are equal on all ranks.
        mesh: one dimension of a device mesh, or a process group, whose ranks hold the slices in order.
        state: the context before the sequence ``[B, C]``; the first rank begins with it (None: zeros).
        sweeps: most passes (None: 4).
        fallback: whether ranks may sweep one after the other where their borders do not come to agree.

    Returns:
        Contexts ``[B, T, C]`` and the state after this rank's slice; on the last rank the sequence's. How it
        was done: ``residual`` is the largest jump at a border between ranks, the same on all, 0 where they
        swept one after the other. Gradients are the recurrence's own, and found in the same way from right to
        left, with jumps of at most ``tol`` of the largest gradient at a border; each rank's gradients of
        params are those of its own tokens.

    Raises:
        TypeError: for a wrong dtype, mesh or kind of params. ValueError: for a wrong size, device or choice.
        RuntimeError: for borders that do not come to agree, with ``fallback=False``; where a neighbour does
            not answer within the process group's timeout.
    """
    line = mesh if isinstance(mesh, Line) else line_of(mesh)
    checks.require(tol >= 0, "tol", tol, "0 or more")
    checks.require(sweeps is None or sweeps >= 1, "sweeps", sweeps, "at least 1 or None")
    checks.floats("x", x)
    checks.require(x.ndim == 3 and 0 not in x.shape[:2], "x", list(x.shape), "of shape [B, T, E], none 0")
    if state is None:
        dtype = torch.promote_types(x.dtype, torch.float32)
        state = x.new_zeros(len(x), params.weight_c.shape[-1], dtype=dtype)
    tensors = {name: value for name, value in params._asdict().items() if isinstance(value, Tensor)}
    fixed = {name: value for name, value in params._asdict().items() if name not in tensors}
    call = _Call(line, type(params), tuple(tensors), fixed, cell, tol, sweeps or SWEEPS, fallback, backend)
    contexts, last, residual, done, block = _Sweep.apply(call, x, state, *tensors.values())
    unknown = residual.new_full((), torch.nan)
    return contexts, last, SweepInfo("block" if bool(block) else "sequential", int(done), residual, unknown)


class _Call(NamedTuple):
    """A sweep's choices; ``names`` and ``fixed`` put the params together from their tensors."""

    line: Line
    kind: Any
    names: tuple[str, ...]
    fixed: dict[str, Any]
    cell: Literal["context", "gated"]
    tol: float
    sweeps: int
    fallback: bool
    backend: str | None

    def run(self, x: Tensor, state: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """One pass over this rank's tokens."""
        params = self.kind(**dict(zip(self.names, tensors, strict=True)), **self.fixed)
        options = {"cell": self.cell, "state": state, "backend": self.backend}
        return context_sweep(x, params, method="sequential", **options)[:2]  # type: ignore[arg-type]


class _Sweep(torch.autograd.Function):
    """The sweep and its gradient, both by shooting over the line."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, state: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        found: list[tuple[Tensor, Tensor]] = []

        def sweep(entering: Tensor) -> Tensor:
            found[:] = [call.run(x, entering, tensors)]
            return found[0][1]

        outcome = _shoot(call, sweep, state, back=False)
        ctx.call = call
        ctx.save_for_backward(x, outcome.entering, *tensors)
        facts = outcome.residual, torch.tensor(outcome.sweeps), torch.tensor(outcome.block)
        ctx.mark_non_differentiable(*facts)
        return *found[0], *facts

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        call, (x, entering, *tensors) = ctx.call, ctx.saved_tensors
        dcontexts, dlast = slopes[:2]
        with torch.enable_grad():
            inputs = [y.detach().requires_grad_() for y in (x, entering, *tensors)]
            contexts, last = call.run(inputs[0], inputs[1], tuple(inputs[2:]))
        found: list[Tensor] = []

        def sweep(entering: Tensor) -> Tensor:
            # What comes from the right joins what this rank's own state was asked for.
            own = (dcontexts, entering + dlast)
            found[:] = torch.autograd.grad((contexts, last), inputs, own, retain_graph=True)
            return found[1]

        _shoot(call, sweep, torch.zeros_like(dlast), back=True)
        dx, dstate, *rest = found
        return None, dx, dstate if call.line.first else torch.zeros_like(dstate), *rest


def _shoot(call: _Call, sweep: Callable[[Tensor], Tensor], start: Tensor, *, back: bool) -> _Outcome:
    """Sweep until what leaves each rank is what enters the next, to within the tolerance.

    ``start`` enters at the line's beginning. Backwards the tolerance is a share of the largest gradient.
    """
    line, what = call.line, "gradients of contexts" if back else "contexts"
    begins = line.last if back else line.first
    entering = start if begins else torch.zeros_like(start)
    before = float("inf")
    residual = start.new_zeros(())
    for done in range(1, call.sweeps + 1):
        leaving = sweep(entering)
        if line.size == 1:
            return _Outcome(entering, 1, residual, True)
        reached = line.shift(leaving.contiguous(), leaving, what, back=back).wait()
        jump = start.new_zeros(()) if reached is None else (reached - entering).abs().amax()
        # The largest over ranks may lose a NaN.
        jump = jump.nan_to_num(nan=torch.inf)
        residual, largest = line.largest(torch.stack([jump, leaving.abs().amax()])).unbind()
        now = residual.item()
        if now < torch.inf and now <= call.tol * (largest.item() if back else 1.0):
            return _Outcome(entering, done, residual, True)
        if not now < before:
            break
        before = now
        entering = start if reached is None else reached
    if not call.fallback:
        raise NotContracting(
            f"ranks differ by {before:.3g} at their borders after {done} sweeps, and tol is {call.tol:g}"
        )
    return _one_after_the_other(call, sweep, start, done, what, back=back)


def _one_after_the_other(
    call: _Call, sweep: Callable[[Tensor], Tensor], start: Tensor, done: int, what: str, *, back: bool
) -> _Outcome:
    """Each rank begins when its neighbour has ended."""
    entered: list[Tensor] = []

    def step(incoming: Tensor | None) -> Tensor:
        entered.append(start if incoming is None else incoming)
        return sweep(entered[0])

    call.line.carry(start, step, what, back=back).wait()
    return _Outcome(entered[0], done + 1, start.new_zeros(()), False)
