"""The native context sweeps on a GPU: every width and number of rows, NaN, states, methods, compiled."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from newllm import backend, ops
from newllm.ops.context_fused import context_sweep
from newllm.ops.native import planned
from newllm.testing import CASES, Inputs, largest, mapped
from tests.row_families import judge_recurrence

CASE = CASES["context_sweep"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in backend.FUSED["context_sweep"], reason="built without CUDA"),
]
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
WIDTHS = [1, 7, 31, 32, 33, 64, 100, 128, 129, 200, 255, 256, 257, 300, 511, 512, 513, 640, 700, 767, 768]
WIDTHS += [769, 900, 1000, 1023, 1024]
# Around a row for each cluster, the groups of four and the eight rows that tensor cores take.
BATCHES = [1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 29, 33, 64, 112, 113, 120, 121, 150]


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def inputs(dtype: torch.dtype = F32, seed: int = 0, **sizes: int) -> Inputs:
    return CASE.inputs("context", dtype, device="cuda", seed=seed, **{"input": 16, "layers": 1, **sizes})


def fused(**given: Any) -> Any:
    return ops.context_sweep(**given, backend="fused")


def judge(dtype: torch.dtype, **sizes: int) -> None:
    judge_drawn(dtype, lambda seed: inputs(dtype, seed, **sizes))


def judge_drawn(dtype: torch.dtype, draw: Callable[[int], Inputs]) -> None:
    judge_recurrence(CASE, dtype, draw, fused, gradients=dtype != F16)


@DTYPES
@pytest.mark.parametrize("batch", [1, 9, 20])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width(width: int, batch: int, dtype: torch.dtype) -> None:
    judge(dtype, batch=batch, tokens=6, width=width)


@DTYPES
@pytest.mark.parametrize("width", [96, 768])
@pytest.mark.parametrize("batch", BATCHES)
def test_every_number_of_rows(batch: int, width: int, dtype: torch.dtype) -> None:
    judge(dtype, batch=batch, tokens=3, width=width)


@DTYPES
@pytest.mark.parametrize("batch", [1, 20])
@pytest.mark.parametrize("tokens", [1, 2, 3, 64, 129])
def test_every_length(tokens: int, batch: int, dtype: torch.dtype) -> None:
    judge(dtype, batch=batch, tokens=tokens, width=257)


@DTYPES
@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize(("batch", "width"), [(1, 32), (1, 768), (3, 129), (9, 768), (40, 257), (2, 1024)])
def test_several_layers(batch: int, width: int, layers: int, dtype: torch.dtype) -> None:
    judge(dtype, batch=batch, tokens=5, width=width, layers=layers)


@DTYPES
@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize("width", [1025, 1536, 2048])
def test_widths_that_no_cluster_holds(width: int, batch: int, dtype: torch.dtype) -> None:
    judge(dtype, batch=batch, tokens=4, width=width)


@DTYPES
@pytest.mark.parametrize("clamp", [None, 0.75])
@pytest.mark.parametrize("deeper", [0, 1, 3])
@pytest.mark.parametrize(
    ("batch", "width", "hidden"), [(1, 32, 70), (3, 129, 64), (9, 768, 1536), (40, 100, 33), (150, 64, 64)]
)
def test_the_gated_cell(
    batch: int, width: int, hidden: int, deeper: int, clamp: float | None, dtype: torch.dtype
) -> None:
    sizes = {"batch": batch, "tokens": 4, "input": 16, "width": width, "hidden": hidden, "layers": deeper}

    def draw(seed: int) -> Inputs:
        given = CASE.inputs("gated", dtype, device="cuda", seed=seed, **sizes)
        return {**given, "params": given["params"]._replace(clamp=clamp)}

    judge_drawn(dtype, draw)


@pytest.mark.parametrize(("hidden", "batch"), [(768, 1), (768, 9), (40, 9), (701, 30)])
@pytest.mark.parametrize("width", [32, 47, 257, 512, 767, 768])
def test_the_gated_cell_on_clusters(width: int, hidden: int, batch: int) -> None:
    sizes = {"width": width, "hidden": hidden}
    for kind in ("GatedForward", "GatedAdjoint"):
        assert planned(kind, batch, 0, BF16, **sizes, deeper=0).kernel == "cluster"
    given = {"batch": batch, "tokens": 5, "input": 16, "layers": 0, **sizes}
    judge_drawn(BF16, lambda seed: CASE.inputs("gated", BF16, device="cuda", seed=seed, **given))


@pytest.mark.parametrize("batch", [3, 9])
def test_nan_stays_in_its_row_of_the_gated_cell(batch: int) -> None:
    sizes = {"batch": batch, "tokens": 5, "input": 16, "layers": 0, "width": 700, "hidden": 768}
    given = CASE.inputs("gated", BF16, device="cuda", **sizes)
    clean, end, _ = fused(**given)
    x = given["x"].clone()
    x[2, 3, 7] = torch.nan
    outputs, last, _ = fused(**{**given, "x": x})
    assert outputs[2, 3:].isnan().all() and last[2].isnan().all()
    outputs[2, 3:], clean[2, 3:], last[2], end[2] = 0, 0, 0, 0
    assert torch.equal(outputs, clean) and torch.equal(last, end)


def swept(given: Inputs, drive: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Contexts and last state by the operator itself, for a drive as it is."""
    params = given["params"]
    how = ("sequential", 0.0, None, True)
    outputs, last, _ = context_sweep(
        drive, params.weight_c, params.ln_weight.float(), params.ln_bias.float(), start, *how
    )
    return outputs, last


