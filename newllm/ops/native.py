"""Calls of ``newllm._C``: tensors in, addresses out. What is passed has to be contiguous.

``csrc/context_sweep.h`` says what every array is.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Rows whose products are summed in one go where many are, and in how many parts at most.
_ROWS_AT_ONCE, _MOST_PARTS = 64, 16


class Runs(NamedTuple):
    """Tokens to sweep: in every row ``parts`` runs of ``tokens``, the first from ``first`` on, ``stride``
    apart."""

    parts: int
    tokens: int
    first: int = 0
    stride: int = 0


def sweep(
    kind: str, runs: Runs, weight: Tensor, *, width: int, by_token: dict[str, Tensor], whole: dict[str, Any]
) -> None:
    """Carry out the sweep ``kind``, the name of a class of ``newllm._C``, where ``weight`` lies.

    ``by_token`` are its arrays ``[B, T, ...]``, ``whole`` its other arrays, None for one that is not there,
    and numbers.
    """
    from newllm import _C

    batch, tokens, *_ = next(iter(by_token.values())).shape
    name = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in kind).lstrip("_")
    plan, device = None, weight.device
    if device.type == "cuda":
        sizes: dict[str, Any] = {key: whole[key] for key in ("layers", "hidden", "deeper") if key in whole}
        if runs.parts > 1 and kind.startswith("Context"):
            # Tensor cores round contexts: what leaves a run would never be what the next began with.
            sizes["exact"] = True
        plan = planned(kind, batch * runs.parts, device.index, weight.dtype, width=width, **sizes)
        if plan.kernel == "grid" and kind.endswith("Adjoint"):
            whole = {key: _turned(key, value) for key, value in whole.items()}
    span = _C.Span(
        batch=batch, parts=runs.parts, tokens=runs.tokens, batch_stride=tokens, part_stride=runs.stride
    )
    places = {key: x.data_ptr() + runs.first * x.stride(1) * x.itemsize for key, x in by_token.items()}
    numbers = {key: _number(value) for key, value in whole.items()}
    task = getattr(_C, kind)(span=span, width=width, **places, **numbers)
    if plan is None:
        getattr(_C, f"{name}_cpu")(task, torch.get_num_threads())
        return
    workspace = torch.empty(plan.workspace, dtype=torch.uint8, device=device)
    call = _C.CudaCall(
        device=device.index,
        stream=torch.cuda.current_stream(device).cuda_stream,
        bfloat16=weight.dtype == torch.bfloat16,
        workspace=workspace.data_ptr(),
    )
    getattr(_C, f"{name}_cuda")(task, plan, call)


def kernel_of(kind: str, rows: int, weight: Tensor, **sizes: int) -> str:
    """What carries out the sweep ``kind`` of so many rows on weight's device: "cpu", or a plan's kernel."""
    if weight.device.type != "cuda":
        return "cpu"
    kernel: str = planned(kind, rows, weight.device.index, weight.dtype, **sizes).kernel
    return kernel


@lru_cache
def planned(kind: str, rows: int, device: int, dtype: torch.dtype, **sizes: int) -> Any:
    """How a GPU carries out the sweep ``kind`` of so many rows.

    Raises RuntimeError where it cannot.
    """
    from newllm import _C

    sizes |= {"runs": rows, "device": device, "adjoint": kind.endswith("Adjoint")}
    planner = _C.plan_gated_sweep if kind.startswith("Gated") else _C.plan_context_sweep
    plan = planner(bfloat16=dtype == torch.bfloat16, **sizes)
    if plan.reason is not None:
        raise RuntimeError(f"newllm._C cannot sweep width {sizes['width']} on cuda:{device}: {plan.reason}")
    return plan


def _turned(name: str, value: Any) -> Any:
    """A matrix input by output, the gates' ``[3, C, H]`` as one; what is no matrix as it is."""
    if name not in ("weight", "weight_c", "weight_h", "weight_gate"):
        return value
    return (value.flatten(0, 1) if name == "weight_gate" else value).mT.contiguous()


def _number(value: Any) -> Any:
    if value is None:
        return 0
    return value.data_ptr() if isinstance(value, Tensor) else value


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """``x [..., K] @ matrix [K, N]`` in float32: x is rounded to the matrix's dtype, the sums are not."""
    if matrix.dtype == torch.float32:
        return x @ matrix
    rows = x.to(matrix.dtype).flatten(0, -2)
    return torch.mm(rows, matrix, out_dtype=torch.float32).unflatten(0, x.shape[:-1])


def summed_outer(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """``x^T y [..., M, N]`` in ``dtype``, from ``x [..., R, M]`` and ``y [..., R, N]``.

    In float32 in parts of the R rows, so that rounding grows less with their number (Higham, sec. 4.2).
    """
    if dtype != torch.float32:  # products are summed in float32, parts would be rounded
        return x.to(dtype).mT @ y.to(dtype)
    rows = max(_ROWS_AT_ONCE, -(-x.shape[-2] // _MOST_PARTS))
    first, *others = (one.mT @ other for one, other in zip(x.split(rows, -2), y.split(rows, -2), strict=True))
    return sum(others, start=first)
