"""One token of the Infini layer: window, memory, gate and fold in two kernels at fixed addresses.

The first kernel has a program for every BT slots of a ring and one for every BM columns of a memory. The
former put the new token into the ring and attend to their slots; the latter retrieve and, after the token
that completes a segment, write that segment into their columns. The second kernel combines the splits,
mixes in what was recalled and does what no program of the first may do while others still read: it
replaces the norm and moves the position. No atomics: the same state gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from newllm.kernels.attention_tiles import softmax_weights
from newllm.kernels.common import (
    LOG2E,
    dot,
    exponential,
    features,
    novelty,
    padded,
    quotient,
    wait_for_previous_kernel,
)
from newllm.kernels.tiles import dependent_launch, tiles_of

# Most of a split's keys or values: more would not fit the registers.
TILE_BYTES = 16384


@triton.jit
def _rotated(left, right, cos, sin, mask, HALF: tl.constexpr):
    """Both halves of each row, turned by the rows of the tables that ``cos`` and ``sin`` point to."""
    left, right = left.to(tl.float32), right.to(tl.float32)
    turned = left * tl.load(cos, mask=mask, other=0) - right * tl.load(sin, mask=mask, other=0)
    other = right * tl.load(cos + HALF, mask=mask, other=0) + left * tl.load(sin + HALF, mask=mask, other=0)
    return turned, other


@triton.jit
def _attend(
    q, k, v, keys, values, cos, sin, partial, lse, position, part,
    q_h, keys_r, values_r, cos_n, sin_n, rope_rows,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, SPLITS: tl.constexpr,
    LOCAL: tl.constexpr, ROPE: tl.constexpr, PRECISION: tl.constexpr,
    BG: tl.constexpr, BH: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """The queries of a group over the slots of one split, the new token among them."""
    HALF: tl.constexpr = (K + 1) // 2
    dtype = q.dtype.element_ty
    token, head = tl.arange(0, BT), tl.arange(0, BG)
    half, column = tl.arange(0, BH), tl.arange(0, BV)
    slot = part * BT + token
    stored, real = slot < R, (head < G)[:, None]
    left, right, wide = half < HALF, half < K - HALF, column < V
    first = part.to(tl.int64) * BT
    key = keys + first * keys_r + token[:, None] * keys_r + half[None, :]
    value = values + first * values_r + token[:, None] * values_r + column[None, :]
    # All that does not depend on the position is asked for before the position is looked at.
    # [BT, BH]
    k_left = tl.load(key, mask=stored[:, None] & left[None, :], other=0)
    k_right = tl.load(key + HALF, mask=stored[:, None] & right[None, :], other=0)
    # [BT, BV]
    v_tile = tl.load(value, mask=stored[:, None] & wide[None, :], other=0)
    # [BG, BH]
    query = q + head[:, None] * q_h + half[None, :]
    q_left = tl.load(query, mask=real & left[None, :], other=0)
    q_right = tl.load(query + HALF, mask=real & right[None, :], other=0)
    if ROPE:
        last = (rope_rows - 1).to(tl.int64)
        q_left, q_right = _rotated(
            q_left, q_right, cos + last * cos_n + half[None, :], sin + last * sin_n + half[None, :],
            left[None, :], HALF,
        )  # fmt: skip
    # [BH]
    new_left = tl.load(k + half, mask=left, other=0).to(keys.dtype.element_ty)
    new_right = tl.load(k + HALF + half, mask=right, other=0).to(keys.dtype.element_ty)
    # [BV]
    new_value = tl.load(v + column, mask=wide, other=0).to(values.dtype.element_ty)

    newest = (position % R).to(tl.int32)
    age = newest - slot
    age = tl.where(age < 0, age + R, age)
    limit = newest if LOCAL else tl.minimum(position, R - 1).to(tl.int32)
    visible = (stored & (age <= limit))[:, None]
    is_new = (slot == newest)[:, None]
    k_left = tl.where(is_new, new_left[None, :], k_left)
    k_right = tl.where(is_new, new_right[None, :], k_right)
    v_tile = tl.where(is_new, new_value[None, :], v_tile)
    if ROPE:
        row = last - age.to(tl.int64)[:, None]
        k_left, k_right = _rotated(
            k_left, k_right, cos + row * cos_n + half[None, :], sin + row * sin_n + half[None, :],
            visible & left[None, :], HALF,
        )  # fmt: skip
    # The many keys are the rows of the products, the few queries the columns. [BT, BG]
    scores = dot(k_left.to(dtype), tl.trans(q_left.to(dtype)), None, PRECISION)
    scores = dot(k_right.to(dtype), tl.trans(q_right.to(dtype)), scores, PRECISION)
    scores = tl.where(visible, scores, float("-inf"))
    FACTOR: tl.constexpr = K**-0.5 * LOG2E
    PRECISE: tl.constexpr = lse.dtype.element_ty == tl.float64
    # Finite also without a visible key, so that the weights are zero and not NaN.
    peak = tl.maximum(tl.max(scores, 0).to(lse.dtype.element_ty) * FACTOR, -1e30)
    weight = softmax_weights(scores, FACTOR, peak[None, :], PRECISE)
    total = tl.sum(weight, 0)
    some = tl.where(total > 0, total, 1.0)
    # [BV, BG]
    mean = dot(tl.trans(v_tile.to(dtype)), weight.to(dtype), None, PRECISION)
    mean = quotient(mean, some[None, :], PRECISE)
    out = head * SPLITS + part
    tl.store(partial + out[None, :] * V + column[:, None], mean, mask=(head < G)[None, :] & wide[:, None])
    tl.store(lse + out, peak + tl.log2(some.to(lse.dtype.element_ty)), mask=head < G)

    # The split that owns the slot stores the new token.
    own = newest // BT == part
    key = keys + newest.to(tl.int64) * keys_r + half
    tl.store(key, new_left, mask=half < tl.where(own, HALF, 0))
    tl.store(key + HALF, new_right, mask=half < tl.where(own, K - HALF, 0))
    tl.store(values + newest.to(tl.int64) * values_r + column, new_value, mask=column < tl.where(own, V, 0))


@triton.jit
def _remember(
    q, k, v, keys, values, matrix, norm, feature_scale, feature_bias, recalled, after, position, block,
    q_h, keys_r, values_r, matrix_k, eps,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    DELTA: tl.constexpr, NOVEL: tl.constexpr, PRECISION: tl.constexpr,
    BG: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """What a group recalls from BM columns of its memory, and a finished segment written into them."""
    dtype = q.dtype.element_ty
    head, row = tl.arange(0, BG), tl.arange(0, BK)
    column = block * BM + tl.arange(0, BM)
    real, deep, wide = (head < G)[:, None], row < K, column < V
    cells = matrix + row[:, None] * matrix_k + column[None, :]
    # [BG, BK]
    query = tl.load(q + head[:, None] * q_h + row[None, :], mask=real & deep[None, :], other=0)
    scale = 1.0 if feature_scale is None else tl.load(feature_scale).to(tl.float32)
    bias = 0.0 if feature_bias is None else tl.load(feature_bias).to(tl.float32)
    # The norm once for each query, which spares an exchange between threads. [BG, BK]
    size = tl.load(norm + head[:, None] * 0 + row[None, :], mask=real & deep[None, :], other=0)
    # [BK, BM]
    memory = tl.load(cells, mask=deep[:, None] & wide[None, :], other=0)
    # Beyond K the features are not zero, but matrix and norm are.
    wanted = features(query, scale, bias)
    found = dot(wanted, memory, None, PRECISION)
    found = quotient(found, tl.maximum(tl.sum(wanted * size, 1), eps)[:, None], dtype == tl.float32)
    tl.store(recalled + head[:, None] * V + column[None, :], found, mask=real & wide[None, :])

    # The norm goes elsewhere first: the programs of other columns may still have to read it.
    first = row < tl.where(block == 0, K, 0)
    if (position + 1) % S == 0:
        newest = (position % R).to(tl.int32)
        # [BK]
        new_key = tl.load(k + row, mask=deep, other=0).to(keys.dtype.element_ty)
        # [BM]
        new_value = tl.load(v + column, mask=wide, other=0).to(values.dtype.element_ty)
        # Loaded again, so that a token that completes nothing need not have it in the layout of this sum.
        memory = tl.load(cells, mask=deep[:, None] & wide[None, :], other=0)
        # [BK]
        total = tl.load(norm + row, mask=deep, other=0)
        change = tl.zeros([BK, BM], tl.float32)
        added = tl.zeros([BK], tl.float32)
        for start in range(0, S, BS):
            # Oldest first; the newest is taken from the call, for its slot may not have been written yet.
            age = S - 1 - start - tl.arange(0, BS)
            slot = newest - age
            slot = tl.where(slot < 0, slot + R, slot).to(tl.int64)[:, None]
            stored, is_new = (age > 0)[:, None], (age == 0)[:, None]
            # [BS, BK]
            key = tl.load(keys + slot * keys_r + row[None, :], mask=stored & deep[None, :], other=0)
            feature = features(tl.where(is_new, new_key[None, :], key), scale, bias)
            feature = tl.where((age >= 0)[:, None], feature, 0.0)
            # [BS, BM]
            value = tl.load(values + slot * values_r + column[None, :], mask=stored & wide[None, :], other=0)
            value = tl.where(is_new, new_value[None, :], value).to(tl.float32)
            if DELTA:
                weight = tl.maximum(tl.sum(feature * total[None, :], 1), eps)
                value -= dot(feature, memory, None, PRECISION) / weight[:, None]
            change = dot(tl.trans(feature.to(dtype)), value.to(dtype), change, PRECISION)
            if NOVEL:
                feature *= novelty(feature, total, eps, K, BK)[:, None]
            added += tl.sum(feature, 0)
        tl.store(cells, memory + change, mask=deep[:, None] & wide[None, :])
        tl.store(after + row, total + added, mask=first)
    else:
        tl.store(after + row, tl.load(norm + row, mask=first), mask=first)


@triton.jit
def _rest(
    partial, lse, recalled, part,
    G: tl.constexpr, V: tl.constexpr, SPLITS: tl.constexpr,
    BG: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Zeros of a paused row, which the second kernel reads before it knows."""
    head, column, block = tl.arange(0, BG)[:, None], tl.arange(0, BV)[None, :], tl.arange(0, BM)[None, :]
    if part < SPLITS:
        row = head * SPLITS + part
        tl.store(lse + row, tl.zeros([BG, 1], lse.dtype.element_ty), mask=head < G)
        tl.store(partial + row * V + column, tl.zeros([BG, BV], tl.float32), mask=(head < G) & (column < V))
    elif recalled is not None:
        block += (part - SPLITS) * BM
        tl.store(recalled + head * V + block, tl.zeros([BG, BM], tl.float32), mask=(head < G) & (block < V))


