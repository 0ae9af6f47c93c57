"""Contracts of the native sweeps of the context cell: schema, result shapes and gradients.

``newllm._C`` is imported when an operator runs, so that its contract exists without it. Everything is float32
but ``weight [L, C, C]`` on a GPU, which may be bfloat16; ``drive [B, T, L, C]`` is W_x x + b.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from newllm.ops.native import Runs, kernel_of, product, summed_outer, sweep
from newllm.ops.shooting import Outcome, Sweep, block, carry, once
from newllm.reference.context import LAYER_NORM_EPS

# Numbers with which a sweep reports how it was done: an Outcome.
REPORT = len(Outcome._fields)


def reported(outcome: Outcome) -> Tensor:
    """An outcome as the tensor that operators return, on the CPU; -1 stands for a rho that is not known.

    NaN is what tools that compare an operator's results with themselves take for a difference.
    """
    known = outcome._replace(rho=-1.0) if math.isnan(outcome.rho) else outcome
    return torch.tensor([float(field) for field in known], dtype=torch.float64)


def outcome_of(report: Tensor) -> Outcome:
    """The outcome that :func:`reported` made a tensor."""
    block, sweeps, residual, rho, parts, warm_up = report.tolist()
    return Outcome(bool(block), int(sweeps), residual, math.nan if rho < 0 else rho, int(parts), int(warm_up))


@torch.library.custom_op("newllm::context_sweep", mutates_args=())
def context_sweep(
    drive: Tensor,
    weight: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    start: Tensor,
    method: str,
    tol: float,
    sweeps: int | None,
    fallback: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Every layer's result ``[B, T, L, C]``, the state after the last token ``[B, C]``, the outcome.

    ``ln_weight``, ``ln_bias`` are ``[L, C]``, ``start [B, C]``; the rest as ``shooting.carry``.
    """
    drive, weight, ln_weight, ln_bias = (x.contiguous() for x in (drive, weight, ln_weight, ln_bias))
    outputs = torch.empty_like(drive)
    layers, width = ln_weight.shape

    def forward(runs: Runs, entering: Tensor) -> Tensor:
        entering = entering.contiguous()
        leaving = torch.empty_like(entering)
        sweep(
            "ContextForward",
            runs,
            weight,
            width=width,
            by_token={"drive": drive, "outputs": outputs},
            whole={
                "layers": layers,
                "weight": weight,
                "ln_weight": ln_weight,
                "ln_bias": ln_bias,
                "start": entering,
                "last": leaving,
            },
        )
        return leaving

    kernel = kernel_of("ContextForward", len(drive), weight, width=width, layers=layers)
    last, outcome = carry(forward, start, drive.shape[1], kernel, method, tol, sweeps, fallback)
    return outputs, last.clone(), reported(outcome)


@context_sweep.register_fake
def _(drive: Tensor, weight: Tensor, ln_weight: Tensor, ln_bias: Tensor, start: Tensor, *rest: Any) -> Any:
    report = torch.empty(REPORT, dtype=torch.float64, device="cpu")
    return torch.empty_like(drive, memory_format=torch.contiguous_format), torch.empty_like(start), report


