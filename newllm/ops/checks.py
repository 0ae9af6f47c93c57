"""Checks of the public operators: each message names the argument, what came and what is allowed."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.amp.autocast_mode import is_autocast_available

from newllm.reference.features import feature_width
from newllm.types import FeatureMap, InfiniState, MemoryState

CAST = (torch.float16, torch.bfloat16, torch.float32)
FLOATS = (*CAST, torch.float64)
# A layer's state holds a memory too.
MEMORIES = (MemoryState, InfiniState)


def require(condition: bool, name: str, got: Any, allowed: str, *parts: Any) -> None:
    """Raise ``ValueError`` unless ``condition`` holds; ``parts`` stand in for the braces of ``allowed``.

    Text is put together only then: Dynamo cannot trace the formatting of sizes that it does not know.
    """
    if not condition:
        raise ValueError(f"{name} must be {allowed.format(*parts) if parts else allowed}, got {got}")


def choice(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``allowed``."""
    allowed = list(allowed)
    require(value in allowed, name, repr(value), "one of " + ", ".join(map(repr, allowed)))


def shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless ``tensor`` has the ``expected`` shape."""
    require(tuple(tensor.shape) == expected, name, list(tensor.shape), "of shape {}", list(expected))


def attention_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q ``[B, H, T, K]``, k ``[B, Hkv, T, K]``, v ``[B, Hkv, T, V]``, one float dtype and device."""
    key_values(k, v)
    floats("q", q)
    require(q.ndim == 4, "q", list(q.shape), "of shape [B, H, T, K]")
    same_place("q", q, k)
    batch, heads, tokens, width = k.shape
    shape("q", q, (batch, q.shape[1], tokens, width))
    require(q.shape[1] % heads == 0, "q's heads", q.shape[1], "a multiple of the {} key/value heads", heads)


def key_values(k: Tensor, v: Tensor) -> None:
    """k ``[B, Hkv, T, K]``, v ``[B, Hkv, T, V]``, one float dtype and device."""
    floats("k", k)
    require(k.ndim == 4, "k", list(k.shape), "of shape [B, Hkv, T, K]")
    kind("v", v, Tensor, "a tensor")
    require(v.ndim == 4, "v", list(v.shape), "of shape [B, Hkv, T, V]")
    same_place("v", v, k)
    shape("v", v, (*k.shape[:3], v.shape[3]))
    require(k.shape[2] >= 1, "k's tokens", k.shape[2], "at least 1")


def kind(name: str, value: Any, classes: type | tuple[type, ...], allowed: str) -> None:
    """Raise ``TypeError`` unless ``value`` is of one of ``classes``, which are ``allowed`` in words."""
    if not isinstance(value, classes):
        raise TypeError(f"{name} must be {allowed}, got {type(value).__name__}")


def whole(name: str, value: Any, allowed: str = "a whole number") -> None:
    """Raise ``TypeError`` unless ``value`` is an integer, known or not yet known to a compiler."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be {allowed}, got {value!r}")


def floats(name: str, tensor: Tensor) -> None:
    """Raise ``TypeError`` unless ``tensor`` is float16, bfloat16, float32 or float64."""
    kind(name, tensor, Tensor, "a tensor")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


def same_place(name: str, tensor: Tensor, like: Tensor, other: str = "k") -> None:
    """One dtype and device for all of an operator's inputs, those of its argument ``other``."""
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} must be {like.dtype} like {other}, got {tensor.dtype}")
    device(name, tensor, like)


def segmentation(window: int | None, segment: int) -> None:
    """``1 <= segment <= window``: otherwise tokens would lie neither in the window nor in memory."""
    whole("segment", segment)
    require(segment >= 1, "segment", segment, "at least 1")
    if window is not None:
        whole("window", window, "a whole number or None")
        require(window >= 1, "window", window, "at least 1 or None")
        require(segment <= window, "segment", segment, "at most window ({})", window)


