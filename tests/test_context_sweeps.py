"""The Jacobi and block sweeps against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from context_cases import C, Make, assert_same, both, context_params, inputs, loop

from newllm.reference.context import block_sweep, jacobi_sweep, sequential_sweep
from newllm.types import ContextParams


@both
@pytest.mark.parametrize("sweeps", [1, 3, 6])
def test_jacobi_is_the_recurrence_of_as_many_tokens(make: Make, sweeps: int) -> None:
    params = make()
    x, state = inputs(2, 8)
    contexts, last, info = jacobi_sweep(x, params, state, tol=0, sweeps=sweeps)
    assert (info.method, info.sweeps) == ("jacobi", sweeps)
    exact = loop(x[:, :sweeps], params, state)
    assert_same(contexts[:, :sweeps], exact)
    for t in range(sweeps, 8):
        recent = loop(x[:, t - sweeps + 1 : t + 1], params, torch.zeros_like(state))
        assert_same(contexts[:, t], recent[:, -1])
    assert_same(last, contexts[:, -1])


@both
def test_jacobi_without_limit_is_sequential(make: Make) -> None:
    params = make()
    x, state = inputs(2, 8)
    contexts, last, info = jacobi_sweep(x, params, state, tol=0)
    expected, end, _ = sequential_sweep(x, params, state)
    assert info.sweeps == 8
    assert_same(contexts, expected)
    assert_same(last, end)
    longer, _, info = jacobi_sweep(x, params, state, tol=0, sweeps=20)
    assert info.sweeps == 8 and torch.equal(longer, contexts)


def test_jacobi_stops_at_tol() -> None:
    params = context_params(1, scale=8)
    x, state = inputs(2, 40)
    contexts, _, info = jacobi_sweep(x, params, state, tol=1e-3)
    assert info.sweeps < 40 and info.residual <= 1e-3
    previous, _, before = jacobi_sweep(x, params, state, tol=0, sweeps=info.sweeps - 1)
    assert before.residual > 1e-3
    assert info.residual == (contexts - previous).abs().max()


@pytest.mark.parametrize("tokens", [32, 29, 33])
@pytest.mark.parametrize("tol", [1e-2, 1e-4, 1e-6])
def test_block_equals_sequential_under_its_certificate(tokens: int, tol: float) -> None:
    params = context_params(1, scale=8)
    x, state = inputs(2, tokens)
    chunks = math.ceil(tokens / 4)
    contexts, last, info = block_sweep(x, params, state, chunk=4, tol=tol, sweeps=chunks)
    expected, end, _ = sequential_sweep(x, params, state)
    assert info.method == "block" and 1 < info.sweeps < chunks and info.residual <= tol
    # Each border moves the trajectory by at most tol, and this recurrence shrinks what it is moved by;
    # the root of C is the most that the change of norm costs.
    bound = math.sqrt(C) * tol * chunks
    assert contexts.shape == expected.shape
    assert (contexts - expected).abs().max() <= bound
    assert torch.equal(last, contexts[:, -1]) and (last - end).abs().max() <= bound


@both
def test_block_is_exact_after_a_sweep_per_chunk(make: Make) -> None:
    params = make()
    x, state = inputs(2, 11)
    contexts, last, _ = block_sweep(x, params, state, chunk=4, tol=0, sweeps=9)
    expected, end, _ = sequential_sweep(x, params, state)
    assert_same(contexts, expected)
    assert_same(last, end)


def test_block_of_one_chunk_is_sequential() -> None:
    x, state = inputs(2, 11)
    contexts, _, info = block_sweep(x, context_params(), state)
    expected, _, _ = sequential_sweep(x, context_params(), state)
    assert (info.method, info.sweeps, info.residual.item()) == ("block", 1, 0.0)
    assert_same(contexts, expected)


def test_block_falls_back_when_it_does_not_contract() -> None:
    # With no weights the context never changes, so what enters a chunk never fades.
    params = ContextParams(*(torch.zeros_like(value) for value in context_params(1)))
    params = params._replace(ln_weight=params.ln_weight + 1)
    x, state = inputs(2, 32)
    contexts, last, info = block_sweep(x, params, state, chunk=8, tol=1e-6, sweeps=9)
    expected, end, _ = sequential_sweep(x, params, state)
    assert (info.method, info.sweeps, info.residual.item()) == ("sequential", 3, 0.0)
    assert torch.equal(contexts, expected) and torch.equal(last, end)


def test_block_falls_back_when_its_sweeps_are_spent() -> None:
    params = context_params(1, scale=8)
    x, state = inputs(2, 32)
    contexts, _, info = block_sweep(x, params, state, chunk=8, tol=1e-6, sweeps=1)
    assert (info.method, info.sweeps) == ("sequential", 2)
    assert torch.equal(contexts, sequential_sweep(x, params, state)[0])