@triton.jit
def _infini_decode_split_kernel(
    q, k, v, keys, values, matrix, norm, position, active, cos, sin, feature_scale, feature_bias,
    partial, lse, recalled, after,
    q_b, q_h, k_b, k_h, v_b, v_h, keys_b, keys_h, keys_r, values_b, values_h, values_r,
    matrix_b, matrix_h, matrix_k, norm_b, norm_h, position_b, active_b, cos_b, cos_n, sin_b, sin_n,
    HKV, rope_rows, eps,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    SPLITS: tl.constexpr, LOCAL: tl.constexpr, DELTA: tl.constexpr, NOVEL: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
    BG: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BT: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """A program for each split and each block of memory columns of each row and key/value head."""
    PARTS: tl.constexpr = SPLITS if matrix is None else SPLITS + (V + BM - 1) // BM
    wait_for_previous_kernel(PDL)
    # Divided in int32, where it is quicker: no grid has more programs than that.
    part, group = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS
    b, h, group = (group // HKV).to(tl.int64), (group % HKV).to(tl.int64), group.to(tl.int64)
    if active is not None:
        live = tl.load(active + b * active_b)
        if not live:
            _rest(
                partial + group * (G * SPLITS * V), lse + group * (G * SPLITS),
                None if recalled is None else recalled + group * (G * V), part,
                G, V, SPLITS, BG, BV, BM,
            )  # fmt: skip
            return
    count = tl.load(position + b * position_b)
    q += b * q_b + h * G * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    keys += b * keys_b + h * keys_h
    values += b * values_b + h * values_h
    if part < SPLITS:
        ROPE: tl.constexpr = cos is not None
        if ROPE:
            cos += b * cos_b
            sin += b * sin_b
        _attend(
            q, k, v, keys, values, cos, sin,
            partial + group * (G * SPLITS * V), lse + group * (G * SPLITS), count, part,
            q_h, keys_r, values_r, cos_n, sin_n, rope_rows,
            G, K, V, R, SPLITS, LOCAL, ROPE, PRECISION, BG, BH, BV, BT,
        )  # fmt: skip
    else:
        if matrix is not None:
            _remember(
                q, k, v, keys, values, matrix + b * matrix_b + h * matrix_h, norm + b * norm_b + h * norm_h,
                None if feature_scale is None else feature_scale + h,
                None if feature_bias is None else feature_bias + h,
                recalled + group * (G * V), after + group * K, count, part - SPLITS,
                q_h, keys_r, values_r, matrix_k, eps,
                G, K, V, R, S, DELTA, NOVEL, PRECISION, BG, BK, BM, BS,
            )  # fmt: skip


@triton.jit
def _gate(beta, TANH: tl.constexpr, PRECISE: tl.constexpr):
    """How much of what is recalled enters the output."""
    # Beyond it float32 knows 0 and 1 alone, and a power's correction would be infinity times zero.
    beta = tl.clamp(beta, -87.0, 87.0, propagate_nan=tl.PropagateNan.ALL)
    if TANH:
        # The quotient cancels near zero, where the series is as exact as float32 is.
        square, decay = beta * beta, exponential(-2 * tl.abs(beta), PRECISE)
        series = beta * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * 62 / 2835))))
        far = quotient(1 - decay, 1 + decay, PRECISE)
        gate = tl.where(square < 0.0625, series, tl.where(beta < 0, -far, far))
    else:
        gate = quotient(1.0, 1 + exponential(-beta, PRECISE), PRECISE)
    return gate


