"""The contract of a sliced layer: schema, fake and gradient; ranks talk inside it.

What waits for a neighbour's memory runs beside what does not: forwards the window's keys, and where it is a
step of its own the window's attention; backwards all of the window's gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from newllm.distributed.beside import beside
from newllm.distributed.line import Line, Messages
from newllm.distributed.memory import fold, unfold
from newllm.ops import slices_fused
from newllm.ops.untraced import untraced
from newllm.reference import slices as slices_reference
from newllm.reference.features import feature_width
from newllm.reference.memory import state_dtype
from newllm.reference.slices import Call, Slice
from newllm.types import FeatureMap

STEPS: dict[str, ModuleType] = {"reference": slices_reference, "fused": slices_fused}


class Given(NamedTuple):
    """The operator's arguments: q ``[B, H, T, K]``, k and v ``[B, Hkv, T, ...]`` of this rank's slice.

    ``matrix``, ``norm`` and the last W ``keys`` and ``values`` are of the tokens before the sequence, for the
    first rank.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    weight: Tensor | None
    matrix: Tensor | None
    norm: Tensor | None
    keys: Tensor | None
    values: Tensor | None
    window: int | None
    segment: int
    gate: str
    rule: str
    eps: float
    order: int | None
    steps: str
    group: str
    rank: int
    size: int

    @property
    def line(self) -> Line:
        """The ranks of the sequence."""
        return Line(self.group, self.rank, self.size)

    @property
    def call(self) -> Call:
        """The choices of the computation."""
        return Call(self.window, self.segment, self.gate, self.rule, self.eps, self.order)

    def slice(self, k: Tensor, v: Tensor) -> Slice:
        """The slice with these keys and values, its own alone or behind earlier ones."""
        rope = None if self.cos is None or self.sin is None else (self.cos, self.sin)
        return Slice(self.q, k, v, self.beta, rope, self.scale, self.bias, self.weight)


class Kept(NamedTuple):
    """What the backward pass needs of the forward one, empty where there is none.

    out ``[B, H, T, V]``, its log-sum-exp, keys and values behind the left neighbour's last W, and the memory
    before each segment.
    """

    out: Tensor
    lse: Tensor
    seen_k: Tensor
    seen_v: Tensor
    before: Tensor
    norms: Tensor


_KINDS = {
    Tensor: "Tensor", Tensor | None: "Tensor?", int: "SymInt", int | None: "SymInt?", float: "float",
    str: "str",
}  # fmt: skip


def _schema(kinds: type[Any]) -> str:
    return ", ".join(f"{_KINDS[kind]} {name}" for name, kind in get_type_hints(kinds).items())


# Arguments that are tensors, and those of them that have a gradient.
TENSORS = tuple(name for name, kind in get_type_hints(Given).items() if kind in (Tensor, Tensor | None))
LEARNED = ("q", "k", "v", "beta", "scale", "bias", "weight")


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    """The layer of ``Given`` over this rank's slice: what is ``Kept``, and the memory after the slice."""
    given = Given(*arguments)
    line, call, compute, (k, v) = given.line, given.call, STEPS[given.steps], (given.k, given.v)
    halo = folding = None
    if call.window:
        edge = _last(k, v, call.window)
        halo = line.shift(edge, edge, "keys and values")
    if given.beta is not None:
        own, before = given.slice(k, v), (given.matrix, given.norm) if line.first else (None, None)
        work = partial(fold, compute, line, own, call, compute.added(own, call), before)
        folding = beside(work, k.device, waits=not line.first)
    keys, values = (given.keys, given.values) if line.first else (None, None)
    if halo is not None and (came := halo.came()) is not None:
        keys, values = came[..., : k.shape[3]], came[..., k.shape[3] :]
    seen = [] if keys is None or values is None else [torch.cat(each, 2) for each in ((keys, k), (values, v))]
    x = given.slice(*(seen or (k, v)))
    near = compute.near(x, call)
    memory, sent = (None, []) if folding is None else folding()
    out, lse = compute.read(x, call, near, *((None, None) if memory is None else memory[:2]))
    _finish([*sent, halo] if halo else sent)
    nothing = given.q.new_empty(0)
    kept = memory or [nothing.new_empty(0, dtype=state_dtype(nothing.dtype)) for _ in range(4)]
    seen = seen or [nothing, nothing.clone()]
    return out.contiguous(), lse, *seen, *(x.contiguous() for x in kept)


sequence_attention = torch.library.custom_op(
    "newllm::sequence_attention",
    _forward,
    mutates_args=(),
    schema=f"({_schema(Given)}) -> ({', '.join(['Tensor'] * 8)})",
)


@sequence_attention.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    given = Given(*arguments)
    (batch, heads, tokens, width), (kv_heads, columns) = given.q.shape, (given.v.shape[1], given.v.shape[3])
    fused, state = given.steps == "fused", state_dtype(given.q.dtype)
    out = given.q.new_empty(batch, heads, tokens, columns)
    level = torch.float64 if given.q.dtype == torch.float32 else torch.float32
    lse = out.new_empty(out.shape[:3], dtype=level) if fused else out.new_empty(0)
    past = _past(given)
    seen = [
        x.new_empty(batch, kv_heads, past + tokens, x.shape[3]) if past else x.new_empty(0)
        for x in (given.k, given.v)
    ]
    if given.beta is None:
        return out, lse, *seen, *(out.new_empty(0, dtype=state) for _ in range(4))
    features = feature_width(_feature(given.order), width)
    products = torch.bfloat16 if fused and given.q.dtype == torch.bfloat16 else state
    row, count = (batch, kv_heads), tokens // given.segment
    return (
        out,
        lse,
        *seen,
        out.new_empty(*row, count, features, columns, dtype=products),
        out.new_empty(*row, count, features, dtype=state),
        out.new_empty(*row, features, columns, dtype=state),
        out.new_empty(*row, features, dtype=state),
    )


