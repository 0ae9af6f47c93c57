"""One rank's slice of a layer, in steps: what it adds to the memory, the chain of segments, what it reads.

Between the steps the memory comes from the rank before and goes to the rank behind. A slice starts at a
segment border, is a multiple of the segment long, and has the window's W earlier keys before it (P = W), or
none (P = 0) where the sequence begins. Each segment is computed alone, so that its numbers do not depend on
how the sequence was sliced. ``newllm.ops.slices_fused`` has the same steps as kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from newllm.reference.features import feature_map
from newllm.reference.infini import gate_value, mix, recall
from newllm.reference.memory import state_dtype, write_segments
from newllm.reference.window import Rope, local_attention
from newllm.types import FeatureMap, MemoryState


class Call(NamedTuple):
    """The choices of a call; ``order`` is that of dpfp features, None for elu1."""

    window: int | None
    segment: int
    gate: str
    rule: str
    eps: float
    order: int | None


class Slice(NamedTuple):
    """q ``[B, H, T, K]``; k, v ``[B, Hkv, P + T, ...]``, raw, with the P tokens before the first query.

    ``beta [H]`` (None: no memory), tables ``[P + T, K]`` or ``[B, P + T, K]``, the feature map's ``scale``
    and ``bias`` ``[Hkv]``, ``weight [B, N]`` of what segments add.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    rope: Rope | None
    scale: Tensor | None
    bias: Tensor | None
    weight: Tensor | None

    @property
    def past(self) -> int:
        """P, how many tokens before the first query are given."""
        return self.k.shape[2] - self.q.shape[2]

    def new(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the slice's own tokens."""
        return self.k[:, :, self.past :], self.v[:, :, self.past :]


class Slopes(NamedTuple):
    """Gradients of a slice's tensors; None where there is no tensor or none yet."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None = None
    scale: Tensor | None = None
    bias: Tensor | None = None
    weight: Tensor | None = None


class Begun(NamedTuple):
    """Gradients of matrix and norm before each segment, None without memory, and what goes on."""

    matrix: Tensor | None
    norm: Tensor | None
    rest: Any


class Read(NamedTuple):
    """Gradients of what was read, and what :func:`added_backward` needs of it."""

    slopes: Slopes
    rest: Any = None


def added(x: Slice, call: Call) -> tuple[Tensor, Tensor]:
    """What each segment adds: matrix ``[B, Hkv, N, F, V]``, norm ``[B, Hkv, N, F]``."""
    return _added(*x.new(), x.scale, x.bias, call)


def _added(
    k: Tensor, v: Tensor, scale: Tensor | None, bias: Tensor | None, call: Call
) -> tuple[Tensor, Tensor]:
    k, v = (y.to(state_dtype(k.dtype)).unflatten(2, (-1, call.segment)) for y in (k, v))
    segments = write_segments(k, v, None, _feature(scale, bias, call))
    return segments.features.mT @ segments.values, segments.features.sum(-2)


def _feature(scale: Tensor | None, bias: Tensor | None, call: Call) -> FeatureMap:
    return FeatureMap(scale=scale, bias=bias) if call.order is None else FeatureMap("dpfp", order=call.order)


class Chain(NamedTuple):
    """Before each segment ``[B, Hkv, N, F, V]`` and ``[B, Hkv, N, F]``, after the last without N.

    Backwards, the gradients of the memory after each segment, and of the one before the first.
    """

    before: Tensor
    norms: Tensor
    matrix: Tensor
    norm: Tensor


def chain(
    x: Slice,
    matrix: Tensor,
    norm: Tensor,
    start: Tensor | None,
    start_norm: Tensor | None,
    *,
    reverse: bool = False,
) -> Chain:
    """The linear rule: ``matrix`` and ``norm`` of all segments added from left to right to the starts.

    ``reverse`` goes from right to left, over the gradients of the memory before each segment, and then no
    weight counts.
    """
    weight = None if reverse else x.weight
    before, last = _sums(matrix, start, weight, reverse)
    norms, last_norm = _sums(norm, start_norm, weight, reverse)
    return Chain(before, norms, last, last_norm)


def norm_chain(norm: Tensor, start: Tensor | None, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """:func:`chain` of norms alone."""
    return _sums(norm, start, None, reverse)


def _sums(steps: Tensor, start: Tensor | None, weight: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    total = torch.zeros_like(steps[:, :, 0]) if start is None else start
    sums = []
    for index in range(steps.shape[2])[:: -1 if reverse else 1]:
        sums.append(total)
        step = steps[:, :, index]
        if weight is not None:
            step = step * weight[:, index].to(step.dtype).view(-1, *[1] * (step.ndim - 1))
        total = total + step
    return torch.stack(sums[:: -1 if reverse else 1], 2), total


def corrections(x: Slice, call: Call, norms: Tensor) -> Tensor:
    """The delta rule's A' of ``M <- M - A' M + added``, ``[B, Hkv, N, F, F]``; symmetric."""
    return _corrections(x.new()[0], x.scale, x.bias, norms, call)


def _corrections(k: Tensor, scale: Tensor | None, bias: Tensor | None, norms: Tensor, call: Call) -> Tensor:
    features = feature_map(
        k.to(state_dtype(k.dtype)).unflatten(2, (-1, call.segment)), _feature(scale, bias, call)
    )
    weight = (features @ norms[..., None]).clamp(min=call.eps)
    return (features / weight).mT @ features


def delta_chain(
    x: Slice, corrections: Tensor, steps: Tensor | None, start: Tensor | None, *, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """``M <- M - A' M + step`` from segment to segment: M before each, and the last.

    ``corrections [B, Hkv, N, F, F]`` are A', ``steps [B, Hkv, N, F, V]`` None for no steps, ``start`` None
    for zeros; one of the two is given.
    """
    if start is None:
        assert steps is not None
        start = torch.zeros_like(steps[:, :, 0])
    total = start
    states = []
    for index in range(corrections.shape[2])[:: -1 if reverse else 1]:
        states.append(total)
        total = total - corrections[:, :, index] @ total
        if steps is not None:
            total = total + steps[:, :, index]
    return torch.stack(states[:: -1 if reverse else 1], 2), total


def near(x: Slice, call: Call) -> Tensor:
    """The window's attention ``[B, H, T, V]``: what can be done before the memory is there."""
    return _windows(x.q, x.k, x.v, x.rope, call)


def read(
    x: Slice, call: Call, near: Tensor, matrix: Tensor | None, norm: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The window's attention and the memory's: the output ``[B, H, T, V]``; nothing else need be kept."""
    out = near
    if x.beta is not None and matrix is not None and norm is not None:
        recalled = _recalled(x.q, x.scale, x.bias, matrix, norm, call)
        out = mix(near, recalled, x.beta, call.gate)  # type: ignore[arg-type]
    return out, x.q.new_empty(0)


def _recalled(
    q: Tensor, scale: Tensor | None, bias: Tensor | None, matrix: Tensor, norm: Tensor, call: Call
) -> Tensor:
    wide, feature = q.to(state_dtype(q.dtype)), _feature(scale, bias, call)
    return recall(wide, MemoryState(matrix, norm), None, call.segment, feature, call.eps)


def _mixed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    recalled: Tensor | None,
    rope: Rope | None,
    call: Call,
) -> Tensor:
    local = _windows(q, k, v, rope, call)
    if beta is None or recalled is None:
        return local
    return mix(local, recalled, beta, call.gate)  # type: ignore[arg-type]


def _windows(q: Tensor, k: Tensor, v: Tensor, rope: Rope | None, call: Call) -> Tensor:
    """The window's attention, one row for each segment behind W keys, hidden where there are none."""
    batch, segment = len(q), call.segment
    reach = 0 if call.window is None else call.window
    past = k.shape[2] - q.shape[2]
    count = q.shape[2] // segment
    keys, values = (_rows(F.pad(y, (0, 0, reach - past, 0)), reach, segment) for y in (k, v))
    if rope is not None:
        cos, sin = (
            table[..., table.shape[-2] - k.shape[2] :, :].expand(batch, -1, -1)[:, None] for table in rope
        )
        tables = [_rows(F.pad(y, (0, 0, reach - past, 0)), reach, segment)[:, 0] for y in (cos, sin)]
        rope = tables[0], tables[1]
    position = torch.arange(count, device=q.device) * segment + past
    out = local_attention(
        _rows(q, 0, segment), keys, values,
        window=call.window, segment=segment, rope=rope, position=position.repeat(batch),
    )  # fmt: skip
    return out.unflatten(0, (batch, count)).transpose(1, 2).flatten(2, 3)


def _rows(x: Tensor, before: int, segment: int) -> Tensor:
    """``x [B, H, before + N segment, D]`` as rows ``[B N, H, before + segment, D]`` that overlap."""
    return x.unfold(2, before + segment, segment).permute(0, 2, 1, 4, 3).flatten(0, 1)


def begin_backward(
    x: Slice, call: Call, out: Tensor, lse: Tensor, matrix: Tensor | None, norm: Tensor | None, do: Tensor
) -> Begun:
    """Gradients of the memories that :func:`read` read; they need nothing of the window."""
    if x.beta is None or matrix is None or norm is None:
        return Begun(None, None, (do, None, {}))
    names, primals = ("q", "scale", "bias", "matrix", "norm"), (x.q, x.scale, x.bias, matrix, norm)
    share = gate_value(x.beta.to(matrix.dtype), call.gate)[:, None, None]  # type: ignore[arg-type]
    recalled, found = _pull(partial(_recalled, call=call), names, primals, share * do.to(matrix.dtype))
    return Begun(found.pop("matrix"), found.pop("norm"), (do, recalled, found))


def finish_backward(x: Slice, call: Call, begun: Begun) -> Read:
    """Gradients of all else that :func:`read` read."""
    do, recalled, found = begun.rest
    mixed = partial(_mixed, recalled=recalled, rope=x.rope, call=call)
    slopes = _pull(mixed, ("q", "k", "v", "beta"), x[:4], do)[1]
    if recalled is not None:
        slopes["q"] = slopes["q"] + found.pop("q")
    return Read(Slopes(**slopes, **found))


def norm_slopes(
    x: Slice, call: Call, matrix: Tensor, norm: Tensor, after: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradients of the norms through the delta rule, and what else :func:`added_backward` needs.

    ``matrix`` and ``norm`` stood before each segment, ``after`` is the gradient of the matrix after it.
    """
    _, found = _pull(
        partial(_corrections, call=call), ("k", "scale", "bias", "norm"),
        (x.new()[0], x.scale, x.bias, norm), -(after @ matrix.mT),
    )  # fmt: skip
    return found.pop("norm"), found


def added_backward(
    x: Slice, call: Call, norm: Tensor, after: Tensor, after_norm: Tensor, rest: Any, found: Read
) -> Slopes:
    """``found`` with what reaches the slice through what its segments added.

    ``after`` and ``after_norm`` are the gradients of the memory after each segment.
    """
    scaled, weighed = (after, after_norm), None
    if x.weight is not None:
        matrix, norms = added(x, call)
        weighed = ((matrix * after).sum((1, 3, 4)) + (norms * after_norm).sum((1, 3))).to(x.weight.dtype)
        share = x.weight.to(after.dtype)[:, None, :, None]
        scaled = after * share[..., None], after_norm * share
    _, told = _pull(
        partial(_added, call=call), ("k", "v", "scale", "bias"), (*x.new(), x.scale, x.bias), scaled
    )
    slopes: dict[str, Any] = found.slopes._asdict() | {"weight": weighed}
    for part in (told, rest or {}):
        for name, slope in part.items():
            if name in ("k", "v"):
                slope = F.pad(slope, (0, 0, x.past, 0))
            slopes[name] = slope if slopes[name] is None else slopes[name] + slope
    return Slopes(**slopes)


def _pull(
    function: Callable[..., Any], names: tuple[str, ...], primals: tuple[Tensor | None, ...], cotangent: Any
) -> tuple[Any, dict[str, Tensor]]:
    """What the function returns, and gradients of the ``primals`` that are there, by name."""
    given = [index for index, primal in enumerate(primals) if primal is not None]

    def of_given(*values: Tensor) -> Any:
        whole: list[Tensor | None] = [None] * len(primals)
        for index, value in zip(given, values, strict=True):
            whole[index] = value
        return function(*whole)

    value, pull = torch.func.vjp(of_given, *(primals[index] for index in given))  # type: ignore[misc] # of has_aux
    return value, {names[index]: slope for index, slope in zip(given, pull(cotangent), strict=True)}
