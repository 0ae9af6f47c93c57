"""The cells and the definition of the context recurrences against loops over scalars; gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from context_cases import (
    Make,
    Params,
    assert_same,
    both,
    context_params,
    gated_params,
    gelu,
    hidden_token,
    inputs,
    loop,
)
from hypothesis import given, settings, strategies as st
from torch import Tensor

from newllm.reference.context import (
    LAYER_NORM_EPS,
    block_sweep,
    context_cell,
    context_drive,
    gated_cell,
    gated_drive,
    gated_hidden,
    jacobi_sweep,
    sequential_sweep,
)
from newllm.types import ContextParams, GatedParams


@pytest.mark.parametrize(
    "params",
    [context_params(1), context_params(3), gated_params(0), gated_params(2), gated_params(1, clamp=0.5)],
    ids=["context1", "context3", "gated1", "gated3", "gated2-clamp"],
)
@pytest.mark.parametrize("tokens", [1, 9])
def test_sequential_equals_loops_over_scalars(params: Params, tokens: int) -> None:
    x, state = inputs(2, tokens)
    contexts, last, info = sequential_sweep(x, params, state)
    expected = loop(x, params, state)
    assert_same(contexts, expected)
    assert_same(last, expected[:, -1])
    assert (info.method, info.sweeps, info.residual.item()) == ("sequential", 1, 0.0)


def unit(half_distance: float) -> float:
    """Layer norm of (d, -d) is (u, -u) with this u."""
    return half_distance / math.sqrt(half_distance**2 + LAYER_NORM_EPS)


def test_context_three_steps_by_hand() -> None:
    params = ContextParams(
        weight_c=torch.tensor([[[0.0, 5.0], [5.0, 0.0]]], dtype=torch.float64),
        weight_x=torch.tensor([[[20.0], [-20.0]]], dtype=torch.float64),
        bias=torch.zeros(1, 2, dtype=torch.float64),
        ln_weight=torch.tensor([[2.0, 1.0]], dtype=torch.float64),
        ln_bias=torch.tensor([[0.0, 1.0]], dtype=torch.float64),
    )
    x = torch.tensor([[[1.0], [0.0], [0.0]]], dtype=torch.float64)
    contexts, _, _ = sequential_sweep(x, params)
    # GELU of (20, -20) is (20, 0): from zeros to half a distance of 10, then scaled and moved by the norm.
    u = unit(10)
    first = [2 * u, 1 - u]
    # W_c of about (2, 0) is (0, 10): the second component overtakes.
    low, high = gelu(5 * first[1]), gelu(5 * first[0])
    v = unit((first[1] + high - first[0] - low) / 2)
    second = [-2 * v, 1 + v]
    # W_c of about (-2, 2) is (10, -10), of which GELU leaves (10, 0).
    w = unit((second[0] + gelu(5 * second[1]) - second[1] - gelu(5 * second[0])) / 2)
    third = [2 * w, 1 - w]
    assert_same(contexts[0], torch.tensor([first, second, third], dtype=torch.float64))
    assert contexts[0].round().tolist() == [[2, 0], [-2, 2], [2, 0]]


def test_gated_three_steps_by_hand() -> None:
    zeros = partial(torch.zeros, dtype=torch.float64)
    params = GatedParams(
        weight_x=torch.tensor([[1.0], [-1.0]], dtype=torch.float64),
        weight_c=zeros(2, 2),
        bias=zeros(2),
        weight_h=zeros(0, 2, 2),
        bias_h=zeros(0, 2),
        weight_f=zeros(2, 2),
        weight_i=zeros(2, 2),
        weight_d=torch.tensor([[40.0, -40.0], [-40.0, 40.0]], dtype=torch.float64),
        bias_f=torch.full((2,), -math.log(3), dtype=torch.float64),
        bias_i=zeros(2),
        bias_d=zeros(2),
        ln_weight=zeros(2) + 1,
        ln_bias=zeros(2),
    )
    x = torch.tensor([[[1.0], [0.0], [-1.0]]], dtype=torch.float64)
    contexts, _, _ = sequential_sweep(x, params)
    # A quarter is kept and half is written: the candidate is (1, -1), then nothing, then (-1, 1).
    first = unit(0.5)
    second = unit(0.25 * first)
    third = unit(0.25 * second - 0.5)
    expected = torch.tensor([first, second, third], dtype=torch.float64)[:, None] * torch.tensor([1.0, -1.0])
    assert_same(contexts[0], expected.double())
    clamped, _, _ = sequential_sweep(x, params._replace(clamp=0.5))
    assert clamped[0].tolist() == [[0.5, -0.5], [0.5, -0.5], [-0.5, 0.5]]


def test_cells_take_any_leading_sizes() -> None:
    x, state = inputs(2, 6)
    before = torch.stack([state] * 6, 1)
    params, gated = context_params(), gated_params()
    together = context_cell(context_drive(x, params), before, params)
    gated_together = gated_cell(gated_drive(x, gated), before, gated)
    hidden = gated_hidden(gated_drive(x, gated), before, gated)
    for t in range(6):
        assert_same(together[:, t], context_cell(context_drive(x[:, t], params), state, params))
        assert_same(gated_together[:, t], gated_cell(gated_drive(x[:, t], gated), state, gated))
        expected = [hidden_token(x[row, t].tolist(), state[row].tolist(), gated) for row in range(2)]
        assert_same(hidden[:, t], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(("width", "inputs_", "count"), [(768, 768, 1_181_952), (256, 768, 262_912)])
def test_parameter_counts_of_the_documents(width: int, inputs_: int, count: int) -> None:
    assert sum(value.numel() for value in context_params(1, width=width, inputs=inputs_)) == count


@both
@settings(max_examples=15)
@given(cuts=st.lists(st.integers(1, 5), min_size=1, max_size=4), batch=st.integers(1, 3))
def test_any_split_equals_one_call(make: Make, cuts: list[int], batch: int) -> None:
    params = make()
    x, state = inputs(batch, sum(cuts))
    whole, end, _ = sequential_sweep(x, params, state)
    parts = []
    for part in x.split(cuts, 1):
        contexts, state, _ = sequential_sweep(part, params, state)
        parts.append(contexts)
    assert_same(torch.cat(parts, 1), whole)
    assert_same(state, end)


@both
def test_rows_and_later_tokens_change_nothing(make: Make) -> None:
    params = make()
    x, state = inputs(3, 7)
    contexts, _, _ = sequential_sweep(x, params, state)
    alone, _, _ = sequential_sweep(x[1:2], params, state[1:2])
    assert_same(alone, contexts[1:2])
    x[[0, 2]] += 1
    x[1, 4:] -= 1
    moved, _, _ = sequential_sweep(x, params, state)
    assert torch.equal(moved[1, :4], contexts[1, :4])
    assert (moved[1, 4:] != contexts[1, 4:]).any(-1).all()


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_stays_within_twice_its_own_rounding(make: Make, dtype: torch.dtype) -> None:
    params = make(dtype=dtype)
    exact = params._replace(**{k: v.double() for k, v in params._asdict().items() if isinstance(v, Tensor)})
    x, state = inputs(2, 8, dtype)
    state = state.float()
    oracle, end, _ = sequential_sweep(x.double(), exact, state.double())
    contexts, last, _ = sequential_sweep(x, params, state)
    rounded, rounded_last, _ = sequential_sweep(x, params, state, compute_dtype=dtype)
    assert contexts.dtype == rounded.dtype == dtype
    assert last.dtype == rounded_last.dtype == torch.float32
    assert torch.equal(rounded_last, last) == (dtype == torch.float32)
    tiny = torch.finfo(dtype).eps
    assert (contexts - oracle).abs().max() <= 2 * (rounded - oracle).abs().max() + tiny
    assert (last - end).abs().max() <= 2 * (rounded_last - end).abs().max() + tiny


def as_function(
    sweep: Callable[..., tuple[Tensor, Tensor, object]], params: Params
) -> tuple[Callable[..., tuple[Tensor, Tensor]], tuple[Tensor, ...]]:
    """A sweep as a function of x, state and parameters, and the parameters."""
    names = [name for name, value in params._asdict().items() if isinstance(value, Tensor)]
    values = tuple(getattr(params, name).clone().requires_grad_() for name in names)

    def function(x: Tensor, state: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        contexts, last, _ = sweep(x, params._replace(**dict(zip(names, tensors, strict=True))), state)
        return contexts, last

    return function, values


@pytest.mark.parametrize(
    "sweep",
    [
        sequential_sweep,
        partial(jacobi_sweep, tol=0, sweeps=2),
        partial(block_sweep, chunk=2, tol=0, sweeps=9),
    ],
    ids=["sequential", "jacobi", "block"],
)
@pytest.mark.parametrize("params", [context_params(2), gated_params(1)], ids=["context", "gated"])
def test_gradients(sweep: Callable[..., tuple[Tensor, Tensor, object]], params: Params) -> None:
    function, values = as_function(sweep, params)
    x, state = inputs(2, 5)
    assert torch.autograd.gradcheck(function, (x.requires_grad_(), state.requires_grad_(), *values))
