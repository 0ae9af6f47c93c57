"""The Infini-attention layer, forward and backward, as a sequence of kernels."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from newllm.kernels.attention_backward_keys import key_gradients
from newllm.kernels.attention_backward_prepare import Prepared, prepare
from newllm.kernels.attention_backward_queries import query_gradients
from newllm.kernels.attention_backward_recall import recall_gradients
from newllm.kernels.attention_backward_slopes import cancelled
from newllm.kernels.attention_forward import attend
from newllm.kernels.attention_layout import Attention, Recall, Rope, learned
from newllm.kernels.attention_tiles import rows_contiguous
from newllm.kernels.common import memory_dtype
from newllm.kernels.memory import Outgoing, correction, weight_gradient, write, write_backward
from newllm.kernels.memory_fold_backward import Gradients, fold_backward
from newllm.kernels.memory_layout import Layout
from newllm.kernels.memory_scan import Chain
from newllm.kernels.rotate import Keys, measured_keys, rotated


class Call(Protocol):
    """What stays from call to call; ``reach`` is how many segments back gradients flow, None all."""

    window: int | None
    segment: int
    gate: str
    rule: str
    eps: float
    reach: int | None


class Inputs(NamedTuple):
    """q ``[B, H, T, K]``; k, v ``[B, HKV, P + T, ...]``, raw, with the P tokens before the first query.

    ``aligned`` rows begin at a segment border, whatever their position: no earlier token is written then.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    rope: Rope | None
    matrix: Tensor | None
    norm: Tensor | None
    position: Tensor | None
    length: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    weight: Tensor | None
    aligned: bool = False

    @property
    def past(self) -> int:
        """P, how many tokens before the first query are given."""
        return self.k.shape[2] - self.q.shape[2]

    def attention(self, call: Call) -> Attention:
        """Which keys the queries see."""
        segmented = self.beta is not None or call.window is None
        return Attention(call.window, call.segment, self.position, self.length, segmented, self.aligned)

    def memory(self, call: Call) -> Layout:
        """Which tokens are written."""
        if self.position is None or self.aligned:
            return Layout(call.segment, length=self.length)
        past_k, past_v = self.k[:, :, : self.past], self.v[:, :, : self.past]
        return Layout(call.segment, self.position, self.length, past_k, past_v)

    def new(self) -> tuple[Tensor, Tensor]:
        """Keys and values of this call's own tokens."""
        return self.k[:, :, self.past :], self.v[:, :, self.past :]


class Saved(NamedTuple):
    """What the backward pass needs of the forward one; a layer without memory has only the first two."""

    out: Tensor
    lse: Tensor
    before: Tensor | None
    norms: Tensor | None


class Slopes(NamedTuple):
    """Gradients of the inputs; None where there is no input or no gradient."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None = None
    matrix: Tensor | None = None
    norm: Tensor | None = None
    scale: Tensor | None = None
    bias: Tensor | None = None
    weight: Tensor | None = None


def forward(x: Inputs, call: Call) -> tuple[Tensor, Tensor, Chain | None]:
    """One layer over T new tokens: the output, its log-sum-exp and what the memory became."""
    if x.beta is None:
        return *read(x, call, measured_keys(x.k, x.rope), None, None), None
    scale, bias = learned(x.scale, x.bias)
    written = write(
        *x.new(), x.memory(call), scale, bias, matrix=x.matrix, norm=x.norm, weight=x.weight,
        delta=correction(call.rule, call.eps), states=memory_dtype(x.q.dtype),
    )  # fmt: skip
    return *read(x, call, measured_keys(x.k, x.rope), written.before, written.norms), written


def read(
    x: Inputs, call: Call, keys: Keys, before: Tensor | None, norms: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Window and memory: the output and its log-sum-exp, from rotated keys and memories before segments."""
    recall = _recall(x, call, before, norms)
    return attend(x.q, keys, x.v, x.attention(call), x.rope, recall)


def _recall(x: Inputs, call: Call, before: Tensor | None, norms: Tensor | None) -> Recall | None:
    if x.beta is None:
        return None
    return Recall(before, norms, _share(x.beta, call.gate), *learned(x.scale, x.bias), call.eps)


class Begun(NamedTuple):
    """A backward pass when what reaches the memories is known, and the window's part is to be done.

    Inputs as the kernels take them, ``dq`` with the rotated queries until it holds their gradient, and the
    gradients of the memory ``before`` each segment and of its ``norms``, None without memory.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    dq: Tensor
    recall: Recall | None
    ready: Prepared
    before: Tensor | None
    norms: Tensor | None


class ReadSlopes(NamedTuple):
    """Gradients of what was read; ``asked [2, HKV]`` is the queries' share of scale's and bias's."""

    inputs: Slopes
    asked: Tensor | None


