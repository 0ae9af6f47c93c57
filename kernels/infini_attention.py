"""The Infini-attention layer, forward and backward, as a sequence of kernels."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from newllm.kernels.attention_backward_keys import key_gradients
from newllm.kernels.attention_backward_prepare import Prepared, prepare
from newllm.kernels.attention_backward_queries import query_gradients
from newllm.kernels.attention_backward_recall import recall_gradients
from newllm.kernels.attention_forward import attend
from newllm.kernels.attention_layout import Attention, Recall, Rope, learned
from newllm.kernels.attention_tiles import rows_contiguous
from newllm.kernels.common import memory_dtype
from newllm.kernels.memory import Correction, Outgoing, weight_gradient, write, write_backward
from newllm.kernels.memory_fold_backward import fold_backward
from newllm.kernels.memory_layout import Layout
from newllm.kernels.memory_scan import Chain
from newllm.kernels.rotate import measured_keys, rotated


class Call(Protocol):
    """What stays from call to call; ``reach`` is how many segments back gradients flow, None all."""

    window: int | None
    segment: int
    gate: str
    rule: str
    eps: float
    reach: int | None


class Inputs(NamedTuple):
    """q ``[B, H, T, K]``; k, v ``[B, HKV, P + T, ...]``, raw, with the P tokens before the first query."""

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

    @property
    def past(self) -> int:
        """P, how many tokens before the first query are given."""
        return self.k.shape[2] - self.q.shape[2]

    def attention(self, call: Call) -> Attention:
        """Which keys the queries see."""
        segmented = self.beta is not None or call.window is None
        return Attention(call.window, call.segment, self.position, self.length, segmented)

    def memory(self, call: Call) -> Layout:
        """Which tokens are written."""
        if self.position is None:
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
    layout = x.attention(call)
    if x.beta is None:
        return *attend(x.q, measured_keys(x.k, x.rope), x.v, layout, x.rope), None
    scale, bias = learned(x.scale, x.bias)
    written = write(
        *x.new(), x.memory(call), scale, bias, matrix=x.matrix, norm=x.norm, weight=x.weight,
        delta=_correction(call), states=memory_dtype(x.q.dtype),
    )  # fmt: skip
    recall = Recall(written.before, written.norms, _share(x.beta, call.gate), scale, bias, call.eps)
    return *attend(x.q, measured_keys(x.k, x.rope), x.v, layout, x.rope, recall), written


def backward(
    x: Inputs, call: Call, saved: Saved, do: Tensor, dmatrix: Tensor | None, dnorm: Tensor | None
) -> Slopes:
    """Gradients from those of the output and of the memory after the call."""
    layout = x.attention(call)
    q, k, v, do = (rows_contiguous(each) for each in (x.q, x.k, x.v, do))
    # Rotated queries lie where their gradient will be written: each tile is read last by its own program.
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    queries, keys = q if x.rope is None else dq, rotated(k, x.rope)
    if x.beta is None:
        ready = prepare(q, v, saved.out, do, layout, x.rope, None, dq)
        dk, dv = key_gradients(queries, keys, v, do, saved.lse, ready.delta, layout)
        rotated(dk, x.rope, dk, back=True)
        query_gradients(q, queries, keys, v, do, saved.lse, layout, x.rope, None, ready, dq)
        return Slopes(dq, dk, dv)
    scale, bias = learned(x.scale, x.bias)
    share = _share(x.beta, call.gate)
    recall = Recall(saved.before, saved.norms, share, scale, bias, call.eps)
    ready = prepare(q, v, saved.out, do, layout, x.rope, recall, dq)
    states, norms = recall_gradients(q, do, ready, layout, recall)
    # Weights that carry the window's share of the output; finite where it has none.
    local = (1 - share).clamp(min=torch.finfo(torch.float32).tiny)
    level = saved.lse - local.to(saved.lse.dtype).log2()[:, None]
    dk, dv = key_gradients(queries, keys, v, do, level, ready.delta, layout)
    rotated(dk, x.rope, dk, back=True)
    asked = query_gradients(q, queries, keys, v, do, level, layout, x.rope, recall, ready, dq)
    slopes = Slopes(dq, dk, dv, _gate_slope(share, call.gate, ready))
    return _through_memory(x, call, saved, Outgoing(states, norms, dmatrix, dnorm), asked, slopes)


def _through_memory(
    x: Inputs,
    call: Call,
    saved: Saved,
    outgoing: Outgoing,
    asked: Tensor | None,
    slopes: Slopes,
) -> Slopes:
    """``slopes`` with what reaches keys, values and the rest through the memory; adds to keys' and values'.

    ``outgoing`` are the gradients of the memory before each segment and after the call, ``asked [2, HKV]``
    is the queries' share of the gradients of scale and bias.
    """
    scale, bias = learned(x.scale, x.bias)
    layout, (k, v), delta = x.memory(call), x.new(), _correction(call)
    assert saved.before is not None
    gradients = write_backward(
        k, layout, saved.before.shape, outgoing, scale, bias,
        before=saved.before, norms=saved.norms, delta=delta, reach=call.reach, dtype=memory_dtype(k.dtype),
    )  # fmt: skip
    norms = None if delta is None else saved.norms
    told = fold_backward(
        k, v, gradients, layout, scale, bias,
        weight=x.weight, norms=norms, eps=call.eps, onto=(slopes.k, slopes.v),
    )  # fmt: skip
    dscale, dbias = told.scale, told.bias
    if asked is not None and dscale is not None and dbias is not None:
        dscale, dbias = dscale + asked[0], dbias + asked[1]
    return slopes._replace(
        matrix=gradients.initial_matrix,
        norm=gradients.initial_norm,
        scale=dscale,
        bias=dbias,
        weight=None if x.weight is None else weight_gradient(k, v, gradients, layout, scale, bias),
    )


def _correction(call: Call) -> Correction | None:
    return Correction(eps=call.eps) if call.rule == "delta" else None


def _share(beta: Tensor, gate: str) -> Tensor:
    """The memory's share of the output, ``[H]`` in float32."""
    return beta.float().sigmoid() if gate == "sigmoid" else beta.float().tanh()


def _gate_slope(share: Tensor, gate: str, ready: Prepared) -> Tensor:
    """The gradient of beta: A_mem - out is (1 - g) (A_mem - A_dot), so nothing is divided by 1 - g."""
    assert ready.answers is not None and ready.wholes is not None
    slope = share if gate == "sigmoid" else 1 + share
    return slope * (ready.answers - ready.wholes)
