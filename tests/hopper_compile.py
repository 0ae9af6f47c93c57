"""A script: compiles the kernels for Hopper without such a GPU and prints what each of them takes."""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from newllm.kernels import attention_hopper_forward, attention_hopper_keys, attention_hopper_queries
from newllm.kernels.attention_backward_prepare import Prepared
from newllm.kernels.attention_layout import Attention, Recall
from newllm.kernels.rotate import Keys
from tests.hopper_driver import Hopper

B, H, HKV, T, D, S = 1, 4, 2, 256, 128, 64


def only_compile(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
    compiled = launch(kernel, *arguments, grid=grid, warmup=True, **options)
    products = compiled.asm["ptx"].count("wgmma.mma_async")
    found = [kernel.fn.__name__, compiled.metadata.shared, products, idle_barriers(compiled.asm["ttgir"])]
    print(json.dumps(found), flush=True)


def idle_barriers(text: str) -> list[str]:
    """Barriers that no partition is given: their memory holds something else as soon as they are made."""
    made = re.findall(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<\w+xi64", text)
    (given,) = re.findall(r"ttg\.warp_specialize\(([^)]*)\)", text)
    assert made, "no barrier was found"
    return sorted({*made} - {*given.split(", ")})


def rows(heads: int, width: int = D) -> torch.Tensor:
    return torch.empty(B, heads, T, width, dtype=torch.bfloat16)


def numbers(*shape: int) -> torch.Tensor:
    return torch.empty(*shape)


def compile_all(
    layout: Attention, recall: Recall | None, rope: tuple[torch.Tensor, torch.Tensor] | None
) -> None:
    per_query = [None if recall is None else numbers(B, H, T) for _ in range(3)]
    ready = Prepared(numbers(B, H, T), *per_query)
    keys = Keys(rows(HKV), numbers(B, HKV, T // 32))
    attention_hopper_forward.attend(rows(H), keys, rows(HKV), layout, rope, recall)
    attention_hopper_queries.query_gradients(
        rows(H),
        rows(H),
        rows(HKV),
        rows(HKV),
        rows(H),
        numbers(B, H, T),
        layout,
        rope,
        recall,
        ready,
        rows(H),
    )


launch, JITFunction.run = JITFunction.run, only_compile
driver.set_active(Hopper())
attention_hopper_forward.processors = attention_hopper_queries.processors = lambda device: 132
plain = Attention(100, S, None, None, False)
for width in attention_hopper_keys.SIZES:
    lone = numbers(B, H, T)
    attention_hopper_keys.key_gradients(
        rows(H, width), rows(HKV, width), rows(HKV, width), rows(H, width), lone, lone, plain
    )
compile_all(plain, None, None)
states = torch.empty(B, HKV, T // S, D, D, dtype=torch.bfloat16)
memory = Recall(states, numbers(B, HKV, T // S, D), numbers(H), numbers(HKV), numbers(HKV), 1e-6)
place = torch.zeros(B, dtype=torch.int64)
compile_all(Attention(100, S, place, place, True), memory, (numbers(T, D), numbers(T, D)))
