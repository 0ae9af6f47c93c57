"""Chains of segments: the memory before each, and backwards the gradients of the memory after each."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from newllm.kernels.common import cast, dot, padded, wait_for_previous_kernel
from newllm.kernels.memory_fold import state_precision
from newllm.kernels.memory_layout import contiguous, load_matrix, memory_tiles, store_matrix
from newllm.kernels.tiles import ELEMENTS, dependent_launch


class Chain(NamedTuple):
    """Before each segment ``[B, HKV, N, K, V]`` and ``[B, HKV, N, K]``, after the last without N."""

    before: Tensor | None
    norms: Tensor
    matrix: Tensor
    norm: Tensor


@triton.jit
def _carry(
    added, initial, weight, before, last, head, b, e0, N, E,
    REVERSE: tl.constexpr, DOUBLE: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Carry elements e0 .. e0 + BE - 1 of one head through its N segments."""
    elements = e0 + tl.arange(0, BE)
    mask = elements < E
    total = tl.zeros((BE,), tl.float64 if DOUBLE else tl.float32)
    if initial is not None:
        # [BE]
        total += tl.load(initial + head * E + elements, mask, other=0.0)
    for i in tl.range(0, N, num_stages=4):
        j = N - 1 - i if REVERSE else i
        at = (head * N + j) * E + elements
        if before is not None:
            tl.store(before + at, cast(total.to(tl.float32), before.dtype.element_ty), mask)
        if added is not None:
            # [BE]
            x = tl.load(added + at, mask, other=0.0)
            if weight is not None:
                x *= tl.load(weight + b * N + j)
            total += x
    tl.store(last + head * E + elements, total.to(tl.float32), mask)