def denominator(eps: float) -> None:
    """The least denominator of a readout: without one an empty memory reads NaN."""
    require(eps > 0, "eps", eps, "above 0")


def gate_and_beta(beta: Tensor | None, gate: str, q: Tensor) -> None:
    """``beta [H]``, or None for a layer without memory."""
    choice("gate", gate, ("sigmoid", "tanh"))
    if beta is not None:
        parameter("beta", beta, (q.shape[1],), q)


def parameter(name: str, tensor: Tensor, expected: tuple[int, ...], like: Tensor) -> None:
    """A float tensor of the ``expected`` shape, of any float dtype, on the device of ``like``."""
    floats(name, tensor)
    shape(name, tensor, expected)
    device(name, tensor, like)


def device(name: str, tensor: Tensor, like: Tensor) -> None:
    """Raise ``ValueError`` unless ``tensor`` is where the operator's inputs are."""
    require(
        tensor.device == like.device, f"device of {name}", tensor.device, "{}, the inputs' own", like.device
    )


def feature(feature: FeatureMap | None, heads: int, like: Tensor) -> None:
    """elu1 with per-head scale and bias, or dpfp with its order."""
    if feature is None:
        return
    kind("feature", feature, FeatureMap, "a FeatureMap")
    choice("feature.kind", feature.kind, ("elu1", "dpfp"))
    _write_gate(feature, heads, like)
    if feature.kind == "dpfp":
        require(
            isinstance(feature.order, int) and feature.order >= 1, "feature.order", feature.order, "1 or more"
        )
        require(
            feature.scale is None and feature.bias is None, "feature.scale and bias", "given", "None for dpfp"
        )
        return
    require(feature.order is None, "feature.order", feature.order, "None for elu1")
    for name, tensor in (("feature.scale", feature.scale), ("feature.bias", feature.bias)):
        if tensor is not None:
            parameter(name, tensor, (heads,), like)


def _write_gate(feature: FeatureMap, heads: int, like: Tensor) -> None:
    """``write [Hkv, K]`` and ``write_bias [Hkv]``, both or neither."""
    given = [part is not None for part in (feature.write, feature.write_bias)]
    require(given[0] == given[1], "feature.write and write_bias", "one of them", "given both or neither")
    if feature.write is not None and feature.write_bias is not None:
        parameter("feature.write", feature.write, (heads, like.shape[-1]), like)
        parameter("feature.write_bias", feature.write_bias, (heads,), like)


def decay(decay: Tensor | None, segment_weight: Tensor | None, k: Tensor) -> None:
    """``decay [Hkv]``, what a memory keeps of itself; not beside weights, which stand for longer streams."""
    if decay is not None:
        parameter("decay", decay, (k.shape[1],), k)
        require(segment_weight is None, "segment_weight", "a tensor", "None when decay is given")


def rope(rope: tuple[Tensor, Tensor] | None, k: Tensor, history: int | None) -> None:
    """cos and sin ``[N, K]`` or ``[B, N, K]``, float, for a state that reaches ``history`` tokens back.

    N is the number of tokens without a state (``history=None``), and at least tokens + history with one.
    """
    if rope is None:
        return
    batch, _, tokens, width = k.shape
    require(width % 2 == 0, "k's width", width, "even when rope is given")
    kind("rope", rope, (tuple, list), "the tables (cos, sin)")
    if len(rope) != 2:
        raise TypeError(f"rope must be the tables (cos, sin), got {len(rope)} of them")
    cos, sin = rope
    kind("rope cos", cos, Tensor, "a tensor")
    require(cos.ndim in (2, 3), "rope cos", list(cos.shape), "of shape [N, K] or [B, N, K]")
    rows = cos.shape[-2]
    for name, table in (("rope cos", cos), ("rope sin", sin)):
        parameter(name, table, (rows, width) if cos.ndim == 2 else (batch, rows, width), k)
    if history is None:
        require(rows == tokens, "rope's rows", rows, "{}, one per token, without a state", tokens)
    else:
        require(rows >= tokens + history, "rope's rows", rows, "at least {} with a state", tokens + history)


