"""Good inputs of the attention operators, and all the ways to get them wrong."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from newllm.types import FeatureMap, InfiniState, MemoryState


def qkv(tokens: int = 6, **shapes: tuple[int, ...]) -> dict[str, Any]:
    default = {"q": (2, 4, tokens, 4), "k": (2, 2, tokens, 4), "v": (2, 2, tokens, 3)}
    return {name: torch.randn(shapes.get(name, shape)) for name, shape in default.items()}


def kv(**shapes: tuple[int, ...]) -> dict[str, Any]:
    return {name: x for name, x in qkv(**shapes).items() if name != "q"}


def memory(**changes: Any) -> MemoryState:
    state = MemoryState(torch.zeros(2, 2, 4, 3), torch.zeros(2, 2, 4), torch.zeros(2, dtype=torch.int64))
    return state._replace(**changes)


def stream(**changes: Any) -> InfiniState:
    rings = torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 4, 3)
    state = InfiniState(*memory()[:2], *rings, torch.zeros(2, dtype=torch.int64))
    return state._replace(**changes)


def tables(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.ones(shape), torch.zeros(shape)


def vectors(*sizes: int) -> dict[str, Any]:
    return {"x": torch.randn(2, 4), "weights": tuple(torch.randn(size, 4) for size in sizes)}


INFINI: dict[str, Any] = {"beta": torch.zeros(4), "window": 4, "segment": 2}
META = torch.zeros(2, device="meta")


class Wrong(NamedTuple):
    """Arguments that replace good ones, and the whole message that they get."""

    op: str
    wrong: dict[str, Any]
    error: type[Exception]
    message: str


WRONG: list[Wrong] = [
    Wrong(
        "memory_update",
        {"k": torch.zeros(2, 2, 6, 4, dtype=torch.int64)},
        TypeError,
        "k must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    Wrong(
        "memory_update",
        {"k": torch.zeros(2, 6, 4)},
        ValueError,
        "k must be of shape [B, Hkv, T, K], got [2, 6, 4]",
    ),
    Wrong(
        "memory_update",
        {"v": torch.zeros(2, 6, 3)},
        ValueError,
        "v must be of shape [B, Hkv, T, V], got [2, 6, 3]",
    ),
    Wrong(
        "memory_update",
        {"v": torch.zeros(2, 2, 5, 3)},
        ValueError,
        "v must be of shape [2, 2, 6, 3], got [2, 2, 5, 3]",
    ),
    Wrong(
        "memory_update",
        {"v": torch.zeros(2, 2, 6, 3).half()},
        TypeError,
        "v must be torch.float32 like k, got torch.float16",
    ),
    Wrong(
        "memory_update",
        {"v": torch.zeros(2, 2, 6, 3, device="meta")},
        ValueError,
        "device of v must be cpu, the inputs' own, got meta",
    ),
    Wrong(
        "memory_update",
        kv(k=(2, 2, 0, 4), v=(2, 2, 0, 3)),
        ValueError,
        "k's tokens must be at least 1, got 0",
    ),
    Wrong(
        "memory_update",
        {"rule": "hebb"},
        ValueError,
        "rule must be one of 'linear', 'delta', 'gamma', got 'hebb'",
    ),
    Wrong(
        "memory_update",
        {"scale": "1/B"},
        ValueError,
        "scale must be one of 'none', '1/T', '1/(B*T)', got '1/B'",
    ),
    Wrong(
        "memory_update",
        {"padding_mask": torch.ones(2, 6)},
        TypeError,
        "padding_mask must be torch.bool, got torch.float32",
    ),
    Wrong(
        "memory_update",
        {"padding_mask": torch.ones(2, 5, dtype=torch.bool)},
        ValueError,
        "padding_mask must be of shape [2, 6], got [2, 5]",
    ),
    Wrong(
        "memory_update",
        {"state": memory(matrix=torch.zeros(2, 2, 4, 4))},
        ValueError,
        "state.matrix must be of shape [2, 2, 4, 3], got [2, 2, 4, 4]",
    ),
    Wrong(
        "memory_update",
        {"state": memory(norm=torch.zeros(1, 2, 4))},
        ValueError,
        "state.norm must be of shape [2, 2, 4], got [1, 2, 4]",
    ),
    Wrong(
        "memory_update",
        {"state": memory(norm=torch.zeros(2, 2, 4).half())},
        TypeError,
        "state.norm must be float32 (states are never rounded), got torch.float16",
    ),
    Wrong(
        "memory_update",
        {"state": memory(count=torch.zeros(3, dtype=torch.int64))},
        ValueError,
        "state.count must be of shape [2], got [3]",
    ),
    Wrong(
        "memory_update",
        {"state": memory(count=torch.zeros(2))},
        TypeError,
        "state.count must be torch.int64, got torch.float32",
    ),
    Wrong(
        "memory_update",
        {"feature": FeatureMap("relu")},
        ValueError,
        "feature.kind must be one of 'elu1', 'dpfp', got 'relu'",
    ),
    Wrong(
        "memory_update",
        {"feature": FeatureMap("dpfp")},
        ValueError,
        "feature.order must be 1 or more, got None",
    ),
    Wrong(
        "memory_update",
        {"feature": FeatureMap("dpfp", order=1, bias=META)},
        ValueError,
        "feature.scale and bias must be None for dpfp, got given",
    ),
    Wrong(
        "memory_update",
        {"feature": FeatureMap(order=2)},
        ValueError,
        "feature.order must be None for elu1, got 2",
    ),
    Wrong(
        "memory_update",
        {"feature": FeatureMap(scale=torch.ones(4))},
        ValueError,
        "feature.scale must be of shape [2], got [4]",
    ),
    Wrong(
        "memory_update",
        {"feature": FeatureMap(bias=META)},
        ValueError,
        "device of feature.bias must be cpu, the inputs' own, got meta",
    ),
    Wrong(
        "memory_retrieve", {"q": torch.zeros(2, 4)}, ValueError, "q must be of shape [B, H, T, K], got [2, 4]"
    ),
    Wrong(
        "memory_retrieve",
        {"q": torch.zeros(2, 3, 6, 4)},
        ValueError,
        "q's heads must be a multiple of the memory's 2, got 3",
    ),
    Wrong(
        "memory_retrieve",
        {"q": torch.zeros(3, 4, 6, 4)},
        ValueError,
        "state.matrix must be of shape [3, 2, 4, 3], got [2, 2, 4, 3]",
    ),
    Wrong(
        "memory_retrieve",
        {"state": memory(matrix=torch.zeros(4, 3))},
        ValueError,
        "state.matrix must be of shape [B, Hkv, F, V], got [4, 3]",
    ),
    Wrong(
        "memory_retrieve",
        {"feature": FeatureMap("dpfp", order=2)},
        ValueError,
        "state.matrix must be of shape [2, 2, 16, 3], got [2, 2, 4, 3]",
    ),
    Wrong("memory_scan", {"segment": 0}, ValueError, "segment must be at least 1, got 0"),
    Wrong(
        "memory_scan",
        {"segment_weight": torch.ones(2, 2)},
        ValueError,
        "segment_weight must be of shape [2, 3], got [2, 2]",
    ),
    Wrong(
        "memory_scan",
        {"segment_weight": torch.ones(2, 3, dtype=torch.int64)},
        TypeError,
        "segment_weight must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    Wrong(
        "memory_scan",
        {"segment_weight": torch.ones(2, 3), "rule": "delta"},
        ValueError,
        "rule must be 'linear' when segment_weight is given, got 'delta'",
    ),
    Wrong(
        "window_attention",
        {"window": None},
        ValueError,
        "segment must be given when window is None, got None",
    ),
    Wrong(
        "window_attention", {"window": None, "segment": 0}, ValueError, "segment must be at least 1, got 0"
    ),
    Wrong("window_attention", {"window": 0}, ValueError, "window must be at least 1 or None, got 0"),
    Wrong(
        "window_attention",
        {"q": torch.zeros(2, 3, 6, 4)},
        ValueError,
        "q's heads must be a multiple of the 2 key/value heads, got 3",
    ),
    Wrong(
        "window_attention",
        {"q": torch.zeros(2, 4, 5, 4)},
        ValueError,
        "q must be of shape [2, 4, 6, 4], got [2, 4, 5, 4]",
    ),
    Wrong(
        "window_attention",
        {"q": torch.zeros(2, 4, 6, 4).double()},
        TypeError,
        "q must be torch.float32 like k, got torch.float64",
    ),
    Wrong(
        "window_attention",
        {"rope": tables(7, 4)},
        ValueError,
        "rope's rows must be 6, one per token, without a state, got 7",
    ),
    Wrong(
        "window_attention", {"rope": tables(6, 2)}, ValueError, "rope cos must be of shape [6, 4], got [6, 2]"
    ),
    Wrong(
        "window_attention",
        {"rope": tables(1, 6, 4)},
        ValueError,
        "rope cos must be of shape [2, 6, 4], got [1, 6, 4]",
    ),
    Wrong(
        "window_attention",
        {"rope": tables(1, 1, 6, 4)},
        ValueError,
        "rope cos must be of shape [N, K] or [B, N, K], got [1, 1, 6, 4]",
    ),
    Wrong(
        "window_attention",
        {"rope": (torch.ones(6, 4), torch.ones(2, 6, 4))},
        ValueError,
        "rope sin must be of shape [6, 4], got [2, 6, 4]",
    ),
    Wrong(
        "window_attention",
        {**qkv(q=(2, 2, 6, 3), k=(2, 2, 6, 3)), "rope": tables(6, 3)},
        ValueError,
        "k's width must be even when rope is given, got 3",
    ),
    Wrong("infini_attention", {"segment": 5}, ValueError, "segment must be at most window (4), got 5"),
    Wrong(
        "infini_attention", {"gate": "relu"}, ValueError, "gate must be one of 'sigmoid', 'tanh', got 'relu'"
    ),
    Wrong("infini_attention", {"beta": torch.zeros(2)}, ValueError, "beta must be of shape [4], got [2]"),
    Wrong(
        "infini_attention",
        {"beta": torch.zeros(4, dtype=torch.int64)},
        TypeError,
        "beta must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    Wrong(
        "infini_attention",
        {"beta": torch.zeros(4, device="meta")},
        ValueError,
        "device of beta must be cpu, the inputs' own, got meta",
    ),
    Wrong(
        "infini_attention",
        {"detach": "all"},
        ValueError,
        "detach must be one of 'none', 'segment', 'full', got 'all'",
    ),
    Wrong(
        "infini_attention",
        {"detach": "full", "bptt_segments": 1},
        ValueError,
        "detach must be 'none' when bptt_segments is given, got 'full'",
    ),
    Wrong("infini_attention", {"bptt_segments": -1}, ValueError, "bptt_segments must be 0 or more, got -1"),
    Wrong(
        "infini_attention",
        {"segment_weight": torch.ones(2, 4)},
        ValueError,
        "segment_weight must be of shape [2, 3], got [2, 4]",
    ),
    Wrong(
        "infini_attention",
        {"segment_weight": torch.ones(2, 3), "state": stream()},
        ValueError,
        "segment_weight must be of shape [2, 4], got [2, 3]",
    ),
    Wrong(
        "infini_attention",
        {"state": stream(), "rope": tables(8, 4)},
        ValueError,
        "rope's rows must be at least 9 with a state, got 8",
    ),
    Wrong(
        "infini_attention",
        {"state": stream(), "window": 5},
        ValueError,
        "state.keys must be of shape [2, 2, 5, 4], got [2, 2, 4, 4]",
    ),
    Wrong(
        "infini_attention",
        {"state": stream(values=torch.zeros(2, 2, 4, 4))},
        ValueError,
        "state.values must be of shape [2, 2, 4, 3], got [2, 2, 4, 4]",
    ),
    Wrong(
        "infini_attention",
        {"state": stream(position=torch.zeros(3))},
        TypeError,
        "state.position must be torch.int64, got torch.float32",
    ),
    Wrong(
        "infini_attention",
        {"state": stream(position=torch.zeros(2, dtype=torch.int64, device="meta"))},
        ValueError,
        "device of state.position must be cpu, the inputs' own, got meta",
    ),
    Wrong(
        "infini_attention",
        {"state": stream(), "beta": None},
        ValueError,
        "state.matrix must be a tensor when beta is given and None when it is not, got a tensor",
    ),
    Wrong(
        "infini_attention",
        {"state": stream(matrix=None, norm=None)},
        ValueError,
        "state.matrix must be a tensor when beta is given and None when it is not, got None",
    ),
    Wrong(
        "infini_attention",
        {"state": stream(norm=None)},
        ValueError,
        "state.norm must be a tensor when beta is given and None when it is not, got None",
    ),
    Wrong("infini_decode", qkv(2), ValueError, "q's tokens must be 1, got 2"),
    Wrong(
        "infini_decode", {"active": torch.ones(2)}, TypeError, "active must be torch.bool, got torch.float32"
    ),
    Wrong(
        "infini_decode",
        {"active": torch.ones(3, dtype=torch.bool)},
        ValueError,
        "active must be of shape [2], got [3]",
    ),
    Wrong(
        "infini_decode",
        {"rope": tables(3, 4)},
        ValueError,
        "rope's rows must be at least 4 with a state, got 3",
    ),
    Wrong("gemv", {"x": torch.zeros(4)}, ValueError, "x must be of shape [B, K], got [4]"),
    Wrong("gemv", vectors(), ValueError, "weights must be 2 with swiglu, 1 to 3 without, got 0"),
    Wrong("gemv", vectors(1, 2, 3, 4), ValueError, "weights must be 2 with swiglu, 1 to 3 without, got 4"),
    Wrong("gemv", {"swiglu": True}, ValueError, "weights[1] must be of shape [3, 4], got [5, 4]"),
    Wrong(
        "gemv",
        {"weights": (torch.zeros(3, 4).half(),)},
        TypeError,
        "weights[0] must be torch.float32 like x, got torch.float16",
    ),
    Wrong("gemv", {"norm": torch.zeros(3)}, ValueError, "norm must be of shape [4], got [3]"),
    Wrong(
        "gemv", {"residual": torch.zeros(2, 3)}, ValueError, "residual must be of shape [2, 8], got [2, 3]"
    ),
]


def good(op: str) -> dict[str, Any]:
    return {
        "memory_update": lambda: kv(),
        "memory_retrieve": lambda: {"q": qkv()["q"], "state": memory()},
        "memory_scan": lambda: {**kv(), "segment": 2},
        "window_attention": lambda: {**qkv(), "window": 4},
        "infini_attention": lambda: {**qkv(), **INFINI},
        "infini_decode": lambda: {**qkv(1), **INFINI, "state": stream()},
        "gemv": lambda: vectors(3, 5),
    }[op]()