@triton.jit(do_not_specialize=["HKV", "N"])
def _memory_scan_linear_kernel(
    added, initial, before, last, added_norm, initial_norm, before_norm, last_norm, weight, HKV, N, E, K,
    REVERSE: tl.constexpr, DOUBLE: tl.constexpr, PDL: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """One program carries BE elements of a head's matrix, or of its norm, through all segments."""
    wait_for_previous_kernel(PDL)
    matrix_parts = tl.cdiv(E, BE)
    parts = matrix_parts + tl.cdiv(K, BE)
    pid = tl.program_id(0).to(tl.int64)
    part, head = (pid % parts).to(tl.int32), pid // parts
    b = head // HKV
    if part < matrix_parts:
        _carry(added, initial, weight, before, last, head, b, part * BE, N, E, REVERSE, DOUBLE, BE)
    else:
        e0 = (part - matrix_parts) * BE
        _carry(
            added_norm, initial_norm, weight, before_norm, last_norm, head, b, e0, N, K, REVERSE, DOUBLE, BE
        )


def scan(
    added: Tensor,
    added_norm: Tensor,
    matrix: Tensor | None = None,
    norm: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    states: torch.dtype | None = torch.float32,
    double: bool = False,
) -> Chain:
    """Linear rule: add segments from left to right, in one launch.

    ``added [B, HKV, N, K, V]`` and ``added_norm [B, HKV, N, K]``, times ``weight [B, N]``, come after
    ``matrix [B, HKV, K, V]`` and ``norm [B, HKV, K]`` (None: zeros). ``states`` is the dtype of the matrices
    before each segment (None: not kept); ``double`` adds in float64. All else is float32.
    """
    return _linear(added.shape, added, added_norm, matrix, norm, weight, states, double=double)


def scan_backward(
    shape: torch.Size,
    dbefore: Tensor | None,
    dnorms: Tensor | None,
    dmatrix: Tensor | None,
    dnorm: Tensor | None,
    *,
    dtype: torch.dtype | None = torch.float32,
) -> Chain:
    """From the gradients of all that ``scan`` returns (None: zero) to those of what each segment added.

    The result's ``before`` and ``norms`` hold, for each segment, the gradient of the memory after it,
    ``before`` in ``dtype``; ``matrix`` and ``norm`` that of the initial memory. ``shape`` is ``added``'s.
    """
    return _linear(shape, dbefore, dnorms, dmatrix, dnorm, None, dtype, reverse=True)


def scan_norms(
    shape: torch.Size, added: Tensor | None, norm: Tensor | None, *, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """``scan`` (``reverse``: ``scan_backward``) of norms alone, ``shape`` [B, HKV, N, K]."""
    chain = _linear(torch.Size([*shape, 0]), None, added, None, norm, None, None, reverse=reverse)
    return chain.norms, chain.norm


def _linear(
    shape: torch.Size,
    added: Tensor | None,
    added_norm: Tensor | None,
    matrix: Tensor | None,
    norm: Tensor | None,
    weight: Tensor | None,
    states: torch.dtype | None,
    *,
    reverse: bool = False,
    double: bool = False,
) -> Chain:
    batch, heads, count, width, columns = shape
    given = [contiguous(x) for x in (added, matrix, added_norm, norm)]
    device = next(x.device for x in given if x is not None)
    norms = torch.empty(batch, heads, count, width, device=device)
    last = norms.new_empty(batch, heads, width, columns)
    before = None if states is None else torch.empty(shape, dtype=states, device=device)
    chain = Chain(before, norms, last, norms.new_empty(batch, heads, width))
    parts = -(-width * columns // ELEMENTS) + -(-width // ELEMENTS)
    _memory_scan_linear_kernel[(batch * heads * parts,)](
        given[0], given[1], chain.before, chain.matrix, given[2], given[3], chain.norms, chain.norm,
        contiguous(weight), heads, count, width * columns, width,
        REVERSE=reverse, DOUBLE=double, BE=ELEMENTS, num_warps=4, **dependent_launch(device),
    )  # fmt: skip
    return chain


@triton.jit
def _corrected(
    corrections, matrix, x, v0, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``x - A' x`` for A' ``[K, K]`` and columns ``x [BK, BV]`` from v0 on, also in ``matrix [K, V]``.

    Behind a small norm A' is large, and what float32 rounds off its products more than twice what the tokens'
    own products lose: those are float64 where inputs are float32.
    """
    number: tl.constexpr = tl.float64 if PRECISION == "ieee" else tl.float32
    left = x.to(number)
    if BT >= BK:
        # [BK, BK]
        correction = load_matrix(corrections, 0, 0, K, K, BK, BK)
        left -= _product(correction, x, number, PRECISION)
    else:
        for i in tl.range(0, (K + BT - 1) // BT):
            # [BK, BT]
            correction = load_matrix(corrections, 0, i * BT, K, K, BK, BT)
            # [BT, BV]
            part = load_matrix(matrix, i * BT, v0, K, V, BT, BV)
            left -= _product(correction, part, number, PRECISION)
    return left.to(tl.float32)


@triton.jit
def _product(a, b, number: tl.constexpr, PRECISION: tl.constexpr):
    """``a @ b`` in ``number``."""
    if number == tl.float64:
        product = tl.dot(a.to(number), b.to(number), out_dtype=number)
    else:
        product = dot(a, b, None, PRECISION)
    return product


@triton.jit(do_not_specialize=["N"])
def _memory_scan_delta_kernel(
    added, corrections, initial, before, last, N, K: tl.constexpr, V: tl.constexpr,
    REVERSE: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program carries BV columns of a head's matrix through all segments."""
    parts: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0).to(tl.int64)
    v0, head = (pid % parts).to(tl.int32) * BV, pid // parts
    last += head * K * V
    x = tl.zeros((BK, BV), tl.float32)
    if initial is not None:
        # [BK, BV]
        x = load_matrix(initial + head * K * V, 0, v0, K, V, BK, BV)
    for i in tl.range(0, N):
        segment = head * N + (N - 1 - i if REVERSE else i)
        if before is not None:
            store_matrix(before + segment * K * V, x, 0, v0, K, V, BK, BV)
        if BT < BK:
            # The whole column block is needed at each step, in parts: other threads read what these write.
            store_matrix(last, x, 0, v0, K, V, BK, BV)
            tl.debug_barrier()
        x = _corrected(corrections + segment * K * K, last, x, v0, K, V, BT, BK, BV, PRECISION)
        if BT < BK:
            tl.debug_barrier()
        if added is not None:
            # [BK, BV]
            x += load_matrix(added + segment * K * V, 0, v0, K, V, BK, BV)
    store_matrix(last, x, 0, v0, K, V, BK, BV)


def scan_delta(
    shape: torch.Size,
    corrections: Tensor,
    added: Tensor | None,
    matrix: Tensor | None,
    *,
    states: torch.dtype | None = torch.float32,
    reverse: bool = False,
    inputs: torch.dtype = torch.float32,
) -> tuple[Tensor | None, Tensor]:
    """Delta rule: ``M <- M - A' M + added`` from left to right; before each segment, and the last.

    ``corrections`` A' ``[B, HKV, N, K, K]``, the rest as for ``scan``. ``reverse`` takes the gradients that
    ``scan_backward`` takes, from right to left. ``inputs`` is the dtype of the keys.
    """
    batch, heads, count, width, columns = shape
    last = corrections.new_empty(batch, heads, width, columns)
    before = None if states is None else torch.empty(shape, dtype=states, device=last.device)
    sizes = memory_tiles("_memory_scan_delta_kernel", last.device, inputs, width=width, columns=columns)
    _memory_scan_delta_kernel[(batch * heads * -(-columns // sizes["BV"]),)](
        contiguous(added), corrections, contiguous(matrix), before, last, count, K=width, V=columns,
        REVERSE=reverse, BK=padded(width), PRECISION=state_precision(inputs), **sizes,
    )  # fmt: skip
    return before, last


@triton.jit(do_not_specialize=["HKV", "N"])
def _memory_scan_backward_step_kernel(
    after, before, final, written, corrections, out, initial, HKV, N, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program writes BV columns of one state's gradient, reaching one segment further than ``after``."""
    parts: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0).to(tl.int64)
    v0, chain = (pid % parts).to(tl.int32) * BV, pid // parts
    j, head = chain % (N + 1), chain // (N + 1)
    segment = head * N + j
    x = tl.zeros((BK, BV), tl.float32)
    if j < N:
        if after is not None:
            # [BK, BV]
            x = load_matrix(after + segment * K * V, 0, v0, K, V, BK, BV)
            if corrections is not None:
                x = _corrected(
                    corrections + segment * K * K, after + segment * K * V, x, v0, K, V, BT, BK, BV, PRECISION
                )
        if before is not None:
            # [BK, BV]
            x += load_matrix(before + segment * K * V, 0, v0, K, V, BK, BV)
    if final is not None and tl.load(written + head // HKV) == j:
        # [BK, BV]
        x += load_matrix(final + head * K * V, 0, v0, K, V, BK, BV)
    if j > 0:
        store_matrix(out + (segment - 1) * K * V, x, 0, v0, K, V, BK, BV)
    else:
        store_matrix(initial + head * K * V, x, 0, v0, K, V, BK, BV)


def scan_backward_step(
    shape: torch.Size,
    after: Tensor | None,
    dbefore: Tensor | None,
    dmatrix: Tensor | None,
    written: Tensor,
    corrections: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    inputs: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Gradients of the memory after each segment that reach one segment further than ``after`` (None: none).

    A gradient of the state before segment j passes on to that before segment j - 1 as often as there are
    steps. ``dmatrix`` belongs to the state after the row's ``written [B]`` segments. Returns gradients after
    each segment ``[B, HKV, N, K, V]`` in ``dtype``, and of the initial memory ``[B, HKV, K, V]``.
    """
    batch, heads, count, width, columns = shape
    device = written.device
    out = torch.empty(shape, dtype=dtype, device=device)
    initial = torch.empty(batch, heads, width, columns, device=device)
    sizes = memory_tiles("_memory_scan_backward_step_kernel", device, inputs, width=width, columns=columns)
    _memory_scan_backward_step_kernel[(batch * heads * (count + 1) * -(-columns // sizes["BV"]),)](
        after, contiguous(dbefore), contiguous(dmatrix), written, corrections, out, initial, heads, count,
        K=width, V=columns, BK=padded(width), PRECISION=state_precision(inputs), **sizes,
    )  # fmt: skip
    return out, initial
