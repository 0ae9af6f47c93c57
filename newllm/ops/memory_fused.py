"""Contracts of the fused memory operators: schema, result shapes and gradients of the Triton kernels.

Kernels are imported when an operator runs, so that its contract exists without Triton. ``scale``, ``bias``
``[Hkv]`` are the feature map's, ``matrix [B, Hkv, K, V]`` and ``norm [B, Hkv, K]`` the memory to begin with
(None: empty), ``length [B]`` a row's real tokens (None: all); what is not keys and values is float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]
# How many inputs of a scan and of an update have gradients; they come first.
_SCANNED, _UPDATED = 7, 6


def _empty(k: Tensor, *shapes: Shape) -> tuple[Tensor, ...]:
    return tuple(k.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _gradients_like(*inputs: Tensor | None) -> list[Tensor]:
    """Gradients of the inputs that are there."""
    return [x.new_empty(x.shape) for x in inputs if x is not None]


def _spread(found: list[Tensor], *inputs: Tensor | None) -> list[Tensor | None]:
    """One gradient per input: the next of those ``found``, None for an input that is not there."""
    rest = iter(found)
    return [None if x is None else next(rest) for x in inputs]


@torch.library.custom_op("newllm::memory_scan", mutates_args=())
def memory_scan(
    k: Tensor,
    v: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    matrix: Tensor | None,
    norm: Tensor | None,
    weight: Tensor | None,
    length: Tensor | None,
    factor: Tensor | None,
    segment: int,
    rule: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The memory before each segment, ``[B, Hkv, N, K, V]``, ``[B, Hkv, N, K]``, and after the last.

    ``weight [B, N]`` scales what a segment adds (linear rule); ``factor [B, N]`` is the guard of delta and
    gamma.
    """
    from newllm.kernels.memory import correction, write
    from newllm.kernels.memory_layout import Layout

    delta = correction(rule, eps, factor)
    layout = Layout(segment, length=length, partial=True)
    before, *rest = write(k, v, layout, scale, bias, matrix=matrix, norm=norm, weight=weight, delta=delta)
    assert before is not None
    return before, *rest


