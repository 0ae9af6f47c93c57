"""The fused attention kernels' contract: schema, fake and gradient, without Triton."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from newllm.ops.untraced import untraced
from newllm.reference.infini import streamed, touched_segments
from newllm.reference.layout import compaction, take
from newllm.reference.window import Rope, compact_rope
from newllm.types import FeatureMap, GateKind, InfiniState, Rule


class Call(NamedTuple):
    """The choices of a call, as the schema takes them; ``reach`` is None for gradients without a bound."""

    window: int | None
    segment: int
    gate: str
    rule: str
    eps: float
    reach: int | None


# Arguments of the operator before its choices, and how many of them there are.
TENSORS = (
    "q", "k", "v", "beta", "cos", "sin", "matrix", "norm", "position", "length", "scale", "bias", "weight",
)  # fmt: skip

# Those that have a gradient.
LEARNED = ("q", "k", "v", "beta", "matrix", "norm", "scale", "bias", "weight")


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    matrix: Tensor | None,
    norm: Tensor | None,
    position: Tensor | None,
    length: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,
    window: int | None,
    segment: int,
    gate: str,
    rule: str,
    eps: float,
    reach: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Window and memory: q ``[B, H, T, K]``, k and v ``[B, Hkv, P + T, ...]`` with P earlier tokens.

    Returns out ``[B, H, T, V]``, log2-sum-exp2 ``[B, H, T]`` (float64 for float32), the memory's matrix
    ``[B, Hkv, K, V]`` and norm ``[B, Hkv, K]`` after the tokens, and both before each segment; what a
    layer without memory (``beta`` None) lacks is empty.
    """
    import newllm.kernels.infini_attention as kernels

    inputs = _inputs(q, k, v, beta, cos, sin, matrix, norm, position, length, scale, bias, weight)
    with torch.cuda.device_of(q):
        out, lse, written = kernels.forward(inputs, Call(window, segment, gate, rule, eps, reach))
    if written is None:
        return out, lse, *(q.new_empty(0, dtype=torch.float32) for _ in range(4))
    assert written.before is not None
    return out, lse, written.matrix, written.norm, written.before, written.norms


attention = torch.library.custom_op("newllm::attention", _forward, mutates_args=())


def _inputs(*tensors: Tensor | None) -> Any:
    import newllm.kernels.infini_attention as kernels

    q, k, v, beta, cos, sin, *others = tensors
    return kernels.Inputs(q, k, v, beta, None if cos is None or sin is None else (cos, sin), *others)


