"""The contract of a sliced layer: schema, fake and gradient; ranks talk inside it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from newllm.distributed.line import Line, Messages
from newllm.distributed.memory import fold, unfold
from newllm.ops import slices_fused
from newllm.reference import slices as slices_reference
from newllm.reference.features import feature_width
from newllm.reference.memory import state_dtype
from newllm.reference.slices import Call, Slice
from newllm.types import FeatureMap

STEPS: dict[str, ModuleType] = {"reference": slices_reference, "fused": slices_fused}
# Arguments of the operator before its choices, and those of them that have a gradient.
TENSORS = (
    "q", "k", "v", "beta", "cos", "sin", "scale", "bias", "weight", "matrix", "norm", "keys", "values",
)  # fmt: skip
LEARNED = ("q", "k", "v", "beta", "scale", "bias", "weight")


@torch.library.custom_op("newllm::sequence_attention", mutates_args=())
def sequence_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,
    matrix: Tensor | None,
    norm: Tensor | None,
    keys: Tensor | None,
    values: Tensor | None,
    window: int | None,
    segment: int,
    gate: str,
    rule: str,
    eps: float,
    order: int | None,
    steps: str,
    group: str,
    rank: int,
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The layer over this rank's slice: q ``[B, H, T, K]``, k and v ``[B, Hkv, T, ...]``.

    ``matrix``, ``norm`` and the last W ``keys`` and ``values`` are of the tokens before the sequence, for the
    first rank. Returns out ``[B, H, T, V]``, its log-sum-exp, keys and values behind the left neighbour's
    last W (empty where there are none), the memory before each segment, and after the slice.
    """
    line, call = Line(group, rank, size), Call(window, segment, gate, rule, eps, order)
    compute, memory = STEPS[steps], None
    # On its way while the memory is folded.
    halo = line.shift(_last(k, v, window), _last(k, v, window), "keys and values") if window else None
    x = Slice(q, k, v, beta, _rope(cos, sin), scale, bias, weight)
    sent: list[Messages] = []
    if beta is not None:
        memory, sent = fold(compute, line, x, call, (matrix, norm) if line.first else (None, None))
    came = halo.wait() if halo else None
    if came is not None:
        keys, values = came[..., : k.shape[3]], came[..., k.shape[3] :]
    elif not line.first:
        keys = values = None
    x, seen_k, seen_v = _behind(x, keys, values)
    out, lse = compute.read(x, call, *((None, None) if memory is None else memory[:2]))
    for messages in sent:
        messages.wait()
    kept = memory or [q.new_empty(0, dtype=state_dtype(q.dtype)) for _ in range(4)]
    return out.contiguous(), lse, seen_k, seen_v, *(x.contiguous() for x in kept)


@sequence_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,
    matrix: Tensor | None,
    norm: Tensor | None,
    keys: Tensor | None,
    values: Tensor | None,
    window: int | None,
    segment: int,
    gate: str,
    rule: str,
    eps: float,
    order: int | None,
    steps: str,
    group: str,
    rank: int,
    size: int,
) -> tuple[Tensor, ...]:
    (batch, heads, tokens, width), (kv_heads, columns) = q.shape, (v.shape[1], v.shape[3])
    fused, state = steps == "fused", state_dtype(q.dtype)
    out = q.new_empty(batch, heads, tokens, columns)
    level = torch.float64 if q.dtype == torch.float32 else torch.float32
    lse = out.new_empty(out.shape[:3], dtype=level) if fused else out.new_empty(0)
    past = _past(window, rank, keys)
    seen = [
        x.new_empty(batch, kv_heads, past + tokens, x.shape[3]) if past else x.new_empty(0) for x in (k, v)
    ]
    if beta is None:
        return out, lse, *seen, *(out.new_empty(0, dtype=state) for _ in range(4))
    features = feature_width(_feature(order), width)
    products = torch.bfloat16 if fused and q.dtype == torch.bfloat16 else state
    row, count = (batch, kv_heads), tokens // segment
    return (
        out,
        lse,
        *seen,
        out.new_empty(*row, count, features, columns, dtype=products),
        out.new_empty(*row, count, features, dtype=state),
        out.new_empty(*row, features, columns, dtype=state),
        out.new_empty(*row, features, dtype=state),
    )


