"""Every operator of the table of cases: reference, compiled reference and, where there is one, fused.

None is timed whose results break the error rule, and the device is idle at the end of every timed round.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch

from newllm import backend
from newllm.measuring.entries import COMPILED, FUSED, REFERENCE, Prepared, call_of
from newllm.measuring.timing import Clock
from newllm.measuring.work import BOTH, FORWARD
from newllm.testing import CASES, Inputs

DEVICE = backend.devices()[min(1, len(backend.devices()) - 1)]
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
_LAYER = {
    "cpu": {"batch": 1, "heads": 4, "kv_heads": 2, "tokens": 128, "key": 32, "value": 32},
    "cuda": {"batch": 1, "heads": 32, "kv_heads": 8, "tokens": 8192, "key": 128, "value": 128},
}
_SPANS = {"cpu": {"window": 64, "segment": 64}, "cuda": {"window": 1024, "segment": 1024}}
_SWEEP = {
    "cpu": {"batch": 4, "tokens": 3, "input": 32, "width": 32, "hidden": 64, "layers": 1},
    "cuda": {"batch": 64, "tokens": 32, "input": 768, "width": 768, "hidden": 1024, "layers": 1},
}
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


def inputs(op: str, variant: str, **sizes: int) -> Inputs:
    """Inputs of an operator on the device, at the sizes that are timed there but for ``sizes``."""
    kind = DEVICE.type
    timed = _SWEEP[kind] if op == "context_sweep" else _LAYER[kind] | _SPANS[kind]
    return CASES[op].inputs(variant, DTYPES[kind], device=str(DEVICE), **{**timed, **sizes})


@cache
def wrong(op: str, variant: str) -> str | None:
    """How the operator breaks the error rule; None where it keeps it.

    Judged at as few tokens as cross the borders of window and segments.
    """
    kind = DEVICE.type
    tokens = {} if op == "context_sweep" else {"tokens": 2 * _SPANS[kind]["window"] + 3}
    try:
        CASES[op].judge(inputs(op, variant, **tokens), DTYPES[kind])
    except AssertionError as error:
        return str(error)
    return None


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
