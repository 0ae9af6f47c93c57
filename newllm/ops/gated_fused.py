"""Contracts of the native sweeps of the gated cell, as ``context_fused`` for the other one.

H hidden width, N hidden layers after the first. ``drive [B, T, H]`` is the input's share of the first hidden
layer, bias included; ``weight_gate [3, C, H]`` and ``bias_gate [3, C]`` belong to the forget gate, the input
gate and the candidate. ``clamp`` is infinity for none.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from newllm.ops.context_fused import REPORT, carry_back, reported
from newllm.ops.native import Runs, kernel_of, product, summed_outer, sweep
from newllm.ops.shooting import carry
from newllm.reference.context import LAYER_NORM_EPS


@torch.library.custom_op("newllm::gated_sweep", mutates_args=())
def gated_sweep(
    drive: Tensor,
    weight_c: Tensor,
    weight_h: Tensor,
    bias_h: Tensor,
    weight_gate: Tensor,
    bias_gate: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    start: Tensor,
    clamp: float,
    method: str,
    tol: float,
    sweeps: int | None,
    fallback: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Contexts ``[B, T, C]``, the state after the last token ``[B, C]``, the outcome."""
    names = ("weight_c", "weight_h", "bias_h", "weight_gate", "bias_gate", "ln_weight", "ln_bias")
    values = (weight_c, weight_h, bias_h, weight_gate, bias_gate, ln_weight, ln_bias)
    parameters = {name: value.contiguous() for name, value in zip(names, values, strict=True)}
    drive = drive.contiguous()
    hidden, width = weight_c.shape
    sizes = {"hidden": hidden, "deeper": len(weight_h)}
    outputs = drive.new_empty(*drive.shape[:2], width)

    def forward(runs: Runs, entering: Tensor) -> Tensor:
        entering = entering.contiguous()
        leaving = torch.empty_like(entering)
        sweep(
            "GatedForward",
            runs,
            parameters["weight_c"],
            width=width,
            by_token={"drive": drive, "outputs": outputs},
            whole={**sizes, "clamp": clamp, **parameters, "start": entering, "last": leaving},
        )
        return leaving

    kernel = kernel_of("GatedForward", len(drive), weight_c, width=width, **sizes)
    last, outcome = carry(forward, start, drive.shape[1], kernel, method, tol, sweeps, fallback)
    return outputs, last.clone(), reported(outcome)


@gated_sweep.register_fake
def _(drive: Tensor, weight_c: Tensor, *rest: Any) -> Any:
    start = rest[6]
    report = torch.empty(REPORT, dtype=torch.float64, device="cpu")
    return drive.new_empty(*drive.shape[:2], weight_c.shape[1]), torch.empty_like(start), report


class _Linearised(NamedTuple):
    """What the adjoint sweep reads of each token; see ``csrc/context_sweep.h``."""

    hidden_output: Tensor
    gate_slope: Tensor
    forget: Tensor
    normed: Tensor
    rstd: Tensor


def _linearised(
    drive: Tensor,
    entered: Tensor,
    weight_c: Tensor,
    weight_h: Tensor,
    bias_h: Tensor,
    weight_gate: Tensor,
    bias_gate: Tensor,
) -> _Linearised:
    hidden = [F.relu(product(entered, weight_c.T) + drive)]
    for weight, bias in zip(weight_h, bias_h, strict=True):
        hidden.append(F.relu(product(hidden[-1], weight.T) + bias))
    read = product(hidden[-1], weight_gate.flatten(0, 1).T) + bias_gate.flatten()
    forget, write, candidate = read.unflatten(-1, bias_gate.shape).unbind(2)
    forget, write, candidate = forget.sigmoid(), write.sigmoid(), candidate.tanh()
    normed, _, rstd = torch.native_layer_norm(
        forget * entered + write * candidate, entered.shape[-1:], None, None, LAYER_NORM_EPS
    )
    slopes = [
        entered * forget * (1 - forget),
        candidate * write * (1 - write),
        write * (1 - candidate * candidate),
    ]
    return _Linearised(
        torch.stack(hidden, 2), torch.stack(slopes, 2), forget.contiguous(), normed, rstd.squeeze(-1)
    )


