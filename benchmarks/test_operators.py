"""Every operator of the table of cases: reference, compiled reference and, where there is one, fused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import DEVICE, inputs, wrong

from newllm import backend
from newllm.measuring.entries import COMPILED, FUSED, REFERENCE, Prepared, call_of
from newllm.measuring.timing import Clock
from newllm.measuring.work import BOTH, FORWARD
from newllm.testing import CASES

# One variant of each operator, the first of its case, and the other rule where there is one.
VARIANTS = [
    (op, variant)
    for op, case in CASES.items()
    for variant in case.variants
    if variant in (next(iter(case.variants)), "delta")
]


def _implementations(op: str) -> list[str]:
    return [REFERENCE, COMPILED, *([FUSED] if DEVICE.type in backend.FUSED[op] else [])]


ROWS = [
    (op, variant, impl, direction)
    for op, variant in VARIANTS
    for direction in ((FORWARD,) if CASES[op].mutates else (FORWARD, BOTH))
    for impl in _implementations(op)
    if impl != COMPILED or variant != "delta"
]


def _function(op: str, impl: str) -> Callable[..., Any]:
    if impl == REFERENCE:
        return CASES[op].reference
    if impl == COMPILED:
        return torch.compile(CASES[op].reference, dynamic=False)
    return partial(CASES[op].public, backend="fused")


@pytest.mark.parametrize(("op", "variant", "impl", "direction"), ROWS)
def test_speed(benchmark: Any, op: str, variant: str, impl: str, direction: str) -> None:
    broken = wrong(op, variant)
    if broken is not None:
        pytest.fail(f"{op}, {variant}: the results are wrong, so nothing is timed: {broken}")
    prepared = Prepared(_function(op, impl), inputs(op, variant), CASES[op].constants)
    call, clock = call_of(prepared, direction), Clock(DEVICE)

    def timed() -> None:
        call()
        clock.synchronise()

    benchmark.group = f"{op} ({variant}), {direction}"
    benchmark.name = impl
    benchmark.pedantic(timed, rounds=5, warmup_rounds=2)
