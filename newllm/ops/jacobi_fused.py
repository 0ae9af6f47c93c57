"""Jacobi's method for the context cell on a GPU: a layer of a sweep as an operator, and the sweeps.

A layer's products are one matrix product of all tokens, in the inputs' dtype; what follows them is one pass
of a Triton kernel, which is imported when an operator runs. Contexts and their gradients stay in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from newllm.reference.context import LAYER_NORM_EPS, context_drive
from newllm.types import ContextParams, SweepInfo


@torch.library.custom_op("newllm::context_jacobi", mutates_args=())
def context_jacobi(
    drive: Tensor,
    weight: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    rows: Tensor | None,
    rounded: Tensor | None,
    start: Tensor | None,
    before: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Contexts ``[B, T, C]``, rounded to drive's dtype, the last ones ``[B, C]``, the change, W ``rows``.

    ``drive [B, T, C]`` is W_x x + b. ``rows [B, T, C]`` (None: zeros), and the same ``rounded``, are what the
    tokens read: with ``start [B, C]`` each the row of the token before it, without it its own. The change is
    the largest from ``before [B, T, C]`` (None: zeros). Rounded is empty where contexts have drive's dtype.
    """
    from newllm.kernels.context_jacobi import layer

    products = None if rows is None else F.linear(_operand(rows, rounded), weight)
    entering = _entering(weight, rows, products, start)
    norm = ln_weight.contiguous(), ln_bias.contiguous()
    contexts, again, last, change = layer(entering, before, _spaced(drive), *norm, LAYER_NORM_EPS)
    return contexts, _or_empty(again, drive), last, change, _or_empty(products, drive)


@context_jacobi.register_fake
def _(
    drive: Tensor, weight: Tensor, ln_weight: Tensor, ln_bias: Tensor, rows: Tensor | None, *rest: Any
) -> Any:
    return (
        ln_weight.new_empty(drive.shape),
        drive.new_empty(0 if drive.dtype == ln_weight.dtype else drive.shape),
        ln_weight.new_empty(len(drive), drive.shape[-1]),
        ln_weight.new_empty(()),
        drive.new_empty(0 if rows is None else drive.shape),
    )


