"""The gradient of the memory that queries recall from: sums over a segment's queries."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from newllm.kernels.attention_backward_prepare import Prepared
from newllm.kernels.attention_layout import Attention, Recall
from newllm.kernels.attention_tiles import elements, load_clamped, row_facts, two_halves
from newllm.kernels.common import cast, dot, features, padded, product_types
from newllm.kernels.tiles import tiles_of


@triton.jit(do_not_specialize=["H", "HKV", "T", "S", "N", "tiles"])
def _infini_attention_backward_recall_kernel(
    q, do, pulls, shares, scale, bias, dstates, dnorms, position, length, q_strides, do_strides,
    H, HKV, T, S, N, tiles,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program sums BS columns of one state's gradient."""
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
    element, value = elements(0, 1, K, BK), block * BS + tl.arange(0, BS)
    acc = tl.zeros((BK, BS), tl.float32)
    # Rows side by side: adding them up across warps is left for the end.
    acc_norm = tl.zeros((BT, BK), tl.float32)
    for step in tl.range(0, tiles * group):
        h = hkv * group + step // tiles
        first = begin + step % tiles * BT
        row = first + tl.arange(0, BT)
        rows = (b * H + h) * T + row
        share = tl.load(shares + rows, mask=row < end, other=0.0)
        pull = tl.load(pulls + rows, mask=row < end, other=0.0)
        # [BT, BK]
        f = features(load_clamped(q, q_strides, b, h, first, T, element, K, BT, BK), a, o) * share[:, None]
        # [BT, BS]
        gradient = load_clamped(do, do_strides, b, h, first, T, value, V, BT, BV)
        acc_norm += f * pull[:, None]
        acc = dot(cast(f, DTYPE).T, gradient.to(DTYPE), acc, PRECISION)
    pointers = dstates + state * K * V + element[:, None] * V + value[None, :]
    tl.store(pointers, acc, mask=(element < K)[:, None] & (value < V)[None, :])
    if block == 0:
        tl.store(dnorms + state * K + element, -tl.sum(acc_norm, 0), mask=element < K)


def recall_gradients(
    q: Tensor, do: Tensor, prepared: Prepared, layout: Attention, memory: Recall
) -> tuple[Tensor, Tensor]:
    """Gradients of the memory before each segment: ``[B, HKV, N, K, V]`` and ``[B, HKV, N, K]``, float32.

    q is ``[B, H, T, K]``, raw; ``do`` is ``[B, H, T, V]``.
    """
    assert memory.states is not None and memory.norms is not None
    heads, tokens, key_width = q.shape[1:]
    batch, kv_heads, segments, _, value_width = memory.states.shape
    bk, bv = two_halves(key_width), padded(value_width)
    sizes = tiles_of("_infini_attention_backward_recall_kernel", q.device, max(bk, bv), q.element_size())
    sizes = {**sizes, "BS": min(sizes["BS"], bv)}
    dstates = q.new_empty(memory.states.shape, dtype=torch.float32)
    dnorms = q.new_empty(memory.norms.shape, dtype=torch.float32)
    _infini_attention_backward_recall_kernel[(batch * kv_heads * segments * (bv // sizes["BS"]),)](
        q, do, prepared.pull, prepared.share, memory.scale, memory.bias, dstates, dnorms,
        layout.position, layout.length, q.stride()[:3], do.stride()[:3],
        heads, kv_heads, tokens, layout.segment, segments,
        -(-min(layout.segment, tokens) // sizes["BT"]),
        K=key_width, V=value_width, BK=bk, BV=bv, **product_types(q.dtype), **sizes,
    )  # fmt: skip
    return dstates, dnorms
