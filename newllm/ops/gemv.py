"""The public operator of matrices times a few vectors: what a step of decoding mostly does."""

from __future__ import annotations

from torch import Tensor

from newllm import backend as backends
from newllm.ops import checks
from newllm.ops.gemv_fused import declined, gemv as fused
from newllm.reference import gemv as reference

# Most matrices of one call.
MATRICES = 3


def gemv(
    x: Tensor,
    weights: tuple[Tensor, ...],
    *,
    norm: Tensor | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """``residual + RMSNorm(x) [W_1; W_2; ...]^T`` of a few vectors, in one kernel; not for gradients.

    ``weights`` and ``norm`` are parameters: on a GPU they are read while kernels launched before still run,
    so they may not be what one of those writes. Autocast is not heeded.

    Args:
        x: ``[B, K]``; the kernel takes up to 16 rows, of float32 up to 4.
        weights: one to three ``[N_i, K]``.
        norm: ``[K]``, the weight of an RMSNorm (arXiv 1910.07467) with ``eps`` before the product.
        residual: ``[B, N]``, added to it.
        swiglu: of two matrices of one shape, ``silu(x W_1^T) * (x W_2^T)`` (arXiv 2002.05202).
        backend: see ``newllm.backend.resolve``.

    Returns:
        ``[B, N]`` in x's dtype; N is the sum of all N_i, or N_1 if ``swiglu``.

    Raises:
        TypeError: for a wrong dtype. ValueError: for a wrong size or choice.
    """
    _check(x, weights, norm, residual, swiglu)
    chosen = backends.resolve("gemv", x.device, backend, declined(x, weights, norm, residual))
    if chosen == "fused":
        return fused(x, list(weights), norm, residual, swiglu, eps)
    return reference.gemv(x, weights, norm=norm, residual=residual, swiglu=swiglu, eps=eps)


def _check(
    x: Tensor, weights: tuple[Tensor, ...], norm: Tensor | None, residual: Tensor | None, swiglu: bool
) -> None:
    checks.floats("x", x)
    checks.require(x.ndim == 2, "x", list(x.shape), "of shape [B, K]")
    few = (2,) if swiglu else range(1, MATRICES + 1)
    checks.require(len(weights) in few, "weights", len(weights), "2 with swiglu, 1 to {} without", MATRICES)
    width = 0
    for index, weight in enumerate(weights):
        name = f"weights[{index}]"
        checks.same_place(name, weight, x, "x")
        checks.require(weight.ndim == 2, name, list(weight.shape), "of shape [N, K]")
        checks.shape(name, weight, (len(weights[0]) if swiglu else len(weight), x.shape[1]))
        width = len(weight) + (0 if swiglu else width)
    if norm is not None:
        checks.same_place("norm", norm, x, "x")
        checks.shape("norm", norm, (x.shape[1],))
    if residual is not None:
        checks.same_place("residual", residual, x, "x")
        checks.shape("residual", residual, (len(x), width))