def backward(
    x: Inputs,
    call: Call,
    saved: Saved,
    do: Tensor,
    dmatrix: Tensor | None,
    dnorm: Tensor | None,
    weighed: bool,
) -> Slopes:
    """Gradients from those of the output and of the memory after the call; of the weights if ``weighed``."""
    begun = begin_backward(x, call, saved, do)
    found = finish_backward(x, call, saved, begun)
    if x.beta is None:
        return found.inputs
    assert saved.before is not None
    k, delta = x.new()[0], correction(call.rule, call.eps)
    gradients = write_backward(
        k, x.memory(call), saved.before.shape, Outgoing(begun.before, begun.norms, dmatrix, dnorm),
        *learned(x.scale, x.bias), before=saved.before, norms=saved.norms, delta=delta, reach=call.reach,
        dtype=memory_dtype(k.dtype),
    )  # fmt: skip
    return through_memory(x, call, None if delta is None else saved.norms, gradients, found, weighed)


def begin_backward(x: Inputs, call: Call, saved: Saved, do: Tensor) -> Begun:
    """Gradients of the memories that were read, from that of the output."""
    q, k, v, do = (rows_contiguous(each) for each in (x.q, x.k, x.v, do))
    # Rotated queries lie where their gradient will be written: each tile is read last by its own program.
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    layout, recall = x.attention(call), _recall(x, call, saved.before, saved.norms)
    ready = prepare(q, v, saved.out, do, layout, x.rope, recall, dq)
    states, norms = (None, None) if recall is None else recall_gradients(q, do, ready, layout, recall)
    return Begun(q, k, v, do, dq, recall, ready, states, norms)


def finish_backward(x: Inputs, call: Call, saved: Saved, begun: Begun) -> ReadSlopes:
    """Gradients of queries, keys, values and gate through the window and what was read."""
    q, k, v, do, dq, recall, ready = begun[:7]
    layout, level = x.attention(call), saved.lse
    queries, keys = q if x.rope is None else dq, rotated(k, x.rope)
    if q.dtype == torch.float32:
        gate = None if recall is None else recall.gate
        ready = cancelled(queries, keys, v, do, level, layout, gate, ready)
    if recall is not None:
        # Weights that carry the window's share of the output; finite where it has none.
        local = (1 - recall.gate).clamp(min=torch.finfo(torch.float32).tiny)
        level = level - local.to(level.dtype).log2()[:, None]
    dk, dv = key_gradients(queries, keys, v, do, level, ready.delta, layout)
    rotated(dk, x.rope, dk, back=True)
    asked = query_gradients(q, queries, keys, v, do, level, layout, x.rope, recall, ready, dq)
    dbeta = None if recall is None else _gate_slope(recall.gate, call.gate, ready)
    return ReadSlopes(Slopes(dq, dk, dv, dbeta), asked)


def through_memory(
    x: Inputs, call: Call, norms: Tensor | None, gradients: Gradients, found: ReadSlopes, weighed: bool
) -> Slopes:
    """``found`` with what reaches keys, values and the rest through the memory; adds to keys' and values'.

    ``gradients`` are those of the memory after each segment, ``norms`` stood before it (None: linear rule).
    """
    scale, bias = learned(x.scale, x.bias)
    layout, (k, v), slopes = x.memory(call), x.new(), found.inputs
    told = fold_backward(
        k, v, gradients, layout, scale, bias,
        weight=x.weight, norms=norms, eps=call.eps, novel=call.rule == "gamma", onto=(slopes.k, slopes.v),
    )  # fmt: skip
    dscale, dbias = told.scale, told.bias
    if found.asked is not None and dscale is not None and dbias is not None:
        dscale, dbias = dscale + found.asked[0], dbias + found.asked[1]
    return slopes._replace(
        matrix=gradients.initial_matrix,
        norm=gradients.initial_norm,
        scale=dscale,
        bias=dbias,
        weight=weight_gradient(k, v, gradients, layout, scale, bias) if weighed else None,
    )


def _share(beta: Tensor, gate: str) -> Tensor:
    """The memory's share of the output, ``[H]`` in float32."""
    return beta.float().sigmoid() if gate == "sigmoid" else beta.float().tanh()


def _gate_slope(share: Tensor, gate: str, ready: Prepared) -> Tensor:
    """The gradient of beta: A_mem - out is (1 - g) (A_mem - A_dot), so nothing is divided by 1 - g."""
    assert ready.gates is not None
    return (share if gate == "sigmoid" else 1 + share) * ready.gates
