"""One sequence over the ranks of a device mesh's dimension: each holds a slice of every layer's tokens.

Ranks exchange two things a layer: the last W keys and values with the right neighbour, and the memory, which
is folded from left to right. Neither depends on how long the sequence is. Backwards the gradients of both go
from right to left.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from newllm import backend as backends
from newllm.distributed import layer
from newllm.distributed.line import Line, line_of
from newllm.ops import checks
from newllm.ops.infini import check_layer
from newllm.ops.memory import weights
from newllm.ops.support import unsupported
from newllm.reference.features import feature_width
from newllm.reference.layout import ring_append, ring_history, ring_start
from newllm.types import FeatureMap, GateKind, InfiniState, Rule

Mesh = DeviceMesh | dist.ProcessGroup | Line
RULES = ("linear", "delta")


class Traffic(NamedTuple):
    """Bytes that a rank sends to a neighbour in one layer, whatever the length of the sequence."""

    halo: int
    memory: int

    @property
    def forward(self) -> int:
        """To the right, in the forward pass; as many to the left in the backward pass."""
        return self.halo + self.memory


def traffic(
    batch: int,
    kv_heads: int,
    key: int,
    value: int,
    *,
    window: int | None,
    dtype: torch.dtype,
    memory: bool = True,
    feature: FeatureMap | None = None,
) -> Traffic:
    """B Hkv W (K + V) numbers of ``dtype`` and B Hkv F (V + 1) of the state's, float32."""
    features = feature_width(feature, key)
    state = torch.promote_types(dtype, torch.float32).itemsize
    return Traffic(
        batch * kv_heads * (window or 0) * (key + value) * dtype.itemsize,
        batch * kv_heads * features * (value + 1) * state if memory else 0,
    )