def padding(mask: Tensor | None, k: Tensor) -> None:
    """bool ``[B, T]``, True where a token is real."""
    if mask is not None:
        boolean("padding_mask", mask, (k.shape[0], k.shape[2]), k)


def boolean(name: str, mask: Tensor, expected: tuple[int, ...], like: Tensor) -> None:
    """A bool tensor of the ``expected`` shape on the device of ``like``."""
    typed(name, mask, torch.bool)
    shape(name, mask, expected)
    device(name, mask, like)


def typed(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise ``TypeError`` unless ``tensor`` has this ``dtype``."""
    kind(name, tensor, Tensor, "a tensor")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")


def memory_state(state: MemoryState | None, k: Tensor, v: Tensor, features: FeatureMap | None) -> None:
    """matrix ``[B, Hkv, F, V]``, norm ``[B, Hkv, F]``, count ``[B]``, for the keys and values at hand."""
    if state is None:
        return
    kind("state", state, MEMORIES, "a MemoryState")
    batch, heads, _, width = k.shape
    memory(state.matrix, state.norm, (batch, heads, feature_width(features, width), v.shape[3]), k)
    if state.count is not None:
        integers("state.count", state.count, batch, k)


def memory(matrix: Tensor, norm: Tensor, expected: tuple[int, int, int, int], like: Tensor) -> None:
    """A memory ``[B, Hkv, F, V]`` in float32 (or float64)."""
    for name, tensor, sizes in (("state.matrix", matrix, expected), ("state.norm", norm, expected[:3])):
        kind(name, tensor, Tensor, "a tensor")
        shape(name, tensor, sizes)
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float32 (states are never rounded), got {tensor.dtype}")
        device(name, tensor, like)


def integers(name: str, tensor: Tensor, batch: int, like: Tensor) -> None:
    """int64 ``[B]`` on the device of ``like``."""
    typed(name, tensor, torch.int64)
    shape(name, tensor, (batch,))
    device(name, tensor, like)


def infini_state(
    state: InfiniState | None,
    k: Tensor,
    v: Tensor,
    *,
    ring: int,
    has_memory: bool,
    features: FeatureMap | None,
) -> None:
    """A state of the same batch, heads, widths and ring as this call."""
    if state is None:
        return
    kind("state", state, InfiniState, "an InfiniState")
    batch, heads, _, width = k.shape
    parameter("state.keys", state.keys, (batch, heads, ring, width), k)
    parameter("state.values", state.values, (batch, heads, ring, v.shape[3]), k)
    integers("state.position", state.position, batch, k)
    for name, tensor in (("state.matrix", state.matrix), ("state.norm", state.norm)):
        require(
            (tensor is not None) == has_memory,
            name,
            "None" if tensor is None else "a tensor",
            "a tensor when beta is given and None when it is not",
        )
    if state.matrix is not None and state.norm is not None:
        memory(state.matrix, state.norm, (batch, heads, feature_width(features, width), v.shape[3]), k)


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast casts products on this type of ``device`` to; None where it is off, or there is none."""
    if not is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(*tensors: Tensor) -> tuple[AbstractContextManager[None], list[Tensor]]:
    """Inputs in autocast's dtype, and a context that keeps autocast away from the float32 state.

    What is no tensor is left to the checks that know its name.
    """
    device = next((each.device.type for each in tensors if isinstance(each, Tensor)), "meta")
    if not is_autocast_available(device):
        return nullcontext(), list(tensors)
    dtype = autocast_dtype(device)
    if dtype is not None:
        tensors = tuple(t.to(dtype) if getattr(t, "dtype", None) in CAST else t for t in tensors)
    return torch.autocast(device, enabled=False), list(tensors)
