"""How results are judged: by the error rule, for any dtype beside float64, and by what rounding may cost."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_no_worse(out: Tensor, oracle: Tensor, baseline: Tensor, name: str = "the result") -> float:
    """The error rule: ``max|out - oracle| <= 2 max|baseline - oracle| + tiny``; the share that was taken.

    ``oracle`` is the reference in float64 on the same rounded inputs, ``baseline`` the reference computed
    in the inputs' dtype. ``tiny`` is eps of out's dtype times the largest oracle: what rounding the result
    itself may cost where the baseline is exact by luck. Integers must be equal.

    Raises AssertionError, also for another shape or dtype than the baseline's and for NaN.
    """
    return share_of([errors_of(out, oracle, baseline, name)], name)


def error_and_bar(
    out: Tensor, oracle: Tensor, baseline: Tensor, name: str = "the result"
) -> tuple[float, float]:
    """What :func:`assert_no_worse` compares: the error, and what is allowed."""
    error, other, tiny = errors_of(out, oracle, baseline, name)
    return error, 2 * other + tiny


def errors_of(out: Tensor, oracle: Tensor, baseline: Tensor, name: str) -> tuple[float, float, float]:
    """The largest errors of out and of the baseline, and ``tiny``; integers must be equal."""
    assert out.shape == oracle.shape == baseline.shape, f"{name}: {out.shape}, expected {baseline.shape}"
    assert out.dtype == baseline.dtype, f"{name}: {out.dtype}, expected {baseline.dtype}"
    if not out.is_floating_point():
        assert torch.equal(out, oracle), f"{name}: integers differ"
        return 0.0, 0.0, 0.0
    tiny = torch.finfo(out.dtype).eps * largest(oracle)
    return largest(out.double() - oracle), largest(baseline.double() - oracle), tiny


def share_of(draws: list[tuple[float, float, float]], name: str) -> float:
    """The share of what the error rule allows that the draws of one result took, judged as one."""
    error, other, tiny = torch.tensor(draws, dtype=torch.float64).amax(0).tolist()  # max() may lose NaN
    allowed = 2 * other + tiny
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
    return error / allowed if allowed else 0.0


def assert_rounding(out: Tensor, expected: Tensor, *, additions: int, magnitude: float) -> None:
    """Equal but for the rounding of two computations of ``additions`` sums of terms up to ``magnitude``.

    Each side may err by additions * eps / 2 * magnitude (Higham, Accuracy and Stability, sec. 3.1), with
    eps of their common dtype. Raises AssertionError, also for another shape or dtype and for NaN.
    """
    assert out.shape == expected.shape, f"shape {list(out.shape)}, expected {list(expected.shape)}"
    assert out.dtype == expected.dtype, f"{out.dtype}, expected {expected.dtype}"
    error, allowed = largest(out - expected), additions * torch.finfo(out.dtype).eps * magnitude
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def largest(x: Tensor) -> float:
    """The largest absolute value, 0 of nothing, NaN if there is one."""
    return x.detach().abs().max().item() if x.numel() else 0.0
