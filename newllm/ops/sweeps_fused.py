"""From the arguments of ``context_sweep`` to the native sweeps, or Jacobi's, and back.

On a CPU everything is computed in float32. On a GPU matrices stay in x's dtype, float16 apart, which has too
few exponents for a float32 context's products and is computed in float32 as well.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from newllm.ops.context_fused import context_sweep, outcome_of
from newllm.ops.gated_fused import gated_sweep
from newllm.ops.jacobi_fused import jacobi_sweep
from newllm.reference.context import context_drive, gated_drive
from newllm.types import ContextParams, GatedParams, SweepInfo

# Parameters that work on the float32 context.
FLOAT32 = ("ln_weight", "ln_bias", "bias_h", "bias_f", "bias_i", "bias_d")


def sweep(
    x: Tensor,
    params: ContextParams | GatedParams,
    state: Tensor | None,
    *,
    method: str,
    tol: float,
    sweeps: int | None,
    fallback: bool,
) -> tuple[Tensor, Tensor, SweepInfo]:
    """Contexts ``[B, T, C]`` in x's dtype, the state ``[B, C]`` in float32, how it was done."""
    if method == "auto" and torch.compiler.is_compiling():
        method = "sequential"
    start = x.new_zeros(len(x), params.weight_c.shape[-1], dtype=torch.float32) if state is None else state
    dtype = torch.bfloat16 if x.device.type == "cuda" and x.dtype == torch.bfloat16 else torch.float32
    given: dict[str, Any] = {
        name: value.to(torch.float32 if name in FLOAT32 else dtype) if isinstance(value, Tensor) else value
        for name, value in params._asdict().items()
    }
    how = (method, tol, sweeps, fallback)
    if method == "jacobi":
        outputs, last, info = jacobi_sweep(x.to(dtype), ContextParams(**given), start, tol=tol, sweeps=sweeps)
        return outputs.to(x.dtype), last, info
    if isinstance(params, ContextParams):
        outputs, last, report = _context(x.to(dtype), ContextParams(**given), start, how)
    else:
        outputs, last, report = _gated(x.to(dtype), GatedParams(**given), start, how)
    return outputs.to(x.dtype), last, _info(method, report, last)


def _context(x: Tensor, params: ContextParams, start: Tensor, how: Any) -> tuple[Tensor, Tensor, Tensor]:
    drive = context_drive(x, params).float()
    outputs, last, report = context_sweep(
        drive, params.weight_c, params.ln_weight, params.ln_bias, start, *how
    )
    return outputs[:, :, -1] if outputs.shape[2] > 1 else outputs.squeeze(2), last, report


def _gated(x: Tensor, params: GatedParams, start: Tensor, how: Any) -> tuple[Tensor, Tensor, Tensor]:
    drive = gated_drive(x, params).float()
    gates = torch.stack([params.weight_f, params.weight_i, params.weight_d])
    biases = torch.stack([params.bias_f, params.bias_i, params.bias_d])
    network = params.weight_c, params.weight_h, params.bias_h
    clamp = math.inf if params.clamp is None else params.clamp
    norm = params.ln_weight, params.ln_bias
    return gated_sweep(drive, *network, gates, biases, *norm, start, clamp, *how)


def _info(method: str, report: Tensor, like: Tensor) -> SweepInfo:
    """How it was done. The report is read only where the method had to decide something."""
    if method == "sequential":
        return SweepInfo("sequential", 1, like.new_zeros(()), like.new_full((), torch.nan))
    outcome = outcome_of(report)
    numbers = (like.new_full((), value) for value in (outcome.residual, outcome.rho))
    return SweepInfo("block" if outcome.block else "sequential", outcome.sweeps, *numbers)
