"""What the softmax takes off the gradient, and the gradient of what queries recall from the memory."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from newllm.kernels.attention_layout import Attention, Recall
from newllm.kernels.attention_tiles import elements, load_clamped, load_state, row_facts, two_halves
from newllm.kernels.common import cast, dot, features, padded, precision
from newllm.kernels.tiles import attention_tiles


@triton.jit
def _infini_attention_backward_delta_kernel(
    out, do, delta, out_strides, do_strides, H, T, tiles,
    V: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = (program // tiles).to(tl.int64)
    b, h = head // H, head % H
    first = (program % tiles) * BT
    row = first + tl.arange(0, BT)
    value = tl.arange(0, BV)
    # [BT, BV]
    results = load_clamped(out, out_strides, b, h, first, T, value, V, BT, BV).to(tl.float32)
    gradient = load_clamped(do, do_strides, b, h, first, T, value, V, BT, BV).to(tl.float32)
    tl.store(delta + head * T + row, tl.sum(results * gradient, 1), mask=row < T)


@triton.jit
def _infini_attention_backward_recall_kernel(
    q, out, do, delta, pulls, shares, sums, states, norms, gate, scale, bias, dstates, dnorms,
    position, length,
    q_strides, out_strides, do_strides,
    H, HKV, T, S, N, tiles, eps,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = BV // BS
    program = tl.program_id(0)
    block = program % blocks
    state = (program // blocks).to(tl.int64)
    segment = (state % N).to(tl.int32)
    hkv, b = state // N % HKV, state // N // HKV
    group = H // HKV
    before, count, _ = row_facts(position, length, b, T, 0)
    border = (segment * S - before % S).to(tl.int32)
    begin, end = tl.maximum(border, 0), tl.minimum(border + S, count)
    a, o = 1.0, 0.0
    if scale is not None:
        a, o = tl.load(scale + hkv), tl.load(bias + hkv)
    element = elements(0, 1, K, BK)
    # [BK]
    z = tl.load(norms + state * K + element, mask=element < K, other=0.0)
    product: tl.constexpr = states.dtype.element_ty
    acc = tl.zeros((BK, BS), tl.float32)
    # Rows side by side: adding them up across warps is left for the end.
    acc_norm = tl.zeros((BT, BK), tl.float32)
    for step in tl.range(0, tiles * group):
        h = hkv * group + step // tiles
        first = begin + step % tiles * BT
        row = first + tl.arange(0, BT)
        real = row < end
        # [BT, BK]; features beyond K meet zeros, in the norm and in the matrix
        f = features(load_clamped(q, q_strides, b, h, first, T, element, K, BT, BK), a, o)
        weight = tl.maximum(tl.sum(f * z[None, :], 1), eps)
        answer = tl.zeros((BT,), tl.float32)
        whole = tl.zeros((BT,), tl.float32)
        own = tl.zeros((BT, BS), do.dtype.element_ty)
        for c0 in tl.static_range(0, BV, BS):
            value = c0 + tl.arange(0, BS)
            # [BT, BS]
            results = load_clamped(out, out_strides, b, h, first, T, value, V, BT, BV)
            gradient = load_clamped(do, do_strides, b, h, first, T, value, V, BT, BV)
            # [BK, BS]
            matrix = load_state(states, state, element, value, K, V, BK, BV)
            known = dot(cast(f, product), matrix, None, PRECISION)
            answer += tl.sum(known * gradient.to(tl.float32), 1)
            whole += tl.sum(results.to(tl.float32) * gradient.to(tl.float32), 1)
            if blocks == 1 or c0 == block * BS:
                own = gradient
        answer = tl.where(real, answer / weight, 0.0)
        g = tl.load(gate + h)
        share = tl.where(real, g / weight, 0.0)
        if block == 0:
            rows = (b * H + h) * T + row
            pull = tl.where(weight > eps, answer, 0.0)
            # A weight of zero meets it where g is one.
            tl.store(delta + rows, tl.where(g == 1, 0.0, (whole - g * answer) / (1 - g)), mask=real)
            tl.store(pulls + rows, pull, mask=real)
            tl.store(shares + rows, share, mask=real)
            place = sums + (((b * H + h) * N + segment) * tiles + step % tiles) * 2
            tl.store(place, tl.sum(answer))
            tl.store(place + 1, tl.sum(tl.where(real, whole, 0.0)))
            acc_norm += f * (share * pull)[:, None]
        acc = dot(cast(f * share[:, None], product).T, own.to(product), acc, PRECISION)
    value = block * BS + tl.arange(0, BS)
    pointers = dstates + state * K * V + element[:, None] * V + value[None, :]
    tl.store(pointers, acc, mask=(element < K)[:, None] & (value < V)[None, :])
    if block == 0:
        tl.store(dnorms + state * K + element, -tl.sum(acc_norm, 0), mask=element < K)


def delta_of(out: Tensor, do: Tensor) -> Tensor:
    """sum(do * out) ``[B, H, T]`` in float32."""
    batch, heads, tokens, width = out.shape
    delta = out.new_empty(batch, heads, tokens, dtype=torch.float32)
    tiles = triton.cdiv(tokens, 32)
    _infini_attention_backward_delta_kernel[(batch * heads * tiles,)](
        out,
        do,
        delta,
        out.stride()[:3],
        do.stride()[:3],
        heads,
        tokens,
        tiles,
        V=width,
        BV=padded(width),
        BT=32,
    )
    return delta


class Recalled(NamedTuple):
    """The gradient of what queries recall; all in float32.

    Per query, ``[B, H, T]``: ``delta`` = sum(do * A_dot), ``pull`` = sum(do * A_mem) where the denominator
    is not clamped, and ``share`` = g over the denominator. ``answers [H]`` and ``wholes [H]`` are the sums
    of do * A_mem and do * out. ``states [B, HKV, N, K, V]`` and ``norms [B, HKV, N, K]`` are the gradients
    of the memory before each segment.
    """

    delta: Tensor
    pull: Tensor
    share: Tensor
    wholes: Tensor
    answers: Tensor
    states: Tensor
    norms: Tensor


def recall_gradients(q: Tensor, out: Tensor, do: Tensor, layout: Attention, memory: Recall) -> Recalled:
    """Differentiate what queries q ``[B, H, T, K]`` recall; ``out`` and ``do`` are ``[B, H, T, V]``."""
    assert memory.states is not None and memory.norms is not None
    batch, heads, tokens, key_width = q.shape
    kv_heads, segments, value_width = memory.states.shape[1], memory.states.shape[2], out.shape[3]
    bk, bv = two_halves(key_width), padded(value_width)
    sizes = attention_tiles(
        "_infini_attention_backward_recall_kernel", q.device, max(bk, bv), q.element_size()
    )
    sizes = {**sizes, "BS": min(sizes["BS"], bv)}
    tiles = -(-min(layout.segment, tokens) // sizes["BT"])
    delta, pull, share = (q.new_empty(batch, heads, tokens, dtype=torch.float32) for _ in range(3))
    sums = q.new_empty(batch, heads, segments * tiles, 2, dtype=torch.float32)
    dstates = q.new_empty(memory.states.shape, dtype=torch.float32)
    dnorms = q.new_empty(memory.norms.shape, dtype=torch.float32)
    _infini_attention_backward_recall_kernel[(batch * kv_heads * segments * (bv // sizes["BS"]),)](
        q, out, do, delta, pull, share, sums, memory.states, memory.norms, memory.gate,
        memory.scale, memory.bias, dstates, dnorms, layout.position, layout.length,
        q.stride()[:3], out.stride()[:3], do.stride()[:3],
        heads, kv_heads, tokens, layout.segment, segments, tiles, memory.eps,
        K=key_width, V=value_width, BK=bk, BV=bv, PRECISION=precision(q.dtype),
        **sizes,
    )  # fmt: skip
    answers, wholes = sums.sum((0, 2)).unbind(1)
    return Recalled(delta, pull, share, wholes, answers, dstates, dnorms)