SWEPT = pytest.mark.parametrize(
    ("dtype", "batch"), [(F32, 6), (F32, 30), (F32, 120), (BF16, 6), (BF16, 30), (BF16, 130)], ids=str
)


@SWEPT
def test_states_can_be_handed_on(dtype: torch.dtype, batch: int) -> None:
    given = inputs(dtype, batch=batch, tokens=11, width=768)
    drive, start = torch.randn(batch, 11, 1, 768, device="cuda"), given["state"]
    whole, end = swept(given, drive, start)
    parts, state = [], start
    for part in drive.split([1, 4, 6], 1):
        outputs, state = swept(given, part.contiguous(), state)
        parts.append(outputs)
    assert torch.equal(state, torch.cat(parts, 1)[:, -1, 0]) and torch.equal(end, whole[:, -1, 0])
    # A state enters as it is and as what the layer norm would have made of it: two roundings of one number.
    steps, eps = 11, torch.finfo(dtype).eps
    assert largest(torch.cat(parts, 1) - whole) <= steps * eps * largest(whole) * 768**0.5


@SWEPT
def test_nan_stays_in_its_row_and_after_its_token(dtype: torch.dtype, batch: int) -> None:
    given = inputs(dtype, batch=batch, tokens=5, width=700)
    drive, start = torch.randn(batch, 5, 1, 700, device="cuda"), given["state"]
    clean, _ = swept(given, drive, start)
    drive[2, 3, 0, 7] = torch.nan
    outputs, last = swept(given, drive, start)
    assert outputs[2, 3:].isnan().all() and last[2].isnan().all()
    outputs[2, 3:], clean[2, 3:] = 0, 0
    assert torch.equal(outputs, clean)


@SWEPT
def test_a_sweep_repeats_itself_bit_for_bit(dtype: torch.dtype, batch: int) -> None:
    given = inputs(dtype, batch=batch, tokens=40, width=768)
    once, again = (CASE.results(lambda given: fused(**given), given) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once if not once[name].isnan().any())


def forgetting(tokens: int, dtype: torch.dtype = F32) -> Inputs:
    """A recurrence that forgets within a few tokens: the input outweighs the context."""
    given = inputs(dtype, batch=1, tokens=tokens, width=96)
    params = given["params"]
    params = params._replace(
        weight_x=4 * params.weight_x,
        ln_weight=torch.ones_like(params.ln_weight),
        ln_bias=torch.zeros_like(params.ln_bias),
    )
    return {**given, "params": params}


@pytest.mark.parametrize("tokens", [8192, 8195])
@pytest.mark.parametrize("method", ["block", "auto"])
def test_block_is_sequential_to_within_its_certificate(tokens: int, method: str) -> None:
    given = forgetting(tokens)
    contexts, last, info = fused(**given, method=method)
    expected, end, _ = fused(**given, method="sequential")
    assert info.method == "block" and info.residual <= 1e-5 and 0 < info.rho < 1
    bound = 96**0.5 * 1e-5 / (1 - info.rho)
    assert (contexts - expected).abs().max() <= bound
    assert (last - end).abs().max() <= bound


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_block_agrees_at_its_borders_and_repeats_itself_bit_for_bit(dtype: torch.dtype) -> None:
    given = forgetting(8192, dtype)
    whole, last, info = fused(**given, method="block", fallback=False)
    assert info.method == "block" and info.sweeps == 2
    for _ in range(5):
        again, end, other = fused(**given, method="block", fallback=False)
        assert torch.equal(whole, again) and torch.equal(last, end) and torch.equal(info.rho, other.rho)


def test_rho_is_that_of_a_cpu() -> None:
    given = forgetting(8192)
    on_cpu = mapped(Tensor.cpu, given)
    rho, expected = (fused(**each, method="block")[2].rho.item() for each in (given, on_cpu))
    assert abs(math.log(rho) / math.log(expected) - 1) < 0.1


def test_gradients_of_block_are_those_of_the_recurrence() -> None:
    given = forgetting(4096)
    exact = CASE.results(lambda given: fused(**given, method="sequential"), given)
    found = CASE.results(lambda given: fused(**given, method="block", tol=1e-6), given)
    for name, gradient in found.items():
        # Borders differ by 1e-6 of what is passed on there, and each is one of at most 112.
        assert (gradient - exact[name]).abs().max() <= 112e-5 * exact[name].abs().max(), name


def test_what_the_kernels_do_not_take_goes_to_the_reference() -> None:
    refused = "a row is wider than a block's shared memory holds"
    assert backend.sweep_limit(0, 60000) == refused
    # One hidden unit is one block's, and with it all gates; the adjoint alone would have room.
    assert backend.sweep_limit(0, 919, hidden=1, deeper=2) == refused
    sizes = {"batch": 2, "tokens": 3, "input": 16, "width": 40, "hidden": 30, "layers": 1}
    given = CASE.inputs("gated", F32, device="cuda", **sizes) | {"method": "jacobi"}
    with pytest.raises(ValueError, match="cannot run context_jacobi: it takes the context cell alone"):
        fused(**given)
    chosen, expected = ops.context_sweep(**given), ops.context_sweep(**given, backend="reference")
    assert torch.equal(chosen[0], expected[0])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_training_step_compiles_without_breaks(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    given = inputs(dtype, batch=3, tokens=9, width=130)
    plain = CASE.results(lambda given: fused(**given, method="sequential"), given)
    step = torch.compile(lambda given: fused(**given, method="sequential"), fullgraph=True)
    compiled = CASE.results(step, given)
    for name, expected in plain.items():
        if not expected.isnan().any():
            error = largest(compiled[name].double() - expected.double())
            assert error <= 130 * torch.finfo(dtype).eps * largest(expected), name