@attention.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    given, call = dict(zip(TENSORS, inputs, strict=False)), Call(*inputs[len(TENSORS) :])
    q, v = given["q"], given["v"]
    (batch, heads, tokens, key), (kv_heads, value) = q.shape, (v.shape[1], v.shape[3])
    out = q.new_empty(batch, heads, tokens, value)
    lse = out.new_empty(
        batch, heads, tokens, dtype=torch.float64 if q.dtype == torch.float32 else torch.float32
    )
    none = out.new_empty(0, dtype=torch.float32)
    if given["beta"] is None:
        return out, lse, *(none.new_empty(0) for _ in range(4))
    segments = touched_segments(tokens, call.segment, given["position"] is not None)
    row = (batch, kv_heads)
    return (
        out,
        lse,
        none.new_empty(*row, key, value),
        none.new_empty(*row, key),
        none.new_empty(*row, segments, key, value, dtype=_product_dtype(q.dtype)),
        none.new_empty(*row, segments, key),
    )


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What memory matrices are kept in to be multiplied: float16 has too small a range for sums."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _backward(
    do: Tensor | None,
    dmatrix: Tensor | None,
    dnorm: Tensor | None,
    out: Tensor,
    lse: Tensor,
    states: Tensor,
    norms: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    matrix: Tensor | None,
    norm: Tensor | None,
    position: Tensor | None,
    length: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,
    window: int | None,
    segment: int,
    gate: str,
    rule: str,
    eps: float,
    reach: int | None,
    weighed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, matrix, norm, scale, bias and weight; empty where there is none.

    That of the weights takes another pass over keys and values, so it is made only where ``weighed`` asks.
    """
    import newllm.kernels.infini_attention as kernels

    inputs = _inputs(q, k, v, beta, cos, sin, matrix, norm, position, length, scale, bias, weight)
    saved = kernels.Saved(out, lse, *((None, None) if beta is None else (states, norms)))
    call = Call(window, segment, gate, rule, eps, reach)
    with torch.cuda.device_of(q):
        slopes = kernels.backward(
            inputs, call, saved, torch.zeros_like(out) if do is None else do, dmatrix, dnorm, weighed
        )
    primals = (q, k, v, beta, matrix, norm, scale, bias, weight)
    return tuple(
        out.new_empty(0) if x is None or slope is None else slope.to(x.dtype)
        for x, slope in zip(primals, slopes, strict=True)
    )  # type: ignore[return-value]


attention_backward = torch.library.custom_op("newllm::attention_backward", _backward, mutates_args=())


@attention_backward.register_fake
def _(
    do: Tensor | None,
    dmatrix: Tensor | None,
    dnorm: Tensor | None,
    out: Tensor,
    lse: Tensor,
    states: Tensor,
    norms: Tensor,
    *inputs: Any,
) -> tuple[Tensor, ...]:
    given, weighed = dict(zip(TENSORS, inputs, strict=False)), inputs[-1]
    primals = (given[name] if name != "weight" or weighed else None for name in LEARNED)
    return tuple(out.new_empty(0) if x is None else x.new_empty(x.shape) for x in primals)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    out, lse, _, _, states, norms = output
    ctx.save_for_backward(out, lse, states, norms, *inputs[: len(TENSORS)])
    ctx.choices = inputs[len(TENSORS) :]


def _differentiate(
    ctx: Any, *gradients: Tensor | None, backward: Callable[..., Any] = attention_backward
) -> tuple[Tensor | None, ...]:
    do, _, dmatrix, dnorm, *_ = gradients
    weighed = ctx.needs_input_grad[TENSORS.index("weight")]
    slopes = backward(do, dmatrix, dnorm, *ctx.saved_tensors, *ctx.choices, weighed)
    named = dict(zip(LEARNED, slopes, strict=True))
    wanted = zip(TENSORS, ctx.needs_input_grad, strict=False)
    given = [named[name] if needed and name in named else None for name, needed in wanted]
    return *given, *(None for _ in ctx.choices)


attention.register_autograd(_differentiate, setup_context=_save)


_called = untraced(attention, _forward, _save, partial(_differentiate, backward=_backward))


def infini_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    *,
    window: int | None,
    segment: int,
    gate: GateKind,
    rope: Rope | None,
    state: InfiniState | None,
    rule: Rule,
    feature: FeatureMap | None,
    eps: float,
    bptt_segments: int | None,
    segment_weight: Tensor | None,
    padding_mask: Tensor | None,
) -> tuple[Tensor, InfiniState]:
    """``newllm.reference.infini.infini_attention`` by the kernels."""
    matrix, norm, position = (
        (None, None, None) if state is None else (state.matrix, state.norm, state.position)
    )
    scale, bias = (None, None) if feature is None else (feature.scale, feature.bias)

    def layer(
        q: Tensor, keys: Tensor, values: Tensor, rope: Rope | None, length: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        cos, sin = rope or (None, None)
        tensors = (
            q,
            keys,
            values,
            beta,
            cos,
            sin,
            matrix,
            norm,
            position,
            length,
            scale,
            bias,
            segment_weight,
        )
        out, _, *memory = _called(*tensors, window, segment, gate, rule, eps, bptt_segments)
        return (out, None, None) if beta is None else (out, memory[0], memory[1])

    return streamed(layer, q, k, v, ring=window or segment, rope=rope, state=state, padding_mask=padding_mask)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    segment: int | None,
    rope: Rope | None,
    padding_mask: Tensor | None,
) -> Tensor:
    """``newllm.reference.window.window_attention`` by the kernels."""
    length = None
    if padding_mask is not None:
        order, rank, length = compaction(padding_mask)
        q, k, v, rope = *(take(x, order) for x in (q, k, v)), compact_rope(rope, order)
    cos, sin = rope or (None, None)
    absent = (None,) * 3
    out, *_ = _called(
        q,
        k,
        v,
        None,
        cos,
        sin,
        *absent,
        length,
        *absent,
        window,
        segment or 1,
        "sigmoid",
        "linear",
        0.0,
        None,
    )
    if padding_mask is None:
        return out
    return take(out, rank).masked_fill(~padding_mask[:, None, :, None], 0)
