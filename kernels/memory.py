"""Writing a run of segments into the memory, and its gradients: the order of launches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from newllm.kernels.memory_curvature import curvature, norm_gradients
from newllm.kernels.memory_fold import fold, fold_correction
from newllm.kernels.memory_fold_backward import Gradients
from newllm.kernels.memory_layout import Layout
from newllm.kernels.memory_norms import scan_novel_norms
from newllm.kernels.memory_scan import (
    Chain,
    scan,
    scan_backward,
    scan_backward_step,
    scan_delta,
    scan_norms,
)


class Correction(NamedTuple):
    """What the delta rule needs beside keys and values: the guard ``[B, N]`` (None: 1) and eps.

    ``novel`` makes it gamma: a segment adds to the norm what that lacks.
    """

    factor: Tensor | None = None
    eps: float = 1e-6
    novel: bool = False


def correction(rule: str, eps: float, factor: Tensor | None = None) -> Correction | None:
    """The correction of a rule by name, None of the linear one."""
    return None if rule == "linear" else Correction(factor, eps, rule == "gamma")


class Outgoing(NamedTuple):
    """Gradients of what ``write`` returns; None is zero."""

    before: Tensor | None
    norms: Tensor | None
    matrix: Tensor | None
    norm: Tensor | None


def write(
    k: Tensor,
    v: Tensor,
    layout: Layout,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    matrix: Tensor | None = None,
    norm: Tensor | None = None,
    weight: Tensor | None = None,
    delta: Correction | None = None,
    states: torch.dtype | None = torch.float32,
) -> Chain:
    """Write ``k [B, HKV, T, K]``, ``v [B, HKV, T, V]`` segment by segment after ``matrix`` and ``norm``.

    ``delta`` is what the delta rule needs; None is the linear rule, where ``weight [B, N]`` scales what
    segments add. Returns the memory before each segment and the last one; ``states`` is the dtype of the
    matrices before each (None: not kept).
    """
    added, added_norm = fold(k, v, layout, scale, bias)
    if delta is None:
        return scan(added, added_norm, matrix, norm, weight=weight, states=states)
    if delta.novel:
        norms, last_norm = scan_novel_norms(k, layout, scale, bias, norm=norm, eps=delta.eps)
    else:
        norms, last_norm = scan_norms(added_norm.shape, added_norm, norm)
    corrections = fold_correction(k, norms, layout, scale, bias, factor=delta.factor, eps=delta.eps)
    before, last = scan_delta(added.shape, corrections, added, matrix, states=states, inputs=k.dtype)
    return Chain(before, norms, last, last_norm)


def write_backward(
    k: Tensor,
    layout: Layout,
    shape: torch.Size,
    outgoing: Outgoing,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    before: Tensor | None = None,
    norms: Tensor | None = None,
    delta: Correction | None = None,
    reach: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Gradients:
    """From the gradients of what ``write`` returned to those of the memory after each segment.

    ``shape`` is [B, HKV, N, K, V]. ``before`` and ``norms`` are what ``write`` returned (delta rule only).
    Gradients flow ``reach`` segments back (None: all). ``dtype`` is that of the result's ``matrix``.
    """
    if reach is not None and reach <= shape[2]:
        return _truncated(k, layout, shape, outgoing, scale, bias, before, norms, delta, reach, dtype)
    if delta is None:
        return Gradients(*scan_backward(shape, *outgoing, dtype=dtype))
    assert before is not None
    assert norms is not None
    correction = {"factor": delta.factor, "eps": delta.eps}
    corrections = fold_correction(k, norms, layout, scale, bias, **correction)
    after, initial = scan_delta(
        shape, corrections, outgoing.before, outgoing.matrix, states=dtype, reverse=True, inputs=k.dtype
    )
    curvatures = curvature(after, before, k.dtype)
    dnorms = norm_gradients(k, curvatures, norms, layout, scale, bias, **correction)
    if outgoing.norms is not None:
        dnorms = dnorms + outgoing.norms
    after_norm, initial_norm = scan_norms(shape[:4], dnorms, outgoing.norm, reverse=True)
    return Gradients(after, after_norm, initial, initial_norm, curvatures)


def _truncated(
    k: Tensor,
    layout: Layout,
    shape: torch.Size,
    outgoing: Outgoing,
    scale: Tensor | None,
    bias: Tensor | None,
    before: Tensor | None,
    norms: Tensor | None,
    delta: Correction | None,
    reach: int,
    dtype: torch.dtype,
) -> Gradients:
    """``write_backward`` by as many steps as gradients flow segments back."""
    batch, heads, count, width, columns = shape
    written = layout.written(batch, k.shape[2], k.device)
    direct = _placed(shape, outgoing, written)
    norm = torch.zeros_like(direct)
    after, initial = (
        torch.zeros(shape, dtype=dtype, device=k.device),
        direct.new_zeros(batch, heads, width, columns),
    )
    corrections = curvatures = None
    if delta is not None:
        assert before is not None
        assert norms is not None
        corrections = fold_correction(k, norms, layout, scale, bias, factor=delta.factor, eps=delta.eps)
    for step in range(reach):
        further = norm[:, :, 1:]
        if delta is not None and step > 0:
            curvatures = curvature(after, before, k.dtype)
            further = further + norm_gradients(
                k, curvatures, norms, layout, scale, bias, factor=delta.factor, eps=delta.eps
            )
        norm = direct.clone()
        norm[:, :, :count] += further
        after, initial = scan_backward_step(
            shape,
            after if step else None,
            outgoing.before,
            outgoing.matrix,
            written,
            corrections,
            dtype=dtype if step == reach - 1 else torch.float32,
            inputs=k.dtype,
        )
    if delta is not None:
        curvatures = curvature(after, before, k.dtype)
    return Gradients(after, norm[:, :, 1:], initial, norm[:, :, 0].contiguous(), curvatures)


def _placed(shape: torch.Size, outgoing: Outgoing, written: Tensor) -> Tensor:
    """Gradients ``[B, HKV, N + 1, K]`` of the norm before each segment and after the row's last one."""
    batch, heads, count, width, _ = shape
    direct = torch.zeros(batch, heads, count + 1, width, device=written.device)
    if outgoing.norms is not None:
        direct[:, :, :count] = outgoing.norms
    if outgoing.norm is not None:
        here = torch.arange(count + 1, device=written.device) == written[:, None]
        direct = direct + here[:, None, :, None] * outgoing.norm[:, :, None]
    return direct


def weight_gradient(
    k: Tensor,
    v: Tensor,
    gradients: Gradients,
    layout: Layout,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Gradient ``[B, N]`` of the weights that scaled what segments added."""
    added, added_norm = fold(k, v, layout, scale, bias)
    matrices = (added * gradients.matrix).sum((1, 3, 4), dtype=torch.float64)
    return (matrices + (added_norm * gradients.norm).sum((1, 3), dtype=torch.float64)).float()
