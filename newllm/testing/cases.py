"""A case for every operator: its inputs in several variants, and its reference."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from newllm import ops
from newllm.reference import context, gemv, infini, memory, window
from newllm.testing.op_case import Draw, Inputs, OpCase, mapped
from newllm.types import ContextParams, FeatureMap, GatedParams, InfiniState, MemoryState


def _qkv(draw: Draw) -> Inputs:
    return {
        "q": draw.normal("batch", "heads", "tokens", "key"),
        "k": draw.normal("batch", "kv_heads", "tokens", "key"),
        "v": draw.normal("batch", "kv_heads", "tokens", "value"),
    }


def _kv(draw: Draw) -> Inputs:
    return {name: x for name, x in _qkv(draw).items() if name != "q"}


def _window(draw: Draw) -> Inputs:
    return _qkv(draw) | {"window": draw.sizes["window"]}


def _padding(draw: Draw) -> Inputs:
    return {"padding_mask": draw.mask("batch", "tokens")}


def _gamma(draw: Draw) -> Inputs:
    feature = FeatureMap("dpfp", order=2)
    return {"rule": "gamma", "feature": feature, "state": _memory(draw, feature)}


def _feature(draw: Draw) -> FeatureMap:
    return FeatureMap(scale=draw.normal("kv_heads") + 2, bias=draw.normal("kv_heads"))


def sparse(draw: Draw) -> FeatureMap:
    """Features large for one or two tokens a segment each: a memory by gamma lacks some of what follows."""
    rare = NormalDist().inv_cdf(1 - 1.5 / max(3, draw.sizes["segment"]))
    return FeatureMap(scale=draw.normal("kv_heads") / 8 + 4, bias=draw.normal("kv_heads") / 8 - 4 * rare)


def _weighed(draw: Draw) -> Inputs:
    """A write gate and a decay, which no kernel has."""
    gate = draw.normal("kv_heads", "key"), draw.normal("kv_heads")
    feature = _feature(draw)._replace(write=gate[0], write_bias=gate[1])
    return {"feature": feature, "decay": draw.normal("kv_heads").sigmoid()}


def _memory(draw: Draw, feature: FeatureMap | None = None) -> MemoryState:
    """The memory after three earlier tokens a sample."""
    k, v = draw.normal("batch", "kv_heads", 3, "key"), draw.normal("batch", "kv_heads", 3, "value")
    return mapped(Tensor.detach, memory.memory_update(k, v, feature=feature))


def _rope(draw: Draw, rows: int) -> tuple[Tensor, Tensor]:
    """cos and sin ``[rows, K]`` of positions 0 .. rows - 1, base 10000."""
    half = torch.arange(draw.sizes["key"] // 2, dtype=torch.float64) * 2 / draw.sizes["key"]
    angles = torch.outer(torch.arange(rows, dtype=torch.float64), 10000**-half).repeat(1, 2)
    return angles.cos().to(draw.device, draw.dtype), angles.sin().to(draw.device, draw.dtype)


def _infini(draw: Draw, **options: Any) -> Inputs:
    sizes = {"window": draw.sizes["window"], "segment": draw.sizes["segment"]}
    rope = _rope(draw, draw.sizes["tokens"])
    return {**_qkv(draw), "beta": draw.normal("heads"), "rope": rope, **sizes, **options}


def _stream(draw: Draw, **options: Any) -> tuple[Inputs, InfiniState]:
    """Inputs of a call that continues a stream, and its state after rows of different lengths."""
    tokens, ring = draw.sizes["tokens"], draw.sizes["window"]
    inputs = _infini(draw, **options)
    before: Inputs = {name: draw.normal(*x.shape) for name, x in _qkv(draw).items()}
    kept = {name: inputs[name] for name in ("beta", "window", "segment")}
    feature, rule = options.get("feature"), options.get("rule", "linear")
    lengths = torch.arange(draw.sizes["batch"])[:, None] + tokens - draw.sizes["batch"]
    mask = (torch.arange(tokens) < lengths).to(draw.device)
    decay = options.get("decay")
    _, state = infini.infini_attention(
        **before, **kept, feature=feature, rule=rule, decay=decay, padding_mask=mask
    )
    return {**inputs, "rope": _rope(draw, tokens + ring - 1)}, mapped(Tensor.detach, state)


def _continued(draw: Draw) -> Inputs:
    inputs, state = _stream(draw, feature=_feature(draw), gate="tanh")
    return inputs | _padding(draw) | {"state": state}


def _token(draw: Draw, **options: Any) -> Inputs:
    inputs, state = _stream(draw, **options)
    token = {name: inputs[name][:, :, -1:] for name in ("q", "k", "v")}
    return {**inputs, **token, "state": state}


def _vectors(draw: Draw, *sizes: str) -> Inputs:
    return {"x": draw.normal("batch", "width"), "weights": tuple(draw.scaled(n, "width") for n in sizes)}


def _context(draw: Draw) -> Inputs:
    weights = draw.scaled("layers", "width", "width"), draw.scaled("layers", "width", "input")
    vectors = [draw.normal("layers", "width") for _ in range(3)]
    params = ContextParams(*weights, *vectors)
    start = draw.normal("batch", "width", dtype=draw.state_dtype)
    return {"x": draw.normal("batch", "tokens", "input"), "params": params, "state": start}


def _gated(draw: Draw) -> Inputs:
    network = draw.scaled("hidden", "input"), draw.scaled("hidden", "width"), draw.normal("hidden")
    deeper = draw.scaled("layers", "hidden", "hidden"), draw.normal("layers", "hidden")
    gates = [draw.scaled("width", "hidden") for _ in range(3)]
    vectors = [draw.normal("width") for _ in range(5)]
    params = GatedParams._make([*network, *deeper, *gates, *vectors, None])
    start = draw.normal("batch", "width", dtype=draw.state_dtype)
    return {"x": draw.normal("batch", "tokens", "input"), "params": params, "state": start, "cell": "gated"}


# References that take the operator's own arguments


def _decode(state: InfiniState, active: Tensor | None = None, **inputs: Any) -> Any:
    mask = None if active is None else active[:, None]
    with torch.no_grad():
        return infini.infini_attention(**inputs, state=state, padding_mask=mask)


def _gemv(compute_dtype: torch.dtype | None = None, **inputs: Any) -> Tensor:
    return gemv.gemv(**inputs)


def _sweep(cell: str = "context", **inputs: Any) -> Any:
    assert isinstance(inputs["params"], {"context": ContextParams, "gated": GatedParams}[cell])
    return context.sequential_sweep(**inputs)


_HEADS = {"batch": 2, "heads": 4, "kv_heads": 2, "tokens": 11, "key": 6, "value": 5}
_SIZES = {**_HEADS, "window": 5, "segment": 4}

CASES: dict[str, OpCase] = {
    "memory_update": OpCase(
        ops.memory_update,
        memory.memory_update,
        _SIZES,
        {
            "linear": _kv,
            "scaled": lambda draw: _kv(draw) | _padding(draw) | {"scale": "1/T"},
            "delta": lambda draw: _kv(draw) | {"rule": "delta", "state": _memory(draw)},
            "gamma": lambda draw: _kv(draw) | _gamma(draw),
        },
    ),
    "memory_retrieve": OpCase(
        ops.memory_retrieve,
        memory.memory_retrieve,
        _SIZES,
        {
            "paper": lambda draw: {"q": _qkv(draw)["q"], "state": _memory(draw)},
            "learned": lambda draw: {"q": _qkv(draw)["q"], "state": _memory(draw), "feature": _feature(draw)},
        },
    ),
    "memory_scan": OpCase(
        ops.memory_scan,
        memory.memory_scan,
        _SIZES,
        {
            "linear": lambda draw: _kv(draw) | {"segment": draw.sizes["segment"], "feature": _feature(draw)},
            "delta": lambda draw: (
                _kv(draw)
                | _padding(draw)
                | {"segment": draw.sizes["segment"], "rule": "delta", "state": _memory(draw)}
            ),
            "gamma": lambda draw: (
                _kv(draw)
                | _padding(draw)
                | {"segment": draw.sizes["segment"], "rule": "gamma", "feature": sparse(draw)}
            ),
            "gated": lambda draw: _kv(draw) | {"segment": draw.sizes["segment"]} | _weighed(draw),
        },
    ),
    "window_attention": OpCase(
        ops.window_attention,
        window.window_attention,
        _SIZES,
        {
            "window": lambda draw: _window(draw) | {"rope": _rope(draw, draw.sizes["tokens"])},
            "whole": lambda draw: _window(draw) | {"window": draw.sizes["tokens"]},
            "segments": lambda draw: _window(draw) | {"window": None, "segment": draw.sizes["segment"]},
            "padded": lambda draw: _window(draw) | _padding(draw),
        },
        constants=("rope",),
    ),
    "infini_attention": OpCase(
        ops.infini_attention,
        infini.infini_attention,
        _SIZES,
        {
            "linear": _infini,
            "delta": lambda draw: _infini(draw, rule="delta", feature=_feature(draw)),
            "gamma": lambda draw: _infini(draw, rule="gamma", feature=sparse(draw)),
            "segments": lambda draw: _infini(draw, window=None),
            "continued": _continued,
            "gated": lambda draw: _infini(draw, **_weighed(draw)),
            "no memory": lambda draw: _infini(draw, beta=None),
        },
        constants=("rope",),
    ),
    "infini_decode": OpCase(
        ops.infini_decode,
        _decode,
        _SIZES,
        {
            "linear": _token,
            "delta": lambda draw: _token(draw, rule="delta", feature=_feature(draw)),
            "gamma": lambda draw: _token(draw, rule="gamma", feature=sparse(draw)),
            "gated": lambda draw: _token(draw, **_weighed(draw)),
            "active": lambda draw: _token(draw) | {"active": draw.mask("batch")},
        },
        mutates="state",
    ),
    "gemv": OpCase(
        ops.gemv,
        _gemv,
        {"batch": 2, "width": 20, "query": 18, "key": 7, "value": 5},
        {
            "plain": lambda draw: _vectors(draw, "query"),
            "normed": lambda draw: (
                _vectors(draw, "query", "key", "value") | {"norm": draw.normal("width") + 1, "eps": 1e-5}
            ),
            "residual": lambda draw: _vectors(draw, "key") | {"residual": draw.normal("batch", "key")},
            "swiglu": lambda draw: (
                _vectors(draw, "query", "query") | {"norm": draw.normal("width"), "swiglu": True}
            ),
        },
    ),
    "context_sweep": OpCase(
        ops.context_sweep,
        _sweep,
        {"batch": 2, "tokens": 5, "input": 3, "width": 4, "hidden": 6, "layers": 2},
        {"context": _context, "gated": _gated},
    ),
}