def _backward(
    do: Tensor | None, dmatrix: Tensor | None, dnorm: Tensor | None, *arguments: Any
) -> list[Tensor]:
    """Gradients of what is LEARNED of ``Given``, behind what was ``Kept``; empty where there is none."""
    kept, given = _split(arguments)
    line, call, compute, (k, v) = given.line, given.call, STEPS[given.steps], (given.k, given.v)
    x = given.slice(*((kept.seen_k, kept.seen_v) if kept.seen_k.numel() else (k, v)))
    memory = (None, None) if given.beta is None else (kept.before, kept.norms)
    do = torch.zeros_like(kept.out) if do is None else do
    begun = compute.begin_backward(x, call, kept.out, kept.lse, *memory, do)
    unfolding = None
    if given.beta is not None:
        work = partial(unfold, compute, line, x, call, kept.before, kept.norms, begun, (dmatrix, dnorm))
        unfolding = beside(work, k.device, waits=not line.last)
    found = compute.finish_backward(x, call, begun)
    slopes, halo = found.slopes, None
    if call.window:
        edge = torch.cat([y[:, :, : x.past] for y in (slopes.k, slopes.v)], -1) if x.past else None
        halo = line.shift(edge, _last(k, v, call.window), "gradients of keys and values", back=True)
    if unfolding is not None:
        told = unfolding()
        slopes = compute.added_backward(x, call, kept.norms, told.matrix, told.norm, told.rest, found)
        _finish(told.sent)
    dk, dv = slopes.k.contiguous(), slopes.v.contiguous()
    came = halo.wait() if halo else None
    if came is not None:
        dk[:, :, -came.shape[2] :] += came[..., : k.shape[3]]
        dv[:, :, -came.shape[2] :] += came[..., k.shape[3] :]
    # Views: to move what lies behind the halo to the front would cost as much as a rotation.
    slopes = slopes._replace(q=slopes.q.contiguous(), k=dk[:, :, x.past :], v=dv[:, :, x.past :])
    pairs = [(getattr(slopes, name), getattr(given, name)) for name in LEARNED]
    return [do.new_empty(0) if a is None or b is None else a.to(b.dtype) for a, b in pairs]


sequence_attention_backward = torch.library.custom_op(
    "newllm::sequence_attention_backward", _backward, mutates_args=(),
    schema=f"(Tensor? do, Tensor? dmatrix, Tensor? dnorm, {_schema(Kept)}, {_schema(Given)}) -> Tensor[]",
)  # fmt: skip


@sequence_attention_backward.register_fake
def _(do: Tensor | None, dmatrix: Tensor | None, dnorm: Tensor | None, *arguments: Any) -> list[Tensor]:
    kept, given = _split(arguments)
    tokens = given.q.shape[2]
    whole = (kept.seen_k, kept.seen_v) if kept.seen_k.ndim == 4 else (given.k, given.v)
    dk, dv = (y.new_empty(y.shape)[:, :, y.shape[2] - tokens :] for y in whole)
    rest = (getattr(given, name) for name in LEARNED[3:])
    empty = given.q.new_empty
    return [empty(given.q.shape), dk, dv, *(empty(0) if y is None else y.new_empty(y.shape) for y in rest)]


def _split(arguments: tuple[Any, ...]) -> tuple[Kept, Given]:
    return Kept(*arguments[: len(Kept._fields)]), Given(*arguments[len(Kept._fields) :])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[: len(Kept._fields)], *inputs[: len(TENSORS)])
    ctx.choices = inputs[len(TENSORS) :]


def _differentiate(
    ctx: Any, *gradients: Tensor | None, backward: Callable[..., Any] = sequence_attention_backward
) -> tuple[Tensor | None, ...]:
    do, *_, dmatrix, dnorm = gradients
    slopes = backward(do, dmatrix, dnorm, *ctx.saved_tensors, *ctx.choices)
    named = dict(zip(LEARNED, slopes, strict=True))
    wanted = zip(TENSORS, ctx.needs_input_grad, strict=False)
    given = [named[name] if needed and name in named else None for name, needed in wanted]
    return *given, *(None for _ in ctx.choices)


sequence_attention.register_autograd(_differentiate, setup_context=_save)
# What a rank's layer calls.
attend = untraced(sequence_attention, _forward, _save, partial(_differentiate, backward=_backward))


def _last(k: Tensor, v: Tensor, window: int) -> Tensor:
    """The keys and values that the right neighbour sees, as one message ``[B, Hkv, W, K + V]``."""
    return torch.cat([y[:, :, -window:] for y in (k, v)], -1)


def _past(given: Given) -> int:
    """Earlier keys that this rank sees: the left neighbour's last, or on the first rank those given."""
    return 0 if given.window is None or (given.rank == 0 and given.keys is None) else given.window


def _finish(sent: list[Messages]) -> None:
    for messages in sent:
        messages.wait()


def _feature(order: int | None) -> FeatureMap | None:
    return None if order is None else FeatureMap("dpfp", order=order)
