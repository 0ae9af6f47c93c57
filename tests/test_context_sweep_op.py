"""The public context sweep: its checks, its choices, autocast and compilation."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from context_cases import C, E, H, Make, assert_same, context_params, gated_params, inputs, loop
from torch import Tensor

from newllm.ops.context_sweep import context_sweep
from newllm.reference.context import block_sweep, jacobi_sweep, sequential_sweep

cells = pytest.mark.parametrize(("cell", "make"), [("context", context_params), ("gated", gated_params)])


@cells
def test_methods_are_the_references(cell: Any, make: Make) -> None:
    params = make()
    x, state = inputs(2, 150)
    sweep = partial(context_sweep, x, params, cell=cell, state=state)
    for actual, expected in [
        (sweep(), sequential_sweep(x, params, state)),
        (sweep(method="sequential", backend="reference"), sequential_sweep(x, params, state)),
        (sweep(method="jacobi", sweeps=3), jacobi_sweep(x, params, state, sweeps=3)),
        (sweep(method="jacobi", tol=1e-3), jacobi_sweep(x, params, state, tol=1e-3)),
        (sweep(method="block", sweeps=3), block_sweep(x, params, state, sweeps=3)),
        (sweep(method="block", tol=1e-12), block_sweep(x, params, state, tol=1e-12)),
    ]:
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
        assert actual[2][:3] == expected[2][:3]
        assert torch.equal(actual[2].rho.nan_to_num(), expected[2].rho.nan_to_num())


@cells
def test_without_state_the_context_starts_from_zeros(cell: Any, make: Make) -> None:
    params = make()
    x, state = inputs(2, 5)
    contexts, last, _ = context_sweep(x, params, cell=cell)
    assert_same(contexts, loop(x, params, torch.zeros_like(state)))
    assert_same(last, contexts[:, -1])


def wrong(make: Make, **fields: Any) -> Any:
    return make()._replace(**fields)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cell": "lstm"}, ValueError, r"cell must be one of 'context', 'gated', got 'lstm'"),
        ({"method": "newton"}, ValueError, r"method must be one of 'auto', .*'jacobi', got 'newton'"),
        ({"tol": -1.0}, ValueError, r"tol must be 0 or more, got -1.0"),
        ({"tol": float("nan")}, ValueError, r"tol must be 0 or more, got nan"),
        ({"sweeps": 0}, ValueError, r"sweeps must be at least 1 or None, got 0"),
        ({"backend": "triton"}, ValueError, r"backend must be one of reference, fused; got 'triton'"),
        ({"cell": "gated"}, TypeError, r"params must be GatedParams for cell 'gated', got ContextParams"),
        ({"params": gated_params()}, TypeError, r"params must be ContextParams .*, got GatedParams"),
        (
            {"x": torch.zeros(2, 5, E, dtype=torch.int64)},
            TypeError,
            r"x must be float16, .*, got torch.int64",
        ),
        ({"x": torch.zeros(5, E)}, ValueError, r"x must be of shape \[B, T, E\] .*, got \[5, 3\]"),
        ({"x": torch.zeros(2, 0, E)}, ValueError, r"x must be .* with B and T at least 1, got \[2, 0, 3\]"),
        ({"x": torch.zeros(0, 5, E)}, ValueError, r"x must be .* with B and T at least 1, got \[0, 5, 3\]"),
        ({"x": torch.zeros(2, 5, E)}, TypeError, r"params.weight_c must be torch.float32 like x, got .*64"),
        ({"x": torch.zeros(2, 5, 7)}, ValueError, r"params.weight_x must be .* \[2, 4, 7\], got \[2, 4, 3\]"),
        ({"state": torch.zeros(2, C)}, TypeError, r"state must be torch.float64 .*, got torch.float32"),
        ({"state": torch.zeros(1, C)}, ValueError, r"state must be of shape \[2, 4\], got \[1, 4\]"),
        (
            {"params": wrong(context_params, weight_c=torch.zeros(C, C))},
            ValueError,
            r"params.weight_c must be of shape \[L, C, C\] with L and C at least 1, got \[4, 4\]",
        ),
        (
            {"params": wrong(context_params, weight_c=torch.zeros(2, C, 5))},
            ValueError,
            r"params.weight_c must be of shape \[L, C, C\] .*, got \[2, 4, 5\]",
        ),
        (
            {"params": wrong(context_params, ln_bias=torch.zeros(C))},
            ValueError,
            r"params.ln_bias must be of shape \[2, 4\], got \[4\]",
        ),
        (
            {"params": wrong(context_params, bias=torch.zeros(2, C, dtype=torch.bool))},
            TypeError,
            r"params.bias must be float16, .*, got torch.bool",
        ),
        (
            {"params": wrong(context_params, bias=torch.zeros(2, C, device="meta", dtype=torch.float64))},
            ValueError,
            r"params.bias's device must be cpu like x's, got meta",
        ),
        (
            {"state": torch.zeros(2, C, device="meta", dtype=torch.float64)},
            ValueError,
            r"state's device must be cpu like x's, got meta",
        ),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    x, _ = inputs(2, 5)
    with pytest.raises(error, match=message):
        context_sweep(**{"x": x, "params": context_params(), **arguments})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight_c": torch.zeros(0, C)}, r"params.weight_c must be of shape \[H, C\] .*, got \[0, 4\]"),
        ({"weight_h": torch.zeros(H, H)}, r"params.weight_h must be .* \[N, H, H\], .*, got \[5, 5\]"),
        ({"bias_h": torch.zeros(2, H)}, r"params.bias_h must be of shape \[1, 5\], got \[2, 5\]"),
        ({"weight_i": torch.zeros(H, C)}, r"params.weight_i must be of shape \[4, 5\], got \[5, 4\]"),
        ({"bias_d": torch.zeros(H)}, r"params.bias_d must be of shape \[4\], got \[5\]"),
        ({"clamp": 0.0}, r"params.clamp must be above 0 or None, got 0.0"),
    ],
)
def test_wrong_gated_params(fields: dict[str, Any], message: str) -> None:
    x, _ = inputs(2, 5)
    with pytest.raises(ValueError, match=message):
        context_sweep(x, wrong(gated_params, **fields), cell="gated")


@cells
def test_autocast_casts_inputs_and_leaves_the_state(cell: Any, make: Make) -> None:
    x, state = inputs(2, 6, torch.float32)
    params, half = make(dtype=torch.float32), make(dtype=torch.bfloat16)
    expected, end, _ = context_sweep(x.bfloat16(), half, cell=cell, state=state.float())
    for given in (x, x.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            contexts, last, _ = context_sweep(given, params, cell=cell, state=state.float())
        assert contexts.dtype == torch.bfloat16 and torch.equal(contexts, expected)
        assert last.dtype == torch.float32 and torch.equal(last, end)


@cells
@pytest.mark.parametrize("options", [{}, {"method": "jacobi", "tol": 0, "sweeps": 2}], ids=["auto", "jacobi"])
def test_compiles_to_one_graph(cell: Any, make: Make, options: dict[str, Any]) -> None:
    params = make(1)
    x, state = inputs(2, 4)

    def run(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        contexts, last, info = context_sweep(x, params, cell=cell, state=state, **options)
        return contexts, last, info.residual

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    expected, actual = run(x, state), compiled(x, state)
    for one, other in zip(actual, expected, strict=True):
        assert_same(one, other)
    gradients = [
        torch.autograd.grad(result[0].square().sum() + result[1].sum(), x) for result in (actual, expected)
    ]
    assert_same(gradients[0][0], gradients[1][0])