@torch.library.custom_op("newllm::gated_sweep_backward", mutates_args=())
def gated_sweep_backward(
    drive: Tensor,
    weight_c: Tensor,
    weight_h: Tensor,
    bias_h: Tensor,
    weight_gate: Tensor,
    bias_gate: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    start: Tensor,
    outputs: Tensor,
    report: Tensor,
    doutputs: Tensor | None,
    dlast: Tensor | None,
    clamp: float,
    tol: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the nine tensors that ``gated_sweep`` takes, in its order."""
    entered = torch.cat([start[:, None], outputs[:, :-1]], 1)
    known = _linearised(drive, entered, weight_c, weight_h, bias_h, weight_gate, bias_gate)
    inside = None
    if clamp < math.inf:
        inside = ((known.normed * ln_weight + ln_bias).abs() <= clamp).to(outputs.dtype)
    results = {
        "total": torch.empty_like(outputs),
        "gate_change": torch.empty_like(known.gate_slope),
        "hidden_change": torch.empty_like(known.hidden_output),
    }
    by_token = known._asdict() | results
    by_token["outer"] = torch.zeros_like(outputs) if doutputs is None else doutputs.contiguous()
    if inside is not None:
        by_token["inside"] = inside
    names = ("weight_c", "weight_h", "weight_gate", "ln_weight")
    values = (weight_c, weight_h, weight_gate, ln_weight)
    parameters = {name: value.contiguous() for name, value in zip(names, values, strict=True)}
    hidden, width = weight_c.shape

    def adjoint(runs: Runs, later: Tensor) -> Tensor:
        later = later.contiguous()
        earlier = torch.empty_like(later)
        whole = {"hidden": hidden, "deeper": len(weight_h), **parameters, "last": later, "start": earlier}
        if inside is None:
            whole["inside"] = None
        sweep("GatedAdjoint", runs, parameters["weight_c"], width=width, by_token=by_token, whole=whole)
        return earlier

    later = torch.zeros_like(start) if dlast is None else dlast
    dstart = carry_back(adjoint, later, drive.shape[1], report, tol)
    total, gate_change, hidden_change = results.values()
    # [layer, B T, H], to be multiplied with what each layer read.
    changes = hidden_change.flatten(0, 1).transpose(0, 1)
    outs = known.hidden_output.flatten(0, 1).transpose(0, 1)
    gates = gate_change.flatten(0, 1).transpose(0, 1)
    return (
        hidden_change[:, :, 0].contiguous(),
        summed_outer(changes[0], entered.flatten(0, 1), weight_c.dtype),
        summed_outer(changes[1:], outs[:-1], weight_h.dtype),
        changes[1:].sum(1),
        summed_outer(gates, outs[-1], weight_gate.dtype),
        gate_change.sum((0, 1)),
        (total * known.normed).sum((0, 1)),
        total.sum((0, 1)),
        dstart,
    )


@gated_sweep_backward.register_fake
def _(*inputs: Any) -> Any:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs[:9])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.clamp, _, ctx.tol, _, _ = inputs
    outputs, _, report = output
    ctx.mark_non_differentiable(report)
    ctx.save_for_backward(*tensors, outputs, report)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, doutputs: Tensor | None, dlast: Tensor | None, dreport: None) -> tuple[Any, ...]:
    if doutputs is None and dlast is None:
        return (None,) * 14
    found = gated_sweep_backward(*ctx.saved_tensors, doutputs, dlast, ctx.clamp, ctx.tol)
    return *found, *(None,) * 5


gated_sweep.register_autograd(_gradients, setup_context=_keep)
