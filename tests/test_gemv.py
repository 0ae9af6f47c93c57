"""Matrices times a few vectors: the kernel against the reference in float64, and what it leaves to that."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch

from newllm import ops
from newllm.ops.gemv_fused import gemv as contract
from newllm.testing import CASES, DRAWS, mapped

CASE = CASES["gemv"]
FUSED = partial(ops.gemv, backend="fused")
SIZES = (
    {"batch": 1},
    {"batch": 3, "width": 33, "query": 40, "key": 17, "value": 1},
    {"batch": 4, "width": 1, "query": 1, "key": 1, "value": 1},
    {"batch": 2, "width": 300, "query": 9, "key": 8, "value": 20},
)
TOGETHER = (
    {"batch": 5, "width": 40, "query": 20, "key": 17, "value": 16},
    {"batch": 16, "width": 1, "query": 1, "key": 1, "value": 1},
    {"batch": 9, "width": 1030, "query": 33, "key": 8, "value": 2},
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def judged(sizes: dict[str, int], variant: str, dtype: torch.dtype, device: str) -> None:
    draws = (CASE.inputs(variant, dtype, device=device, seed=seed, **sizes) for seed in range(DRAWS[dtype]))
    first, *others = draws
    CASE.judge(first, dtype, function=torch.no_grad()(FUSED), others=others, gradients=False)


@pytest.mark.parametrize(
    ("sizes", "variant", "dtype"),
    [(SIZES[index % len(SIZES)], *case) for index, case in enumerate(product(CASE.variants, DTYPES))],
)
def test_a_product_obeys_the_error_rule(
    sizes: dict[str, int], variant: str, dtype: torch.dtype, fused_device: str
) -> None:
    judged(sizes, variant, dtype, fused_device)


@pytest.mark.parametrize("sizes", TOGETHER, ids=str)
@pytest.mark.parametrize(("variant", "dtype"), [*product(CASE.variants, DTYPES[1:])])
def test_products_by_tensor_cores_obey_the_error_rule(
    sizes: dict[str, int], variant: str, dtype: torch.dtype, fused_device: str
) -> None:
    judged(sizes, variant, dtype, fused_device)


def test_long_vectors_of_float16_do_not_overflow(fused_device: str) -> None:
    inputs = CASE.inputs("normed", torch.float16, device=fused_device, batch=6, width=700)
    inputs |= {"x": 3e4 * inputs["x"].sign(), "norm": 8 * inputs["norm"]}
    assert FUSED(**inputs).isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [5, 8, 16])
@pytest.mark.parametrize("width", [80, 576, 1536, 4096, 14336])
@pytest.mark.parametrize(("variant", "dtype"), [*product(CASE.variants, DTYPES[1:])])
def test_every_length_by_tensor_cores(batch: int, width: int, variant: str, dtype: torch.dtype) -> None:
    judged({"batch": batch, "width": width, "query": 960, "key": 577, "value": 3}, variant, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 4])
@pytest.mark.parametrize("width", [1, 80, 576, 1536, 14336])
@pytest.mark.parametrize(("variant", "dtype"), [*product(CASE.variants, DTYPES)])
def test_every_length(batch: int, width: int, variant: str, dtype: torch.dtype) -> None:
    judged({"batch": batch, "width": width, "query": 960, "key": 577, "value": 3}, variant, dtype, "cuda")


@pytest.mark.parametrize(("batch", "alone", "dtype"), [(3, 1, torch.float32), (9, 5, torch.bfloat16)])
@pytest.mark.parametrize("variant", CASE.variants)
def test_rows_do_not_know_each_other(
    variant: str, batch: int, alone: int, dtype: torch.dtype, fused_device: str
) -> None:
    inputs = CASE.inputs(variant, dtype, device=fused_device, batch=batch)
    whole = FUSED(**inputs)
    for row in range(batch - alone + 1):
        part = slice(row, row + alone)
        own = {name: inputs[name][part] for name in ("x", "residual") if name in inputs}
        assert torch.equal(FUSED(**{**inputs, **own}), whole[part])


@pytest.mark.parametrize("batch", [2, 6])
def test_vectors_may_lie_anywhere(batch: int, fused_device: str) -> None:
    inputs = CASE.inputs("normed", torch.bfloat16, device=fused_device, batch=batch)
    inputs["residual"] = torch.randn(batch, 30, device=fused_device, dtype=torch.bfloat16)
    spread = {name: inputs[name].t().contiguous().t() for name in ("x", "residual")}
    spread["norm"] = inputs["norm"].repeat_interleave(2)[::2]
    assert not any(each.is_contiguous() for each in spread.values())
    assert torch.equal(FUSED(**{**inputs, **spread}), FUSED(**inputs))


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_autocast_is_not_heeded(backend: str, fused_device: str) -> None:
    inputs = CASE.inputs("swiglu", torch.float32, device=fused_device)
    with torch.autocast(fused_device, torch.bfloat16):
        found = ops.gemv(**inputs, backend=backend)
    assert torch.equal(found, ops.gemv(**inputs, backend=backend))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 5}, "1 to 4 vectors of torch.float32, got 5"),
        ({"width": 16385, "key": 1}, "up to 16384 elements, got 16385"),
    ],
)
def test_what_the_kernel_lacks_is_the_references(
    change: dict[str, int], message: str, fused_device: str
) -> None:
    inputs = CASE.inputs("residual", torch.float32, device=fused_device, **change)
    assert torch.equal(ops.gemv(**inputs), ops.gemv(**inputs, backend="reference"))
    with pytest.raises(ValueError, match=f"^backend 'fused' cannot run gemv: its kernel takes .*{message}"):
        FUSED(**inputs)


def test_a_gradient_comes_from_the_reference(fused_device: str) -> None:
    inputs = CASE.inputs("plain", torch.float32, device=fused_device)
    inputs["x"].requires_grad_()
    slopes = [
        torch.autograd.grad(ops.gemv(**inputs, backend=name).sum(), inputs["x"])
        for name in (None, "reference")
    ]
    assert torch.equal(*(slope for (slope,) in slopes))
    with pytest.raises(ValueError, match="its kernel has no gradient"):
        FUSED(**inputs)
    with torch.no_grad():
        assert FUSED(**inputs).isfinite().all()


@pytest.mark.parametrize("variant", CASE.variants)
def test_contract(variant: str, fused_device: str) -> None:
    inputs = mapped(torch.Tensor.detach, CASE.inputs(variant, torch.float32, device=fused_device))
    call = (inputs["x"], [*inputs["weights"]], inputs.get("norm"), inputs.get("residual"))
    torch.library.opcheck(contract, (*call, inputs.get("swiglu", False), inputs.get("eps", 1e-6)))