@torch.library.custom_op("newllm::context_jacobi_backward", mutates_args=())
def context_jacobi_backward(
    drive: Tensor,
    weight: Tensor,
    ln_weight: Tensor,
    rows: Tensor | None,
    rounded: Tensor | None,
    start: Tensor | None,
    products: Tensor,
    dcontexts: Tensor | None,
    dlast: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of drive, weight, ln_weight, ln_bias, rows and start; empty ones for what is not there."""
    from newllm.kernels.context_jacobi import layer_backward

    batch, tokens, width = drive.shape
    entering = _entering(weight, rows, None if rows is None else products, start)
    if dcontexts is not None and dcontexts.stride()[1:] != (width, 1):
        dcontexts = dcontexts.contiguous()
    dlast = None if dlast is None else dlast.contiguous()
    dupdate, dread, first, dgain, dshift = layer_backward(
        entering, _spaced(drive), ln_weight.contiguous(), dcontexts, dlast, LAYER_NORM_EPS
    )
    # One row more, so that the gradient of each row is that of the token after it, and of the last none.
    dentered = ln_weight.new_empty(batch, tokens + 1, width)
    torch.add(dupdate, dread @ weight, out=dentered[:, :tokens])
    dentered[:, tokens] = 0
    operand = None if rows is None else _operand(rows, rounded)
    if start is None:
        assert operand is not None
        dweight = dread.flatten(0, 1).T @ operand.flatten(0, 1)
        return dread, dweight, dgain, dshift, dentered[:, :tokens], ln_weight.new_empty(0)
    dweight = _shifted_product(dread, operand, start.to(weight.dtype))
    drows = ln_weight.new_empty(0) if rows is None else dentered[:, 1:]
    return dread, dweight, dgain, dshift, drows, first[0] + first[1] @ weight.float()


@context_jacobi_backward.register_fake
def _(
    drive: Tensor,
    weight: Tensor,
    ln_weight: Tensor,
    rows: Tensor | None,
    rounded: Tensor | None,
    start: Tensor | None,
    *rest: Any,
) -> Any:
    batch, tokens, width = drive.shape
    wider = ln_weight.new_empty(batch, tokens + 1, width)
    drows = ln_weight.new_empty(0) if rows is None else wider[:, :tokens] if start is None else wider[:, 1:]
    dstart = ln_weight.new_empty(0 if start is None else start.shape)
    plain = weight.new_empty(weight.shape), ln_weight.new_empty(width), ln_weight.new_empty(width)
    return drive.new_empty(drive.shape), *plain, drows, dstart


def _operand(rows: Tensor, rounded: Tensor | None) -> Tensor:
    """Rows in the dtype of the weights."""
    return rows if rounded is None else rounded


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """An operator returns no None."""
    return like.new_empty(0) if x is None else x


def _shifted_product(changes: Tensor, rows: Tensor | None, start: Tensor) -> Tensor:
    """changes^T times what the tokens read, the row before each and the start before the first."""
    first = changes[:, 0].clone()
    product = first.T @ start
    if rows is None:
        return product
    # The ends of sequences meet the beginnings of the next ones, which therefore are zeros meanwhile.
    changes[:, 0] = 0
    product = torch.addmm(product, changes.flatten(0, 1)[1:].T, rows.flatten(0, 1)[:-1])
    changes[:, 0] = first
    return product


def _entering(weight: Tensor, rows: Tensor | None, products: Tensor | None, start: Tensor | None) -> Any:
    from newllm.kernels.context_jacobi import Entering

    if start is None:
        return Entering(rows, products)
    return Entering(rows, products, start.contiguous(), F.linear(start.to(weight.dtype), weight))


def _spaced(x: Tensor) -> Tensor:
    """``x [B, T, C]`` as it is where columns are neighbours and a batch's tokens follow each other evenly."""
    even = x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1)
    return x if even else x.contiguous()


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    drive, weight, ln_weight, _, rows, rounded, start, _ = inputs
    _, again, _, change, products = output
    ctx.mark_non_differentiable(again, change, products)
    ctx.save_for_backward(drive, weight, ln_weight, rows, rounded, start, products)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dcontexts: Tensor | None, _again: None, dlast: Tensor | None, *rest: Any) -> Any:
    if dcontexts is None and dlast is None:
        return (None,) * 8
    *found, drows, dstart = context_jacobi_backward(*ctx.saved_tensors, dcontexts, dlast)
    rows, _, start = ctx.saved_tensors[3:6]
    return *found, None if rows is None else drows, None, None if start is None else dstart, None


context_jacobi.register_autograd(_gradients, setup_context=_keep)


def jacobi_sweep(
    x: Tensor, params: ContextParams, start: Tensor, *, tol: float, sweeps: int | None
) -> tuple[Tensor, Tensor, SweepInfo]:
    """As ``newllm.reference.context.jacobi_sweep``, from the ``start [B, C]``; contexts in float32."""
    drive, weights = context_drive(x, params), params.weight_c.contiguous()
    limit, layers = min(sweeps or x.shape[1], x.shape[1]), len(params.weight_c)
    contexts: Tensor | None = None
    rows = rounded = contexts
    changes: list[Tensor] = []
    while len(changes) < limit and not (tol > 0 and changes and changes[-1] <= tol):
        for layer, (added, *norm) in enumerate(
            zip(drive.unbind(2), weights, params.ln_weight, params.ln_bias, strict=True)
        ):
            shifted = start if layer == 0 else None
            before = contexts if layer == layers - 1 else None  # the last layer's change alone is reported
            rows, again, last, change, _ = context_jacobi(added, *norm, rows, rounded, shifted, before)
            rounded = again if len(again) else None
        contexts = rows
        changes.append(change.detach())
    assert contexts is not None
    steps = len(changes) - 1
    rate = (changes[-1] / changes[0]) ** (1 / steps) if steps else start.new_full((), torch.nan)
    return contexts, last, SweepInfo("jacobi", len(changes), changes[-1], rate)
