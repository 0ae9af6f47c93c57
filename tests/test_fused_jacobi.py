"""Jacobi's method with its Triton kernels under the error rule, in the interpreter or on a GPU."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from newllm import backend
from newllm.ops.jacobi_fused import context_jacobi, jacobi_sweep
from newllm.reference import context as reference
from newllm.testing import CASES, Inputs
from newllm.types import ContextParams
from tests.row_families import JACOBI, judge_recurrence

CASE = CASES["context_sweep"]
F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(dtype: torch.dtype, **sizes: int) -> Inputs:
    return CASE.inputs("context", dtype, device=DEVICE, **{"layers": 1, **sizes})


def swept(x: Tensor, params: ContextParams, state: Tensor, **options: Any) -> Any:
    """As ``ops.context_sweep`` calls it."""
    norms = {"ln_weight": params.ln_weight.float(), "ln_bias": params.ln_bias.float()}
    contexts, *rest = jacobi_sweep(x, params._replace(**norms), state, **options)
    return contexts.to(x.dtype), *rest


def judge(dtype: torch.dtype, function: Any, **sizes: int) -> None:
    draw = partial(JACOBI.inputs, "changed", dtype, device=DEVICE, **sizes)
    judge_recurrence(JACOBI, dtype, lambda seed: draw(seed=seed), function, gradients=dtype != F16)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("sweeps", [1, 2, 9])
@pytest.mark.parametrize(("batch", "tokens", "width", "layers"), [(1, 5, 16, 1), (3, 4, 33, 2), (2, 1, 7, 1)])
def test_sweeps(batch: int, tokens: int, width: int, layers: int, sweeps: int, dtype: torch.dtype) -> None:
    judge(dtype, swept, batch=batch, tokens=tokens, width=width, layers=layers, sweeps=sweeps)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("width", [1, 33, 256, 768, 1100])
@pytest.mark.parametrize(("batch", "tokens", "layers"), [(1, 300, 1), (5, 67, 2), (130, 3, 3)])
def test_gpu_sweeps(batch: int, tokens: int, layers: int, width: int, dtype: torch.dtype) -> None:
    fused = partial(JACOBI.public, backend="fused")
    judge(dtype, fused, batch=batch, tokens=tokens, input=16, width=width, layers=layers)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_report_is_the_references(layers: int) -> None:
    given = inputs(F32, batch=2, tokens=12, width=20, layers=layers)
    for options in ({"tol": 0, "sweeps": 4}, {"tol": 0, "sweeps": 1}, {"tol": 1e-3, "sweeps": None}):
        expected = reference.jacobi_sweep(given["x"], given["params"], given["state"], **options)[2]
        found = swept(given["x"], given["params"], given["state"], **options)[2]
        assert (found.method, found.sweeps) == (expected.method, expected.sweeps)
        # Half the digits: numbers that only choose and inform.
        for ours, theirs in ((found.residual, expected.residual), (found.rho, expected.rho)):
            close = (ours - theirs).abs() <= torch.finfo(F32).eps ** 0.5 * theirs.abs()
            assert close or (ours.isnan() and theirs.isnan())


def test_only_the_last_layer_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what its sweep before left, of which the first sweep has nothing."""
    from newllm.kernels import context_jacobi as kernels

    asked: list[bool] = []
    layer = kernels.layer

    def watched(entering: Any, before: Tensor | None, *rest: Any) -> Any:
        asked.append(before is not None)
        return layer(entering, before, *rest)

    monkeypatch.setattr(kernels, "layer", watched)
    given = inputs(F32, batch=2, tokens=6, width=20, layers=3)
    swept(given["x"], given["params"], given["state"], tol=0, sweeps=3)
    assert asked == [False] * 3 + [False, False, True] * 2


def test_it_needs_no_native_extension(fused_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "newllm._C", None)
    monkeypatch.setitem(backend.FUSED, "context_sweep", frozenset())
    given = inputs(F32, batch=2, tokens=5, width=20)
    expected = swept(given["x"], given["params"], given["state"], tol=0, sweeps=2)
    for named in (None, "fused"):
        found = JACOBI.public(**given, tol=0, sweeps=2, backend=named)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    with pytest.raises(
        RuntimeError, match=f"context_sweep has no fused implementation for device type '{fused_device}'"
    ):
        CASE.public(**given, backend="fused")


def test_a_nan_is_no_agreement() -> None:
    given = inputs(F32, batch=2, tokens=5, width=20)
    given["x"][1, 2] = torch.nan
    contexts, _, info = swept(given["x"], given["params"], given["state"], tol=1e-3, sweeps=None)
    assert info.sweeps == 5 and not contexts[0].isnan().any() and contexts[1, 2:].isnan().all()


def test_memory_layouts_change_nothing() -> None:
    """Gradients that are expanded, or columns of wider ones; parameters whose columns lie apart."""
    given = inputs(F32, batch=2, tokens=5, width=20, layers=2)
    whole = torch.randn(2, 5, 40, device=DEVICE)
    apart = ContextParams(*(torch.stack([value, value], -1)[..., 0] for value in given["params"]))

    def slopes(params: ContextParams, gradient: Tensor) -> tuple[Tensor, ...]:
        x = given["x"].clone().requires_grad_()
        contexts = swept(x, params, given["state"], tol=0, sweeps=3)[0]
        return contexts, *torch.autograd.grad(contexts, x, gradient)

    for gradient in (whole[..., :20], whole[0, 0, :20].expand(2, 5, 20), whole[..., :1].expand(2, 5, 20)):
        plain = slopes(given["params"], gradient.clone(memory_format=torch.contiguous_format))
        for found, expected in zip(slopes(apart, gradient), plain, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_contract(dtype: torch.dtype) -> None:
    width = 20
    params = inputs(dtype, batch=2, tokens=3, width=width)["params"]
    norm = params.ln_weight[0].float()
    drive, rows = torch.randn(2, 3, width).to(DEVICE, dtype), torch.randn(2, 3, width, device=DEVICE)
    rounded = None if dtype == F32 else rows.to(dtype)
    given = (drive, params.weight_c[0], norm, norm.clone(), rows, rounded, norm.expand(2, -1).clone(), None)
    learned = [x if x is None or x is rounded else x.clone().requires_grad_() for x in given]
    torch.library.opcheck(context_jacobi, learned)
