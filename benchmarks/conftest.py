"""What the benchmarks share: the device, sizes of the operators' inputs, and the gate before any timing."""

from __future__ import annotations

import os

# As in the tests: nothing may reach out for a model.
os.environ["HF_HUB_OFFLINE"] = "1"

from functools import cache

import torch

from newllm import backend
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
