"""Suites at a tiny shape and invented rows, for the tests of ``newllm bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from newllm.measuring import (
    session,
    suites,
)
from newllm.measuring.entries import FUSED
from newllm.measuring.ours import Site
from newllm.measuring.rows import Row
from newllm.measuring.shapes import Shape
from newllm.measuring.work import BOTH, FORWARD, Ceilings

TINY = Shape("tiny", 2, 4, 2, 21, 8, 8, 8)
CPU = torch.device("cpu")
SITE = Site(CPU, torch.float32)
# What design asks every row to carry.
FIELDS = {
    *("suite", "op", "impl", "direction", "shape", "batch", "heads", "kv_heads", "tokens", "width", "dtype"),
    *("ms", "gib", "floor_ms", "device", "torch", "triton", "commit", "date", "run"),
}


def row(**changes: Any) -> Row:
    plain: dict[str, Any] = {
        **{
            "suite": "layer",
            "op": "infini_attention",
            "impl": FUSED,
            "variant": "linear",
            "direction": FORWARD,
        },
        **{"shape": "8B", "batch": 1, "heads": 32, "kv_heads": 8, "tokens": 32768, "width": 128},
        **{"window": 1024, "segment": 1024, "dtype": "bfloat16", "ms": 1.0, "ms_low": 1.0, "ms_high": 1.0},
        **{"host_ms": 0.1, "rounds": 9, "gib": 1.0, "floor_ms": 0.8, "flops": 1e12, "bytes": 1e9},
        **{"peak_tflops": 780.0, "peak_gbs": 3000.0, "detail": None, "error": None, "device": "a GPU"},
        **{
            "torch": "2.11",
            "triton": "3.6",
            "commit": "abc",
            "date": "2026-01-01T00:00:00+00:00",
            "run": "r",
        },
    }
    return Row(**{**plain, **changes})


def layer_rows() -> list[Row]:
    """Rows as a GPU would leave them, invented."""
    entries = [
        ("infini_attention", FUSED, "linear", 1.4),
        ("infini_attention", FUSED, "linear continued", 1.45),
        ("infini_attention", FUSED, "delta", 1.6),
        ("window_attention", "FlexAttention", "window", 1.68),
        ("window_attention", "FA4", "window", 1.04),
        ("full attention", "SDPA", "causal", 14.0),
        ("infini_attention", "segment loop", "linear", 15.6),
    ]
    return [
        row(op=op, impl=impl, variant=variant, ms=ms * scale, shape=shape, direction=direction)
        for shape, size in (("8B", 1.0), ("SmolLM", 0.33))
        for direction, scale in ((FORWARD, size), (BOTH, 4 * size))
        for op, impl, variant, ms in entries
    ]


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """All suites at a tiny shape, in few rounds, compiled by nobody."""
    decodes = tuple(TINY._replace(name=f"tiny {tokens}", tokens=tokens) for tokens in (10, 100))
    for name, suite in suites.SUITES.items():
        small = decodes if name == "decode" else (TINY,)
        changed = suite._replace(shapes={"cpu": small}, seconds=0, rounds=(2, 2), warm_calls=1)
        monkeypatch.setitem(suites.SUITES, name, changed)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(session, "measure_ceilings", lambda clock, dtype: Ceilings(1e12, 1e11))


def measured(suite: str, out: Path, **options: Any) -> session.Report:
    return session.run(suite, out=out, device="cpu", say=lambda line: None, **options)
