"""The fused attention kernels against the reference: outputs, states and every gradient."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from newllm.testing import CASES

VARIANTS = [
    (op, variant) for op in ("window_attention", "infini_attention") for variant in CASES[op].variants
]

# Wide enough that no sum of a handful of numbers decides.
WIDE = {"heads": 8, "kv_heads": 4, "tokens": 40, "key": 16, "value": 24, "window": 20, "segment": 12}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("op", "variant"), VARIANTS)
def test_every_variant_is_no_worse_than_the_reference(
    op: str, variant: str, dtype: torch.dtype, fused_device: str
) -> None:
    case = CASES[op]
    inputs: dict[str, Any] = case.inputs(variant, dtype, device=fused_device, **WIDE)
    function = partial(case.public, backend="fused")
    case.judge(inputs, dtype, function=function, gradients=dtype != torch.float16)
