"""Parameters, inputs and loops over Python numbers for the tests of the context recurrences."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from newllm.reference.context import LAYER_NORM_EPS
from newllm.types import ContextParams, GatedParams

Params = ContextParams | GatedParams
Make = Callable[..., Params]

C, E, H = 4, 3, 5
HALF_THE_DIGITS = math.sqrt(torch.finfo(torch.float64).eps)


def context_params(
    layers: int = 2,
    *,
    width: int = C,
    inputs: int = E,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> ContextParams:
    random = torch.Generator().manual_seed(layers)
    normal = partial(torch.randn, generator=random, dtype=torch.float64)
    params = ContextParams(
        weight_c=0.5 * normal(layers, width, width),
        weight_x=scale * normal(layers, width, inputs),
        bias=0.1 * normal(layers, width),
        ln_weight=1 + 0.1 * normal(layers, width),
        ln_bias=0.1 * normal(layers, width),
    )
    return ContextParams(*(value.to(dtype) for value in params))


def gated_params(
    deeper: int = 1, *, clamp: float | None = None, dtype: torch.dtype = torch.float64
) -> GatedParams:
    random = torch.Generator().manual_seed(deeper)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    return GatedParams(
        weight_x=normal(H, E),
        weight_c=normal(H, C),
        bias=normal(H),
        weight_h=normal(deeper, H, H),
        bias_h=normal(deeper, H),
        weight_f=normal(C, H),
        weight_i=normal(C, H),
        weight_d=normal(C, H),
        bias_f=normal(C),
        bias_i=normal(C),
        bias_d=normal(C),
        ln_weight=1 + normal(C) / 8,
        ln_bias=normal(C) / 8,
        clamp=clamp,
    )


def inputs(batch: int, tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(tokens)
    x = torch.randn(batch, tokens, E, generator=random, dtype=torch.float64)
    return x.to(dtype), torch.randn(batch, C, generator=random, dtype=torch.float64)


both = pytest.mark.parametrize("make", [context_params, gated_params, partial(gated_params, clamp=0.75)])


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert (actual - expected).abs().max() <= HALF_THE_DIGITS * max(1.0, expected.abs().max().item())


# Loops over Python numbers, straight from the equations.


def matvec(weight: list[list[float]], vector: list[float], bias: list[float]) -> list[float]:
    rows = zip(weight, bias, strict=True)
    return [sum(w * v for w, v in zip(row, vector, strict=True)) + b for row, b in rows]


def norm(vector: list[float], weight: list[float], bias: list[float]) -> list[float]:
    mean = sum(vector) / len(vector)
    variance = sum((value - mean) ** 2 for value in vector) / len(vector)
    root = math.sqrt(variance + LAYER_NORM_EPS)
    return [(v - mean) / root * w + b for v, w, b in zip(vector, weight, bias, strict=True)]


def gelu(value: float) -> float:
    return value * (1 + math.erf(value / math.sqrt(2))) / 2


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def context_token(x: list[float], c: list[float], params: ContextParams) -> list[float]:
    weights = torch.cat([params.weight_c, params.weight_x], -1).tolist()
    for layer, weight in enumerate(weights):
        change = map(gelu, matvec(weight, c + x, params.bias[layer].tolist()))
        moved = [old + new for old, new in zip(c, change, strict=True)]
        c = norm(moved, params.ln_weight[layer].tolist(), params.ln_bias[layer].tolist())
    return c


def hidden_token(x: list[float], c: list[float], params: GatedParams) -> list[float]:
    first = torch.cat([params.weight_x, params.weight_c], -1).tolist()
    h = [max(0.0, value) for value in matvec(first, x + c, params.bias.tolist())]
    for weight, bias in zip(params.weight_h.tolist(), params.bias_h.tolist(), strict=True):
        h = [max(0.0, value) for value in matvec(weight, h, bias)]
    return h


def gated_token(x: list[float], c: list[float], params: GatedParams) -> list[float]:
    h = hidden_token(x, c, params)
    f = [sigmoid(value) for value in matvec(params.weight_f.tolist(), h, params.bias_f.tolist())]
    i = [sigmoid(value) for value in matvec(params.weight_i.tolist(), h, params.bias_i.tolist())]
    d = [math.tanh(value) for value in matvec(params.weight_d.tolist(), h, params.bias_d.tolist())]
    mixed = [f[n] * c[n] + i[n] * d[n] for n in range(len(c))]
    c = norm(mixed, params.ln_weight.tolist(), params.ln_bias.tolist())
    return c if params.clamp is None else [max(-params.clamp, min(params.clamp, value)) for value in c]


def loop(x: Tensor, params: Params, state: Tensor) -> Tensor:
    rows = []
    for row, c in zip(x.tolist(), state.tolist(), strict=True):
        contexts = []
        for token in row:
            if isinstance(params, ContextParams):
                c = context_token(token, c, params)
            else:
                c = gated_token(token, c, params)
            contexts.append(c)
        rows.append(contexts)
    return torch.tensor(rows, dtype=torch.float64)