@triton.jit
def _infini_decode_combine_kernel(
    partial, lse, recalled, after, beta, norm, position, active, out,
    norm_b, norm_h, position_b, active_b, H,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SPLITS: tl.constexpr, TANH: tl.constexpr,
    PDL: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A program for each row and query head."""
    wait_for_previous_kernel(PDL)
    b, h = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    row = b * H + h
    live = tl.load(active + b * active_b) != 0 if active is not None else row >= 0
    column = tl.arange(0, BV)
    wide = column < V
    # One program a row moves the position, which no other of this kernel reads.
    first = live & (h == 0)
    count = tl.load(position + b * position_b, mask=first)
    PRECISE: tl.constexpr = lse.dtype.element_ty == tl.float64
    if beta is not None:
        # [BV]
        found = tl.load(recalled + row * V + column, mask=wide, other=0)
        share = _gate(tl.load(beta + h).to(tl.float32), TANH, PRECISE)
        deep = tl.arange(0, BK)
        mask = deep < tl.where(live & (h % G == 0), K, 0)
        # [BK]
        size = tl.load(after + row // G * K + deep, mask=mask, other=0)
    peak, total = tl.full([1], -1e30, lse.dtype.element_ty), tl.zeros([1], tl.float32)
    mixed = tl.zeros([BV], tl.float32)
    # A paused row's zeros are read and thrown away: loads without a mask run side by side.
    for start in range(0, SPLITS, BN):
        split = start + tl.arange(0, BN)
        there = split < SPLITS
        # [BN]
        level = tl.load(lse + row * SPLITS + split, mask=there, other=float("-inf"))
        # [BN, BV]
        mean = partial + (row * SPLITS + split[:, None]) * V + column[None, :]
        mean = tl.load(mean, mask=there[:, None] & wide[None, :], other=0)
        higher = tl.maximum(peak, tl.max(level, 0))
        weight = softmax_weights(level, 1.0, higher, PRECISE)
        decay = softmax_weights(peak, 1.0, higher, PRECISE)
        mixed = mixed * decay + tl.sum(mean * weight[:, None], 0)
        total = total * decay + tl.sum(weight, 0)
        peak = higher
    mixed = quotient(mixed, tl.where(total > 0, total, 1.0), PRECISE)
    if beta is not None:
        mixed += share * (found - mixed)
        tl.store(norm + b * norm_b + h // G * norm_h + deep, size, mask=mask)
    tl.store(out + row * V + column, tl.where(live, mixed, 0.0).to(out.dtype.element_ty), mask=column < V)
    tl.store(position + b * position_b, count + 1, mask=first)


def infini_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    matrix: Tensor | None,
    norm: Tensor | None,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    feature_scale: Tensor | None,
    feature_bias: Tensor | None,
    active: Tensor | None,
    *,
    local: bool,
    segment: int,
    tanh: bool,
    rule: str,
    eps: float,
) -> Tensor:
    """One token ``[B, H, 1, K]``, ``[B, HKV, 1, K]``, ``[B, HKV, 1, V]`` a row -> ``[B, H, 1, V]``.

    Writes into ``matrix``, ``norm``, ``keys``, ``values`` and ``position``, whose rows must be contiguous.
    ``local`` sees the keys of the open segment only. ``cos`` and ``sin`` ``[N, K]`` or ``[B, N, K]``, the
    last row the new token's.
    """
    (batch, heads, _, key), (kv_heads, ring), value = q.shape, keys.shape[1:3], v.shape[3]
    group, dtype = heads // kv_heads, torch.float32
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    cos, sin = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (cos, sin))
    vectors = (beta, feature_scale, feature_bias)
    beta, feature_scale, feature_bias = (x if x is None else x.contiguous() for x in vectors)
    width = max(padded(key), padded(value))
    tiles = dict(tiles_of("_infini_decode_split_kernel", q.device, width, q.element_size()))
    tiles["BT"] = min(tiles["BT"], padded(ring), max(16, TILE_BYTES // (width * q.element_size())))
    tiles["BM"] = min(tiles["BM"], padded(value))
    splits = -(-ring // tiles["BT"])
    columns = 0 if matrix is None else -(-value // tiles["BM"])
    out = q.new_empty(batch, heads, 1, value)
    partial = q.new_empty(batch, heads, splits, value, dtype=dtype)
    # As in the layer: for float32 its rounding would be the largest error.
    lse = q.new_empty(batch, heads, splits, dtype=torch.float64 if q.dtype == torch.float32 else dtype)
    recalled, after = None, None
    if matrix is not None:
        recalled = q.new_empty(batch, heads, value, dtype=dtype)
        after = q.new_empty(batch, kv_heads, key, dtype=dtype)
    _infini_decode_split_kernel[(batch * kv_heads * (splits + columns),)](
        q, k, v, keys, values, matrix, norm, position, active, cos, sin, feature_scale, feature_bias,
        partial, lse, recalled, after,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *keys.stride()[:3], *values.stride()[:3],
        *_strides(matrix, 3), *_strides(norm, 2), *_strides(position, 1), *_strides(active, 1),
        *_rope_strides(cos), *_rope_strides(sin),
        kv_heads, 0 if cos is None else cos.shape[-2], eps,
        G=group, K=key, V=value, R=ring, S=segment, SPLITS=splits, LOCAL=local,
        DELTA=rule != "linear", NOVEL=rule == "gamma",
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32x3",
        BG=padded(group), BH=padded((key + 1) // 2), BK=padded(key), BV=padded(value),
        **tiles, **dependent_launch(q.device),
    )  # fmt: skip
    _infini_decode_combine_kernel[(batch * heads,)](
        partial, lse, recalled, after, beta, norm, position, active, out,
        *_strides(norm, 2), *_strides(position, 1), *_strides(active, 1), heads,
        G=group, K=key, V=value, SPLITS=splits, TANH=tanh, BK=padded(key), BV=padded(value),
        **tiles_of("_infini_decode_combine_kernel", q.device, width, q.element_size()),
        **dependent_launch(q.device),
    )  # fmt: skip
    return out


def _strides(x: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if x is None else x.stride()[:count]


def _rope_strides(table: Tensor | None) -> tuple[int, ...]:
    """Of rows of the batch, none for a table that they share, and of the table."""
    return (0,) * (3 - table.ndim) + table.stride()[:-1] if table is not None else (0, 0)