def slice_bounds(tokens: int, ranks: int, *, segment: int, window: int | None) -> list[tuple[int, int]]:
    """First token of each rank's slice and the one behind its last; as even as whole segments allow.

    Raises:
        ValueError: for tokens that are no multiple of the segment, or too few for so many ranks.
    """
    checks.require(ranks >= 1, "ranks", ranks, "at least 1")
    checks.require(tokens % segment == 0, "tokens", tokens, "a multiple of segment ({})", segment)
    count = tokens // segment
    borders = [rank * count // ranks * segment for rank in range(ranks + 1)]
    least = least_slice(segment, window, ranks)
    shortest = min(b - a for a, b in pairwise(borders))
    checks.require(
        shortest >= least, "tokens", tokens,
        "enough for slices of at least {} tokens (the window, in whole segments) on each of {} ranks",
        least, ranks,
    )  # fmt: skip
    return list(pairwise(borders))


def least_slice(segment: int, window: int | None, ranks: int) -> int:
    """Tokens of the shortest slice: a window's keys come from one neighbour."""
    return segment if ranks == 1 or window is None else -(-window // segment) * segment


def sequence_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    *,
    mesh: Mesh,
    window: int | None,
    segment: int,
    gate: GateKind = "sigmoid",
    rope: tuple[Tensor, Tensor] | None = None,
    state: InfiniState | None = None,
    start: int | None = None,
    rule: Rule = "linear",
    feature: FeatureMap | None = None,
    eps: float = 1e-6,
    segment_weight: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, InfiniState]:
    """``newllm.ops.infini_attention`` over a sequence whose slices lie on the ranks of ``mesh``, in order.

    Equal to one process: to rounding for the delta rule; for the linear rule, given equal q, k and v, memory
    and output have the same bits for any number of ranks. All ranks call it, and all call backward. Each rank
    sends what :func:`traffic` says.

    Args:
        q: this rank's slice ``[B, H, T, K]``; T is a multiple of ``segment``, at least ``window`` where there
            are several ranks, and may differ from rank to rank. k: ``[B, Hkv, T, K]``. v: ``[B, Hkv, T, V]``.
        beta, window, segment, gate, eps: see ``newllm.ops.infini_attention``.
        mesh: one dimension of a device mesh, or a process group.
        rope: (cos, sin) ``[N, K]`` or ``[B, N, K]``, N >= T + ``window``; the last T rows are the slice's,
            the rows before to the tokens before it, whether or not there are any.
        state: the stream before the sequence, at a segment border and at least a window long; the first rank
            begins with it. It gets no gradient.
        start: tokens of the sequence before this slice (None: all slices are as long as this one).
        rule: ``linear`` or ``delta``.
        feature: feature map of the memory.
        segment_weight: ``[B, T / segment]`` factors of what this slice's segments add (linear rule).
        backend: ``reference`` or ``fused``; None chooses.

    Returns:
        This slice's output ``[B, H, T, V]``, and the state after it; on the last rank the stream's.

    Raises:
        TypeError: for a wrong dtype or mesh. ValueError: for a wrong size or choice.
        RuntimeError: where a neighbour does not answer within the process group's timeout.
    """
    line = mesh if isinstance(mesh, Line) else line_of(mesh)
    context, (q, k, v) = checks.without_autocast(q, k, v)
    check_layer(q, k, v, beta, None, window, segment, gate, None, rule, feature)
    checks.choice("rule", rule, RULES)
    _check_slice(line, k, window, segment)
    _check_rope(rope, k, window)
    _check_state(state, k, v, window, segment, beta is not None, feature)
    weights(segment_weight, rule, k.shape[2] // segment, k)
    reason = unsupported(q.dtype, q.shape[3], v.shape[3], feature=feature)
    chosen = backends.resolve("infini_attention", q.device, backend, reason)
    order, scale, bias = (None, None, None) if feature is None else (feature.order, *feature[1:3])
    cos, sin = rope or (None, None)
    with context:
        out, *_, matrix, norm = layer.attend(
            q, k, v, beta, cos, sin, scale, bias, segment_weight, *_before(state, window),
            window, segment, gate, rule, eps, order, chosen, *line,
        )  # fmt: skip
    begin = line.rank * k.shape[2] if start is None else start
    keys, values, position = _stream_after(k, v, window or segment, begin, state)
    if beta is None:
        matrix = norm = None
    return out, InfiniState(matrix, norm, keys, values, position)


def _before(state: InfiniState | None, window: int | None) -> tuple[Tensor | None, ...]:
    """Matrix, norm, and the last W keys and values, oldest first, of the stream before the sequence."""
    if state is None:
        return (None,) * 4
    if window is None:
        return state.matrix, state.norm, None, None
    past = (ring_history(ring, state.position, window) for ring in (state.keys, state.values))
    return state.matrix, state.norm, *past


def _stream_after(
    k: Tensor, v: Tensor, ring: int, begin: int, state: InfiniState | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The rings of keys and values after this slice, and the position there."""
    tokens = k.shape[2]
    if state is None:
        position = torch.full((len(k),), begin + tokens, device=k.device)
        return ring_start(k, ring, begin), ring_start(v, ring, begin), position
    position = state.position + begin
    keys, values = ring_append(((state.keys, k), (state.values, v)), position, tokens)
    return keys, values, position + tokens


def _check_slice(line: Line, k: Tensor, window: int | None, segment: int) -> None:
    tokens, least = k.shape[2], least_slice(segment, window, line.size)
    checks.require(
        tokens % segment == 0, f"the slice of rank {line.rank}", f"{tokens} tokens",
        "a multiple of segment ({}) long", segment,
    )  # fmt: skip
    checks.require(
        tokens >= least, f"the slice of rank {line.rank}", f"{tokens} tokens",
        "at least {} tokens long (the window, in whole segments) where there are several ranks", least,
    )  # fmt: skip


def _check_rope(rope: tuple[Tensor, Tensor] | None, k: Tensor, window: int | None) -> None:
    checks.rope(rope, k, window or 0)


def _check_state(
    state: InfiniState | None, k: Tensor, v: Tensor, window: int | None, segment: int, has_memory: bool,
    feature: FeatureMap | None,
) -> None:  # fmt: skip
    if state is None:
        return
    checks.infini_state(state, k, v, ring=window or segment, has_memory=has_memory, features=feature)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in state):
        raise ValueError("state must be detached: over several ranks it gets no gradient")
    fits = (state.position % segment == 0) & (state.position >= (window or 0))
    checks.require(
        bool(fits.all()), "state.position", state.position.tolist(),
        "at a border of segments ({}) and at least a window ({}) along", segment, window or 0,
    )  # fmt: skip
