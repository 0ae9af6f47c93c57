"""The public operator of the context recurrences.

E input width, C context width, L context layers, H hidden width of the gated cell.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from newllm import backend as backends
from newllm.ops import checks, sweeps_fused as fused
from newllm.reference import context as reference
from newllm.types import ContextParams, GatedParams, SweepInfo

CELLS: dict[str, type[ContextParams] | type[GatedParams]] = {"context": ContextParams, "gated": GatedParams}
METHODS = ("auto", "sequential", "block", "jacobi")

Sizes = dict[str, tuple[int, ...]]


def context_sweep(
    x: Tensor,
    params: ContextParams | GatedParams,
    *,
    cell: Literal["context", "gated"] = "context",
    state: Tensor | None = None,
    method: Literal["auto", "sequential", "block", "jacobi"] = "auto",
    tol: float = 1e-5,
    sweeps: int | None = None,
    fallback: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, SweepInfo]:
    """Carry a context vector through a sequence.

    ``cell="context"``: c <- LN(c + GELU(W_c c + W_x x + b)), through L layers at every token.
    ``cell="gated"``: h = FNN([x ; c]), c <- LN(sigmoid(W_f h) c + sigmoid(W_i h) tanh(W_d h)), clamped.

    Args:
        x: inputs ``[B, T, E]``, float16 to float64, B and T at least 1.
        params: ``ContextParams`` for the context cell, ``GatedParams`` for the gated one; x's dtype and
            device.
        cell: the recurrence.
        state: the context before the first token ``[B, C]``, as the previous call returned it; None is
            zeros.
        method: ``sequential`` is the definition. ``jacobi`` updates all tokens at once, ``sweeps``
            times: after k sweeps the first k contexts are exact. ``block`` runs chunks side by side until
            their borders agree, and is sequential where they do not come to. ``auto`` is block where an
            estimate of ``info.rho`` promises that it is faster, and sequential elsewhere: on the reference,
            in short or wide batches, under ``torch.compile``.
        tol: a Jacobi sweep that changes nothing by more, and a block sweep whose borders differ by no
            more, is the last. Only jacobi with 0 and sequential never wait for the device, which
            ``torch.compile(fullgraph=True)`` and CUDA graphs require.
        sweeps: most sweeps of jacobi (None: T, which is exact) and of block (None: 4).
        fallback: whether block may be sequential where its borders do not come to agree.
        backend: ``reference`` or ``fused``; None chooses. Of jacobi ``fused`` has the context cell on a GPU.

    Returns:
        Contexts ``[B, T, C]`` after each token, in x's dtype. The state ``[B, C]`` after the last one, in
        float32 (float64 for float64 inputs); sequential calls that hand it on equal one call over all
        tokens. How it was done. The gradients of jacobi, and on the reference of block, are those of the
        sweeps done: they reach as many tokens (jacobi) or chunks (block) back, and every sweep takes memory
        for them. All others are the recurrence's own. Under autocast x and params are first cast to its
        dtype.

    Raises:
        TypeError: for a wrong dtype or kind of params. ValueError: for a wrong size, device or choice.
        RuntimeError: for a block sweep whose borders do not come to agree, with ``fallback=False``.
    """
    checks.choice("cell", cell, CELLS)
    checks.choice("method", method, METHODS)
    checks.require(tol >= 0, "tol", tol, "0 or more")
    checks.require(sweeps is None or sweeps >= 1, "sweeps", sweeps, "at least 1 or None")
    if not isinstance(params, CELLS[cell]):
        raise TypeError(
            f"params must be {CELLS[cell].__name__} for cell {cell!r}, got {type(params).__name__}"
        )
    _check_shapes(x, params)
    tensors = _tensors(params)
    context, (x, *values) = checks.without_autocast(x, *tensors.values())
    kernels = "context_jacobi" if method == "jacobi" else "context_sweep"
    chosen = backends.resolve(kernels, x.device, backend, _declined(x, params, method))
    cast: dict[str, Any] = dict(zip(tensors, values, strict=True))
    _check_places(x, cast)
    _check_state(state, x, params.weight_c.shape[-1])
    params = params._replace(**cast)
    with context:
        if chosen == "fused":
            return fused.sweep(x, params, state, method=method, tol=tol, sweeps=sweeps, fallback=fallback)
        if method == "jacobi":
            return reference.jacobi_sweep(x, params, state, tol=tol, sweeps=sweeps)
        if method == "block":
            return reference.block_sweep(x, params, state, tol=tol, sweeps=sweeps, fallback=fallback)
        return reference.sequential_sweep(x, params, state)


def _declined(x: Tensor, params: ContextParams | GatedParams, method: str) -> str | None:
    """Why ``fused`` cannot take this call; None if it can."""
    if x.dtype == torch.float64:
        return f"its sweeps take float16, bfloat16 and float32, got {x.dtype}"
    if method == "jacobi":
        return None if isinstance(params, ContextParams) else "it takes the context cell alone"
    if x.device.type != "cuda":
        return None
    if isinstance(params, GatedParams):
        hidden, width = params.weight_c.shape
        return backends.sweep_limit(x.device.index, width, hidden=hidden, deeper=len(params.weight_h))
    layers, width, _ = params.weight_c.shape
    return backends.sweep_limit(x.device.index, width, layers=layers)


def _tensors(params: ContextParams | GatedParams) -> dict[str, Tensor]:
    return {name: value for name, value in params._asdict().items() if isinstance(value, Tensor)}


def _check_shapes(x: Tensor, params: ContextParams | GatedParams) -> None:
    """Sizes and kinds of numbers; weight_c, with x, fixes the sizes of all other parameters."""
    checks.floats("x", x)
    filled = x.ndim == 3 and 0 not in x.shape[:2]
    checks.require(filled, "x", list(x.shape), "of shape [B, T, E] with B and T at least 1")
    sizes = _context_sizes if isinstance(params, ContextParams) else _gated_sizes
    for name, expected in sizes(params, x.shape[-1]).items():
        value = getattr(params, name)
        checks.floats(f"params.{name}", value)
        checks.shape(f"params.{name}", value, expected)
    if isinstance(params, GatedParams) and params.clamp is not None:
        checks.require(params.clamp > 0, "params.clamp", params.clamp, "above 0 or None")


def _context_sizes(params: Any, inputs: int) -> Sizes:
    shape = tuple(params.weight_c.shape)
    square = len(shape) == 3 and shape[1] == shape[2] and 0 not in shape
    checks.require(square, "params.weight_c", list(shape), "of shape [L, C, C] with L and C at least 1")
    layers, width, _ = shape
    vectors = dict.fromkeys(("bias", "ln_weight", "ln_bias"), (layers, width))
    return {"weight_c": shape, "weight_x": (layers, width, inputs), **vectors}


def _gated_sizes(params: Any, inputs: int) -> Sizes:
    shape = tuple(params.weight_c.shape)
    filled = len(shape) == 2 and 0 not in shape
    checks.require(filled, "params.weight_c", list(shape), "of shape [H, C] with H and C at least 1")
    stacked = list(params.weight_h.shape)
    checks.require(len(stacked) == 3, "params.weight_h", stacked, "of shape [N, H, H], N = 0 for one layer")
    (hidden, width), deeper = shape, stacked[0]
    return {
        "weight_x": (hidden, inputs),
        "weight_c": shape,
        "bias": (hidden,),
        "weight_h": (deeper, hidden, hidden),
        "bias_h": (deeper, hidden),
        **dict.fromkeys(("weight_f", "weight_i", "weight_d"), (width, hidden)),
        **dict.fromkeys(("bias_f", "bias_i", "bias_d", "ln_weight", "ln_bias"), (width,)),
    }


def _check_places(x: Tensor, tensors: dict[str, Tensor]) -> None:
    """One dtype, after autocast, and one device."""
    for name, value in tensors.items():
        if value.dtype != x.dtype:
            raise TypeError(f"params.{name} must be {x.dtype} like x, got {value.dtype}")
        checks.require(
            value.device == x.device, f"params.{name}'s device", value.device, f"{x.device} like x's"
        )


def _check_state(state: Tensor | None, x: Tensor, width: int) -> None:
    if state is None:
        return
    checks.shape("state", state, (x.shape[0], width))
    dtype = torch.promote_types(x.dtype, torch.float32)
    if state.dtype != dtype:
        raise TypeError(f"state must be {dtype} for {x.dtype} inputs, got {state.dtype}")
    checks.require(state.device == x.device, "state's device", state.device, f"{x.device} like x's")