@memory_scan.register_fake
def _(k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    batch, heads, tokens, width = k.shape
    segment = rest[-3]
    before = (batch, heads, (tokens + segment - 1) // segment, width)
    last = (batch, heads, width)
    return _empty(k, (*before, v.shape[3]), before, (*last, v.shape[3]), last)


@torch.library.custom_op("newllm::memory_scan_backward", mutates_args=())
def memory_scan_backward(
    k: Tensor,
    v: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    matrix: Tensor | None,
    norm: Tensor | None,
    weight: Tensor | None,
    length: Tensor | None,
    factor: Tensor | None,
    before: Tensor | None,
    norms: Tensor | None,
    dbefore: Tensor | None,
    dnorms: Tensor | None,
    dmatrix: Tensor | None,
    dnorm: Tensor | None,
    segment: int,
    rule: str,
    eps: float,
) -> list[Tensor]:
    """Gradients of k, v and of scale, bias, matrix, norm, weight where they are given.

    ``before``, ``norms`` are results of delta and gamma; ``dbefore`` ... are the gradients of all results.
    """
    from newllm.kernels.memory import Outgoing, correction, weight_gradient, write_backward
    from newllm.kernels.memory_fold_backward import fold_backward
    from newllm.kernels.memory_layout import Layout

    layout = Layout(segment, length=length, partial=True)
    shape = torch.Size([*k.shape[:2], layout.count(k.shape[2]), k.shape[3], v.shape[3]])
    gradients = write_backward(
        k,
        layout,
        shape,
        Outgoing(dbefore, dnorms, dmatrix, dnorm),
        scale,
        bias,
        before=before,
        norms=norms,
        delta=correction(rule, eps, factor),
    )
    found = fold_backward(
        k, v, gradients, layout, scale, bias,
        weight=weight, norms=norms, factor=factor, eps=eps, novel=rule == "gamma",
    )  # fmt: skip
    initial = (None, None) if matrix is None else (gradients.initial_matrix, gradients.initial_norm)
    weights = None if weight is None else weight_gradient(k, v, gradients, layout, scale, bias)
    every = (found.k, found.v, found.scale, found.bias, *initial, weights)
    return [x for x in every if x is not None]


@memory_scan_backward.register_fake
def _(*inputs: Any) -> list[Tensor]:
    return _gradients_like(*inputs[:_SCANNED])


def _keep_scan(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, segment, rule, eps = inputs
    states = (None, None) if rule == "linear" else output[:2]
    ctx.save_for_backward(*tensors, *states)
    ctx.options = segment, rule, eps
    ctx.set_materialize_grads(False)


def _scan_gradients(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
    if all(x is None for x in gradients):
        return (None,) * 12
    saved = ctx.saved_tensors
    found = memory_scan_backward(*saved, *gradients, *ctx.options)
    return *_spread(found, *saved[:_SCANNED]), *(None,) * 5


memory_scan.register_autograd(_scan_gradients, setup_context=_keep_scan)


@torch.library.custom_op("newllm::memory_update", mutates_args=())
def memory_update(
    k: Tensor,
    v: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    matrix: Tensor | None,
    norm: Tensor | None,
    share: Tensor | None,
    length: Tensor | None,
    factor: Tensor | None,
    rule: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The memory ``[B, Hkv, K, V]``, ``[B, Hkv, K]`` after all tokens.

    ``share [B]`` scales what is added, ``factor [B, 1]`` is the guard of delta and gamma; neither
    has gradients.
    """
    from newllm.kernels.memory import correction
    from newllm.kernels.memory_update import update

    delta = correction(rule, eps, factor)
    return update(k, v, scale, bias, matrix=matrix, norm=norm, share=share, length=length, delta=delta)


@memory_update.register_fake
def _(k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    batch, heads, _, width = k.shape
    return _empty(k, (batch, heads, width, v.shape[3]), (batch, heads, width))


@torch.library.custom_op("newllm::memory_update_backward", mutates_args=())
def memory_update_backward(
    k: Tensor,
    v: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    matrix: Tensor | None,
    norm: Tensor | None,
    share: Tensor | None,
    length: Tensor | None,
    factor: Tensor | None,
    dmatrix: Tensor | None,
    dnorm: Tensor | None,
    rule: str,
    eps: float,
) -> list[Tensor]:
    """Gradients of k, v and of scale, bias, matrix, norm where they are given."""
    from newllm.kernels.memory import correction
    from newllm.kernels.memory_update import update_backward

    found, *initial = update_backward(
        k,
        v,
        dmatrix,
        dnorm,
        scale,
        bias,
        matrix=matrix,
        norm=norm,
        share=share,
        length=length,
        delta=correction(rule, eps, factor),
    )
    given = [] if matrix is None else [x.clone() for x in initial]
    return [x for x in (found.k, found.v, found.scale, found.bias, *given) if x is not None]


@memory_update_backward.register_fake
def _(*inputs: Any) -> list[Tensor]:
    return _gradients_like(*inputs[:_UPDATED])


def _keep_update(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, rule, eps = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = rule, eps
    ctx.set_materialize_grads(False)


def _update_gradients(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
    if all(x is None for x in gradients):
        return (None,) * 11
    saved = ctx.saved_tensors
    found = memory_update_backward(*saved, *gradients, *ctx.options)
    return *_spread(found, *saved[:_UPDATED]), *(None,) * 5


memory_update.register_autograd(_update_gradients, setup_context=_keep_update)


@torch.library.custom_op("newllm::memory_retrieve", mutates_args=())
def memory_retrieve(
    q: Tensor, matrix: Tensor, norm: Tensor, scale: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """What queries ``[B, H, T, K]`` read: ``[B, H, T, V]``."""
    from newllm.kernels.memory_retrieve import retrieve

    return retrieve(q, matrix, norm, scale, bias, eps=eps)


@memory_retrieve.register_fake
def _(q: Tensor, matrix: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], matrix.shape[3])


@torch.library.custom_op("newllm::memory_retrieve_backward", mutates_args=())
def memory_retrieve_backward(
    q: Tensor,
    gradient: Tensor,
    matrix: Tensor,
    norm: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> list[Tensor]:
    """Gradients of q, matrix, norm and of scale and bias where they are given."""
    from newllm.kernels.memory_retrieve import retrieve_backward

    found = retrieve_backward(q, gradient, matrix, norm, scale, bias, eps=eps)
    return [x for x in found if x is not None]


@memory_retrieve_backward.register_fake
def _(q: Tensor, gradient: Tensor, *rest: Any) -> list[Tensor]:
    *learned, _ = rest
    return _gradients_like(q, *learned)


def _keep_retrieve(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _retrieve_gradients(ctx: Any, gradient: Tensor | None) -> tuple[Any, ...]:
    if gradient is None:
        return (None,) * 6
    q, *rest = ctx.saved_tensors
    found = memory_retrieve_backward(q, gradient, *rest, ctx.eps)
    return *_spread(found, q, *rest), None


memory_retrieve.register_autograd(_retrieve_gradients, setup_context=_keep_retrieve)
