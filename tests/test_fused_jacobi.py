"""Jacobi's method with its Triton kernels under the error rule, in the interpreter here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from newllm.ops.jacobi_fused import context_jacobi, jacobi_sweep
from newllm.reference import context as reference
from newllm.testing import CASES, Inputs, assert_no_worse, mapped

CASE = CASES["context_sweep"]
F32, BF16 = torch.float32, torch.bfloat16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(dtype: torch.dtype, **sizes: int) -> Inputs:
    return CASE.inputs("context", dtype, device=DEVICE, **sizes)


def norms_in_float32(given: Inputs) -> Inputs:
    params = given["params"]
    norms = {"ln_weight": params.ln_weight.float(), "ln_bias": params.ln_bias.float()}
    return {**given, "params": params._replace(**norms)}


def run(function: Callable[..., Any], given: Inputs, **options: Any) -> dict[str, Tensor]:
    return CASE.results(
        lambda given: function(given["x"], given["params"], given["state"], **options)[:2], given
    )


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("sweeps", [1, 2, 9])
@pytest.mark.parametrize(("batch", "tokens", "width", "layers"), [(1, 5, 16, 1), (3, 4, 33, 2), (2, 1, 7, 1)])
def test_sweeps(batch: int, tokens: int, width: int, layers: int, sweeps: int, dtype: torch.dtype) -> None:
    given = inputs(dtype, batch=batch, tokens=tokens, width=width, layers=layers)
    options: dict[str, Any] = {"tol": 0, "sweeps": sweeps}
    oracle = run(reference.jacobi_sweep, mapped(Tensor.double, given), **options)
    baseline = run(reference.jacobi_sweep, given, compute_dtype=dtype, **options)
    found = run(jacobi_sweep, norms_in_float32(given), **options)
    assert found.keys() == oracle.keys() == baseline.keys()
    for name, out in found.items():
        assert_no_worse(out.to(baseline[name].dtype), oracle[name], baseline[name], name)


def test_the_report_is_the_references() -> None:
    given = inputs(F32, batch=2, tokens=12, width=20)
    for options in ({"tol": 0, "sweeps": 4}, {"tol": 0, "sweeps": 1}, {"tol": 1e-3, "sweeps": None}):
        expected = reference.jacobi_sweep(given["x"], given["params"], given["state"], **options)[2]
        found = jacobi_sweep(given["x"], given["params"], given["state"], **options)[2]
        assert (found.method, found.sweeps) == (expected.method, expected.sweeps)
        assert torch.allclose(found.residual, expected.residual, rtol=1e-2)
        assert torch.allclose(found.rho, expected.rho, rtol=1e-2, equal_nan=True)


def test_a_nan_is_no_agreement() -> None:
    given = inputs(F32, batch=2, tokens=5, width=20)
    given["x"][1, 2] = torch.nan
    contexts, _, info = jacobi_sweep(given["x"], given["params"], given["state"], tol=1e-3, sweeps=None)
    assert info.sweeps == 5 and not contexts[0].isnan().any() and contexts[1, 2:].isnan().all()


def test_contract() -> None:
    width, layer = 20, inputs(F32, batch=2, tokens=3, width=20)
    drive, rows = torch.randn(2, 3, width), torch.randn(2, 3, width)
    params = [value[0].cpu() for value in (layer["params"].weight_c, layer["params"].ln_weight)]
    given = (drive, *params, params[1], rows, torch.randn(2, width), None)
    leaves = tuple(x.to(DEVICE).requires_grad_() if isinstance(x, Tensor) else x for x in given)
    torch.library.opcheck(context_jacobi, leaves)
