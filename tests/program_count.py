"""A script: what Triton would compile for operators at one length and at many; nothing is compiled."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver

from tests.hopper_driver import Hopper
from tests.reliability_parts import prepare
from tests.row_families import FAMILIES

ONE, MANY = (100,), (100, 1, 16, 97, 128, 300)
SIZES = {"batch": 2, "heads": 4, "kv_heads": 2, "key": 64, "value": 64, "window": 40, "segment": 24}
CALLS = (
    ("layer", "learned delta padded stream"),
    ("layer", "learned"),
    ("layer", "gamma"),
    ("window", "padded"),
    ("memory_update", "linear"),
    ("memory_scan", "delta"),
    ("memory_retrieve", "learned"),
)


def programs(family: str, option: str, dtype: torch.dtype, lengths: tuple[int, ...]) -> set[str]:
    """Keys of what the kernels of a call and of its gradients are compiled as."""
    found: set[str] = set()

    def refuse(*, key: str, **_: Any) -> bool:
        found.add(key)
        return True

    knobs.runtime.jit_cache_hook = refuse
    case = FAMILIES[family].case(option)
    for tokens in lengths:
        inputs = case.inputs("changed", dtype, **SIZES, tokens=tokens, before=30)
        case.results(partial(case.call, function=partial(case.public, backend="fused")), inputs)
    return found


def main() -> None:
    """A line for each call and dtype: its name, programs at one length, programs at many."""
    driver.set_active(Hopper())
    prepare("cpu")
    for family, option in CALLS:
        for dtype in (torch.float32, torch.bfloat16):
            counts = [len(programs(family, option, dtype, lengths)) for lengths in (ONE, MANY)]
            print(json.dumps([f"{family} [{option}] {dtype}", *counts]), flush=True)


if __name__ == "__main__":
    main()
