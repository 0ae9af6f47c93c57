"""Calls of ``newllm._C``: tensors in, addresses out. What is passed has to be contiguous.

``csrc/context_sweep.h`` says what every array is.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


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
    span = _C.Span(
        batch=batch, parts=runs.parts, tokens=runs.tokens, batch_stride=tokens, part_stride=runs.stride
    )
    places = {name: x.data_ptr() + runs.first * x.stride(1) * x.itemsize for name, x in by_token.items()}
    task = getattr(_C, kind)(
        span=span, width=width, **places, **{name: _number(value) for name, value in whole.items()}
    )
    name = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in kind).lstrip("_")
    if weight.device.type == "cpu":
        getattr(_C, f"{name}_cpu")(task, torch.get_num_threads())
        return
    rows, bfloat16, device = batch * runs.parts, weight.dtype == torch.bfloat16, weight.device.index
    getattr(_C, f"{name}_cuda")(
        task,
        _plan(kind, len(weight), width, rows, bfloat16, device),
        device=device,
        stream=torch.cuda.current_stream(device).cuda_stream,
        bfloat16=bfloat16,
    )


@lru_cache
def _plan(kind: str, layers: int, width: int, rows: int, bfloat16: bool, device: int) -> Any:
    """How a GPU carries out the sweep ``kind`` of so many rows."""
    from newllm import _C

    sizes = {"layers": layers, "width": width, "runs": rows}
    plan = _C.plan_context_sweep(adjoint=kind.endswith("Adjoint"), **sizes, bfloat16=bfloat16, device=device)
    if plan.reason is not None:
        raise RuntimeError(f"newllm._C cannot sweep width {width} on cuda:{device}: {plan.reason}")
    return plan


def _number(value: Any) -> Any:
    if value is None:
        return 0
    return value.data_ptr() if isinstance(value, Tensor) else value
