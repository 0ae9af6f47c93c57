"""What the kernels share: matrix products, the feature map, rotation."""

from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = tl.constexpr(knobs.runtime.interpret)
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
# What float32 cuts off LOG2E, times LN2.
LOG2E_REST = tl.constexpr(1.334976e-08)


@triton.jit
def dot(a, b, acc=None, PRECISION: tl.constexpr = "ieee"):
    """``acc + a @ b`` in float32; PRECISION matters to float32 operands only."""
    if INTERPRETED:
        # The interpreter's own product of bfloat16 is wrong.
        a, b = a.to(tl.float32), b.to(tl.float32)
    if PRECISION == "ieee" and a.dtype == tl.float32:
        # A sum of short sums, whose rounding does not grow with the number of steps.
        product = _short_sums(a, b, 32 if INTERPRETED else a.shape[1])
        if acc is not None:
            product += acc
    elif acc is None:
        product = tl.dot(a, b, input_precision=PRECISION)
    else:
        product = tl.dot(a, b, acc, input_precision=PRECISION)
    return product


@triton.jit
def _short_sums(a, b, TERMS: tl.constexpr):
    """``a @ b`` whose TERMS products are added as a tree of sums of 32: a device adds them one by one."""
    if TERMS > 32:
        even, odd = a.reshape(a.shape[0], TERMS // 2, 2).split()
        b_even, b_odd = tl.trans(b).reshape(b.shape[1], TERMS // 2, 2).split()
        product = _short_sums(even, tl.trans(b_even), TERMS // 2)
        product += _short_sums(odd, tl.trans(b_odd), TERMS // 2)
    else:
        # A limit on what is added at once, or the compiler makes acc + a @ b one long sum again.
        product = tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=1)
    return product


@triton.jit
def cast(x, dtype: tl.constexpr):
    """``x`` in ``dtype``, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter cuts the lower bits off.
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.uint32).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def start_next_kernel(PDL: tl.constexpr):
    """Let the next kernel start its programs, if it waits by itself for what this one writes."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous_kernel(PDL: tl.constexpr):
    """Let the next kernel start its programs, then wait for all that the previous ones write."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def features(x, scale, bias):
    """ELU(scale x + bias) + 1 in float32."""
    u = x.to(tl.float32) * scale + bias
    # Not exp(u) - 1 + 1, which cancels; one of the two is constant.
    return tl.maximum(u, 0.0) + exponential(tl.minimum(u, 0.0), x.dtype == tl.float32)


@triton.jit
def exponential(x, PRECISE: tl.constexpr):
    """e ** x in float32; PRECISE makes good what the rounding of the exponent of two loses."""
    exponent = x * LOG2E
    power = tl.exp2(exponent)
    if PRECISE:
        power += power * (tl.fma(x, tl.full(x.shape, LOG2E, tl.float32), -exponent) * LN2 + x * LOG2E_REST)
    return power


@triton.jit
def quotient(a, b, PRECISE: tl.constexpr):
    """``a / b`` in float32; PRECISE rounds it once, the device's own quotient errs by two ulp."""
    return tl.div_rn(a, b) if PRECISE else a / b


@triton.jit
def features_slope(feature):
    """The derivative of ELU(u) + 1 by u, from its value."""
    return tl.minimum(feature, 1.0)


@triton.jit
def novelty(f, z, eps, K: tl.constexpr, BK: tl.constexpr):
    """ARMT's gamma ``[BT]``: the share of features ``f [BT, BK]`` that the norm ``z [BK]`` lacks, 0 to 1."""
    if K < BK:
        f = tl.where(tl.arange(0, BK)[None, :] < K, f, 0.0)
    overlap = tl.sum(f * z[None, :], 1) / tl.maximum(tl.sum(f * f, 1), eps)
    return tl.maximum(1 - overlap, 0.0)


def precision(dtype: torch.dtype) -> str:
    """PRECISION of the products of float32 operands in a kernel whose inputs are ``dtype``.

    float16 inputs keep their memory matrices in float32; a single tf32 product, which cuts bits off instead
    of rounding, would be less precise than float16.
    """
    return "tf32x3" if dtype == torch.float16 else "ieee"


def memory_dtype(dtype: torch.dtype) -> torch.dtype:
    """What memory matrices are multiplied in: float32 for float16 inputs, whose range sums would leave."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def product_types(dtype: torch.dtype) -> dict[str, Any]:
    """What features are multiplied with memory matrices in, for inputs of ``dtype``, and how."""
    wide = memory_dtype(dtype) == torch.float32
    return {"DTYPE": tl.float32 if wide else tl.bfloat16, "PRECISION": precision(dtype)}


def fusion(width: int) -> dict[str, bool]:
    """Launch option of kernels that sum products over rows of ``width``.

    Where a thread has one product of a row, the compiler makes it one operation with the first exchange
    between threads, and threads that should hold the same sum differ in its last bit.
    """
    return {"enable_fp_fusion": padded(width) > 16}


def padded(width: int) -> int:
    """The tile width that holds ``width`` elements."""
    # Plain integers: Triton's own helpers take microseconds a call.
    return max(16, 1 << (width - 1).bit_length())