@torch.library.custom_op("newllm::sequence_attention_backward", mutates_args=())
def sequence_attention_backward(
    do: Tensor | None,
    dmatrix: Tensor | None,
    dnorm: Tensor | None,
    out: Tensor,
    lse: Tensor,
    seen_k: Tensor,
    seen_v: Tensor,
    before: Tensor,
    norms: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,
    window: int | None,
    segment: int,
    gate: str,
    rule: str,
    eps: float,
    order: int | None,
    steps: str,
    group: str,
    rank: int,
    size: int,
) -> list[Tensor]:
    """Gradients of q, k, v, beta, scale, bias and weight; empty where there is none."""
    line, call = Line(group, rank, size), Call(window, segment, gate, rule, eps, order)
    compute = STEPS[steps]
    keys, values = (seen_k, seen_v) if seen_k.numel() else (k, v)
    x = Slice(q, keys, values, beta, _rope(cos, sin), scale, bias, weight)
    memory = (None, None) if beta is None else (before, norms)
    do = torch.zeros_like(out) if do is None else do
    found = compute.read_backward(x, call, out, lse, *memory, do)
    halo = None
    if window:
        edge = (
            torch.cat([y[:, :, : x.past] for y in (found.slopes.k, found.slopes.v)], -1) if x.past else None
        )
        halo = line.shift(edge, _last(k, v, window), "gradients of keys and values", back=True)
    slopes, sent = found.slopes, []
    if beta is not None:
        told = unfold(compute, line, x, call, before, norms, found, (dmatrix, dnorm))
        slopes = compute.added_backward(x, call, norms, told.matrix, told.norm, told.rest, found)
        sent = told.sent
    dk, dv = slopes.k.contiguous(), slopes.v.contiguous()
    came = halo.wait() if halo else None
    if came is not None:
        dk[:, :, -came.shape[2] :] += came[..., : k.shape[3]]
        dv[:, :, -came.shape[2] :] += came[..., k.shape[3] :]
    for messages in sent:
        messages.wait()
    # Views: to move what lies behind the halo to the front would cost as much as a rotation.
    slopes = slopes._replace(q=slopes.q.contiguous(), k=dk[:, :, x.past :], v=dv[:, :, x.past :])
    given = zip(
        (getattr(slopes, name) for name in LEARNED), (q, k, v, beta, scale, bias, weight), strict=True
    )
    return [q.new_empty(0) if a is None or b is None else a.to(b.dtype) for a, b in given]


@sequence_attention_backward.register_fake
def _(
    do: Tensor | None,
    dmatrix: Tensor | None,
    dnorm: Tensor | None,
    out: Tensor,
    lse: Tensor,
    seen_k: Tensor,
    seen_v: Tensor,
    before: Tensor,
    norms: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,
    *choices: Any,
) -> list[Tensor]:
    tokens = q.shape[2]
    whole = (seen_k, seen_v) if seen_k.ndim == 4 else (k, v)
    dk, dv = (y.new_empty(y.shape)[:, :, y.shape[2] - tokens :] for y in whole)
    rest = (q.new_empty(0) if y is None else y.new_empty(y.shape) for y in (beta, scale, bias, weight))
    return [q.new_empty(q.shape), dk, dv, *rest]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    *tensors, _, _, _, _ = inputs[: len(TENSORS)]
    ctx.save_for_backward(*output[:6], *tensors)
    ctx.choices = inputs[len(TENSORS) :]


def _differentiate(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    do, *_, dmatrix, dnorm = gradients
    slopes = sequence_attention_backward(do, dmatrix, dnorm, *ctx.saved_tensors, *ctx.choices)
    named = dict(zip(LEARNED, slopes, strict=True))
    wanted = zip(TENSORS, ctx.needs_input_grad, strict=False)
    given = [named[name] if needed and name in named else None for name, needed in wanted]
    return *given, *(None for _ in ctx.choices)


sequence_attention.register_autograd(_differentiate, setup_context=_save)


def _last(k: Tensor, v: Tensor, window: int) -> Tensor:
    """The keys and values that the right neighbour sees, as one message ``[B, Hkv, W, K + V]``."""
    return torch.cat([y[:, :, -window:] for y in (k, v)], -1)


def _past(window: int | None, rank: int, keys: Tensor | None) -> int:
    """Earlier keys that this rank sees: the left neighbour's last, or on the first rank those given."""
    return 0 if window is None or (rank == 0 and keys is None) else window


def _behind(x: Slice, keys: Tensor | None, values: Tensor | None) -> tuple[Slice, Tensor, Tensor]:
    """The slice behind earlier keys and values, and its keys and values where they are new tensors."""
    if keys is None or values is None:
        return x, x.q.new_empty(0), x.q.new_empty(0)
    seen = torch.cat([keys, x.k], 2), torch.cat([values, x.v], 2)
    return x._replace(k=seen[0], v=seen[1]), *seen


def _rope(cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if cos is None or sin is None else (cos, sin)


def _feature(order: int | None) -> FeatureMap | None:
    return None if order is None else FeatureMap("dpfp", order=order)
