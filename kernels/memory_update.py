"""Writing a run of tokens as one segment, cut into parts that fill the device."""

from __future__ import annotations

import torch
from torch import Tensor

from newllm.kernels.memory import Correction
from newllm.kernels.memory_curvature import curvature, norm_gradients
from newllm.kernels.memory_fold import fold, fold_correction
from newllm.kernels.memory_fold_backward import Gradients, TokenGradients, fold_backward
from newllm.kernels.memory_layout import Layout, contiguous, even_chunk
from newllm.kernels.memory_scan import scan, scan_delta
from newllm.kernels.tiles import WRITERS


def update(
    k: Tensor,
    v: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    matrix: Tensor | None = None,
    norm: Tensor | None = None,
    share: Tensor | None = None,
    length: Tensor | None = None,
    delta: Correction | None = None,
) -> tuple[Tensor, Tensor]:
    """The memory ``[B, HKV, K, V]``, ``[B, HKV, K]`` after ``k [B, HKV, T, K]`` and ``v [B, HKV, T, V]``.

    ``share [B]`` scales all that a row adds; ``length [B]`` is how many of its tokens are real. The guard of
    ``delta`` has one column.
    """
    parts = _parts(k, length)
    count = parts.count(k.shape[2])
    weight = _along(share, count)
    if delta is None or matrix is None or norm is None:
        added, added_norm = fold(k, v, parts, scale, bias)
        total = scan(added, added_norm, matrix, norm, weight=weight, states=None, double=True)
        return total.matrix, total.norm
    norms = _repeat(norm.contiguous()[:, :, None], count)
    added, added_norm = fold(k, v, parts, scale, bias, norms=norms if delta.novel else None, eps=delta.eps)
    total = scan(added, added_norm, None, norm, weight=weight, states=None, double=True)
    correction = _correction(k, norms, parts, scale, bias, share, delta)
    whole = total.matrix[:, :, None]
    _, last = scan_delta(whole.shape, correction, whole, matrix, states=None, inputs=k.dtype)
    return last, total.norm


def update_backward(
    k: Tensor,
    v: Tensor,
    dmatrix: Tensor | None,
    dnorm: Tensor | None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    matrix: Tensor | None = None,
    norm: Tensor | None = None,
    share: Tensor | None = None,
    length: Tensor | None = None,
    delta: Correction | None = None,
) -> tuple[TokenGradients, Tensor, Tensor]:
    """From the gradients of what ``update`` returns (None: zero) to those of all that it reads."""
    batch, heads, tokens, width = k.shape
    states = {"dtype": torch.float32, "device": k.device}
    dmatrix = (
        torch.zeros(batch, heads, width, v.shape[3], **states) if dmatrix is None else dmatrix.contiguous()
    )
    dnorm = torch.zeros(batch, heads, width, **states) if dnorm is None else dnorm.contiguous()
    parts = _parts(k, length)
    count = parts.count(tokens)
    after = dmatrix[:, :, None], dnorm[:, :, None]
    weight = _along(share, count)
    if delta is None or matrix is None or norm is None:
        gradients = Gradients(*(_repeat(x, count) for x in after), dmatrix, dnorm)
        return fold_backward(k, v, gradients, parts, scale, bias, weight=weight), dmatrix, dnorm
    norms = _repeat(norm.contiguous()[:, :, None], count)
    correction = _correction(k, norms, parts, scale, bias, share, delta)
    _, initial = scan_delta(
        after[0].shape, correction, None, dmatrix, states=None, reverse=True, inputs=k.dtype
    )
    curvatures = _repeat(curvature(after[0], matrix.contiguous()[:, :, None], k.dtype), count)
    factor = _along(_both(delta.factor, share), count)
    own = norm_gradients(k, curvatures, norms, parts, scale, bias, factor=factor, eps=delta.eps)
    gradients = Gradients(*(_repeat(x, count) for x in after), initial, dnorm + own.sum(2), curvatures)
    found = fold_backward(
        k, v, gradients, parts, scale, bias,
        weight=weight, norms=norms, factor=factor, eps=delta.eps, novel=delta.novel,
    )  # fmt: skip
    return found, gradients.initial_matrix, gradients.initial_norm


def _parts(k: Tensor, length: Tensor | None) -> Layout:
    return Layout(even_chunk(k.shape[2], k.shape[0] * k.shape[1], WRITERS), length=length, partial=True)


def _correction(
    k: Tensor,
    norms: Tensor,
    parts: Layout,
    scale: Tensor | None,
    bias: Tensor | None,
    share: Tensor | None,
    delta: Correction,
) -> Tensor:
    """The correction ``[B, HKV, 1, K, K]`` of all parts, each with the same one of ``norms``."""
    factor = _along(_both(delta.factor, share), parts.count(k.shape[2]))
    return fold_correction(k, norms, parts, scale, bias, factor=factor, eps=delta.eps).sum(2, keepdim=True)


def _both(factor: Tensor | None, share: Tensor | None) -> Tensor | None:
    """Guard times share, ``[B]``."""
    if factor is None or share is None:
        return share if factor is None else factor[:, 0]
    return factor[:, 0] * share


def _along(x: Tensor | None, count: int) -> Tensor | None:
    """``x [B]`` for each of the parts, ``[B, N]``."""
    return None if x is None else contiguous(x[:, None].expand(-1, count))


def _repeat(x: Tensor, count: int) -> Tensor:
    """``x [B, HKV, 1, ...]`` for each of the parts, without a copy."""
    return x.expand(*x.shape[:2], count, *x.shape[3:])
