"""Calls of the memory operators, put together from parts, and their judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from newllm.reference import memory as reference
from newllm.testing import CASES, Draw, Inputs, OpCase, mapped
from newllm.testing.cases import sparse
from newllm.types import FeatureMap, MemoryState


def key_values(draw: Draw) -> Inputs:
    widths = {"k": "key", "v": "value"}
    return {name: draw.normal("batch", "kv_heads", "tokens", width) for name, width in widths.items()}


def learned(draw: Draw) -> Inputs:
    scale, bias = draw.normal("kv_heads") + 2, draw.normal("kv_heads")
    if draw.dtype == torch.float16:
        # Features so small that the reference's denominators, sums of their products, do not overflow.
        bias = bias - 6
    return {"feature": FeatureMap(scale=scale, bias=bias)}


def filled(draw: Draw, count: bool = True) -> Inputs:
    """The memory after thirty earlier tokens a sample."""
    k, v = draw.normal("batch", "kv_heads", 30, "key"), draw.normal("batch", "kv_heads", 30, "value")
    state: MemoryState = mapped(Tensor.detach, reference.memory_update(k, v))
    return {"state": state if count else state._replace(count=None)}


def begun(draw: Draw, count: bool = True) -> Inputs:
    """A faint memory of four segments: by gamma's rule it lacks some of what follows."""
    feature, tokens = sparse(draw), 4 * draw.sizes["segment"]
    k, v = (draw.normal("batch", "kv_heads", tokens, width) for width in ("key", "value"))
    matrix, norm, seen = mapped(Tensor.detach, reference.memory_update(k, v, feature=feature))
    assert seen is not None
    state = MemoryState(matrix / 16, norm / 16, seen // 16 if count else None)
    return {"feature": feature, "state": state}


def padded(draw: Draw) -> Inputs:
    return {"padding_mask": draw.mask("batch", "tokens")}


def queries(draw: Draw) -> Inputs:
    return {"q": draw.normal("batch", "heads", "tokens", "key")}


def weights(draw: Draw) -> Inputs:
    count = -(-draw.sizes["tokens"] // draw.sizes["segment"])
    return {"segment_weight": draw.normal("batch", count).abs()}


def segmented(draw: Draw) -> Inputs:
    return {"segment": draw.sizes["segment"]}


def apart(draw: Draw) -> Inputs:
    """Keys and values that lie in memory as [B, T, H, D], values with gaps between their columns."""
    k = draw.normal("batch", "tokens", "kv_heads", "key").transpose(1, 2)
    v = draw.normal("batch", "kv_heads", "tokens", 2 * draw.sizes["value"])[..., ::2]
    return {"k": k, "v": v}


def queries_apart(draw: Draw) -> Inputs:
    return {"q": draw.normal("batch", "tokens", "heads", 2 * draw.sizes["key"]).transpose(1, 2)[..., ::2]}


def made(*parts: Callable[[Draw], Inputs] | Inputs) -> Callable[[Draw], Inputs]:
    """Inputs put together from parts, of which the later ones win."""

    def make(draw: Draw) -> Inputs:
        inputs: Inputs = {}
        for part in parts:
            inputs |= part(draw) if callable(part) else part
        return inputs

    return make


DELTA, GAMMA = {"rule": "delta"}, {"rule": "gamma"}
VARIANTS: dict[str, dict[str, Callable[[Draw], Inputs]]] = {
    "memory_update": {
        "linear": made(key_values),
        "delta": made(key_values, filled, learned, DELTA),
        "1/T": made(key_values, filled, learned, padded, {"scale": "1/T"}),
        "1/(B*T), delta": made(key_values, filled, padded, DELTA, {"scale": "1/(B*T)"}),
        "no guard": made(key_values, partial(filled, count=False), DELTA),
        "empty, delta": made(key_values, learned, DELTA),
        "strides": made(apart, filled, learned),
        "gamma": made(apart, begun, padded, GAMMA, {"scale": "1/T"}),
    },
    "memory_scan": {
        "linear": made(key_values, segmented),
        "delta": made(key_values, segmented, filled, learned, padded, DELTA),
        "weights": made(key_values, segmented, filled, learned, padded, weights),
        "no guard": made(key_values, segmented, partial(filled, count=False), DELTA),
        "empty, delta": made(key_values, segmented, learned, DELTA),
        "strides": made(apart, segmented, filled, DELTA),
        "gamma": made(apart, segmented, begun, padded, GAMMA),
    },
    "memory_retrieve": {
        "learned": made(queries, filled, learned),
        "paper": made(queries, filled),
        "strides": made(queries_apart, filled),
    },
}
EVERY = [(op, variant) for op, variants in VARIANTS.items() for variant in variants]
SIZES = {"batch": 2, "heads": 4, "kv_heads": 2, "tokens": 21, "key": 20, "value": 24, "segment": 8}


def case_of(op: str) -> OpCase:
    return replace(CASES[op], sizes=SIZES, variants=VARIANTS[op])


def judge(op: str, variant: str, dtype: torch.dtype, device: str, *, draws: int = 1, **sizes: int) -> None:
    case = case_of(op)
    others = (case.inputs(variant, dtype, device=device, seed=seed, **sizes) for seed in range(draws))
    inputs = next(others)
    # A float16 reference divides by a clamped weight where its state is empty: its gradient overflows.
    gradients = dtype != torch.float16 or "empty" not in variant
    function = partial(case.public, backend="fused")
    case.judge(inputs, dtype, function=function, gradients=gradients, others=others)