@torch.library.custom_op("newllm::context_sweep_backward", mutates_args=())
def context_sweep_backward(
    drive: Tensor,
    weight: Tensor,
    ln_weight: Tensor,
    start: Tensor,
    outputs: Tensor,
    report: Tensor,
    doutputs: Tensor | None,
    dlast: Tensor | None,
    tol: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of drive, weight, ln_weight, ln_bias and start.

    What needs no later token is computed for all tokens at once: pre-activations, slopes, layer norms, and
    from the adjoint sweep's results the gradients of the parameters.
    """
    layers, width = ln_weight.shape
    entered = torch.cat([start[:, None], outputs[:, :-1, -1]], 1)
    entering = [entered, *outputs.unbind(2)[:-1]]
    slope, normed, rstd = _linearised(drive, weight, entering)
    outer = torch.zeros_like(outputs) if doutputs is None else doutputs.contiguous()
    total, change = torch.empty_like(outputs), torch.empty_like(outputs)
    ln_weight, matrix = ln_weight.contiguous(), weight.contiguous()
    given = {"outer": outer, "slope": slope, "normed": normed, "rstd": rstd}
    if drive.device.type == "cuda":
        given["slope_product"] = _carried(slope, matrix)
        given["normed_product"] = _carried(slope * normed, matrix)

    def adjoint(runs: Runs, later: Tensor) -> Tensor:
        later = later.contiguous()
        earlier = torch.empty_like(later)
        sweep(
            "ContextAdjoint",
            runs,
            matrix,
            width=width,
            by_token={**given, "total": total, "change": change},
            whole={
                "layers": layers,
                "weight": matrix,
                "ln_weight": ln_weight,
                "last": later,
                "start": earlier,
            },
        )
        return earlier

    later = torch.zeros_like(start) if dlast is None else dlast
    dstart = carry_back(adjoint, later, drive.shape[1], report, tol)
    dweight = torch.stack(
        [
            summed_outer(change[:, :, layer].flatten(0, 1), entering[layer].flatten(0, 1), weight.dtype)
            for layer in range(layers)
        ]
    )
    return change, dweight, (total * normed).sum((0, 1)), total.sum((0, 1)), dstart


def _linearised(drive: Tensor, weight: Tensor, entering: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The slope of each GELU, each layer norm before its weight, and 1 / its standard deviation."""
    found = []
    for layer, before in enumerate(entering):
        read = product(before, weight[layer].T) + drive[:, :, layer]
        normed, _, rstd = torch.native_layer_norm(
            before + F.gelu(read), read.shape[-1:], None, None, LAYER_NORM_EPS
        )
        slope = torch.ops.aten.gelu_backward(torch.ones_like(read), read)
        found.append((slope, normed, rstd.squeeze(-1)))
    slope, normed, rstd = (torch.stack(each, 2) for each in zip(*found, strict=True))
    return slope, normed, rstd


def _carried(changes: Tensor, weight: Tensor) -> Tensor:
    """W^T times changes ``[B, T, L, C]`` of the pre-activations."""
    layers = zip(changes.unbind(2), weight, strict=True)
    return torch.stack([product(change, matrix) for change, matrix in layers], 2)


def carry_back(adjoint: Sweep, later: Tensor, tokens: int, report: Tensor, tol: float) -> Tensor:
    """What an adjoint sweep makes of ``later [B, C]``: cut as the sweep was, if that was and converged."""
    outcome = outcome_of(report)
    if outcome.block and outcome.parts > 1:
        earlier, _ = block(adjoint, later, tokens, outcome.parts, outcome.warm_up, tol=tol, backwards=True)
    else:
        earlier = once(adjoint, Runs(1, tokens), later)
    return earlier.clone()


@context_sweep_backward.register_fake
def _(drive: Tensor, weight: Tensor, ln_weight: Tensor, start: Tensor, *rest: Any) -> Any:
    whole = torch.empty_like(drive, memory_format=torch.contiguous_format)
    plain = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (weight, ln_weight, ln_weight, start)
    ]
    return whole, *plain


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    drive, weight, ln_weight, _, start, _, ctx.tol, *_ = inputs
    outputs, _, report = output
    ctx.mark_non_differentiable(report)
    ctx.save_for_backward(drive, weight, ln_weight, start, outputs, report)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, doutputs: Tensor | None, dlast: Tensor | None, dreport: None) -> tuple[Any, ...]:
    if doutputs is None and dlast is None:
        return (None,) * 9
    found = context_sweep_backward(*ctx.saved_tensors, doutputs, dlast, ctx.tol)
    return *found, *(None,) * 4


context_sweep.register_autograd(_gradients, setup_context=_keep)
