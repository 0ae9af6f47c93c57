"""The native context sweeps: held to the error rule at odd sizes, and to themselves bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from newllm import backend, ops
from newllm.ops.context_fused import context_sweep
from newllm.ops.gated_fused import gated_sweep
from newllm.testing import CASES, Inputs
from newllm.types import ContextParams, GatedParams

CASE = CASES["context_sweep"]
pytestmark = pytest.mark.skipif(
    "cpu" not in backend.FUSED["context_sweep"], reason="newllm._C was not built for this installation"
)
cells = pytest.mark.parametrize("cell", ["context", "gated"])
# batch, tokens, input, width, hidden, layers: around vectors, panels and tiles of every instruction set.
SIZES = [
    (1, 1, 3, 4, 6, 1),
    (1, 8, 5, 33, 70, 2),
    (3, 7, 6, 16, 15, 3),
    (5, 6, 4, 31, 64, 1),
    (14, 3, 3, 65, 32, 2),
    (16, 5, 8, 128, 96, 1),
    (70, 2, 5, 95, 30, 1),
    (2, 12, 8, 300, 200, 1),
]


@pytest.fixture
def threads() -> Iterator[Any]:
    """Sets torch's number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def sized(sizes: tuple[int, ...]) -> dict[str, int]:
    return dict(zip(("batch", "tokens", "input", "width", "hidden", "layers"), sizes, strict=True))


def fused(**inputs: Any) -> Any:
    return ops.context_sweep(**inputs, backend="fused")


@cells
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_results_and_gradients_keep_the_error_rule(
    cell: str, sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    inputs = CASE.inputs(cell, dtype, **sized(sizes))
    CASE.judge(inputs, dtype, function=fused, gradients=dtype != torch.float16)


@cells
@pytest.mark.parametrize("count", [2, 3, 5])
def test_threads_keep_the_error_rule(cell: str, count: int, threads: Any) -> None:
    threads(count)
    for batch in (1, 6):
        inputs = CASE.inputs(
            cell, torch.float32, batch=batch, tokens=5, input=8, width=330, hidden=270, layers=1
        )
        CASE.judge(inputs, torch.float32, function=fused)


def test_fewer_threads_than_asked_for_keep_the_error_rule() -> None:
    program = (
        "import torch, test_fused_sweep as tests\n"
        "tests.test_threads_keep_the_error_rule('context', 3, torch.set_num_threads)"
    )
    environment = {**os.environ, "OMP_THREAD_LIMIT": "2", "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=300)


@cells
@pytest.mark.parametrize("instructions", ["plain", "avx2", "avx512"])
def test_every_instruction_set_keeps_the_error_rule(
    cell: str, instructions: str, monkeypatch: pytest.MonkeyPatch, threads: Any
) -> None:
    from newllm import _C

    if instructions not in _C.cpu_instructions():
        pytest.skip(f"this machine has no {instructions}")
    threads(2)
    for kind in ("forward", "adjoint"):
        name = f"{cell}_{kind}_cpu"
        monkeypatch.setattr(_C, name, partial(getattr(_C, name), instructions=instructions))
    sizes = {"tokens": 4, "input": 8, "width": 150, "hidden": 70, "layers": 1}
    for batch in (1, 9, 17):
        for dtype in (torch.float32, torch.bfloat16):
            inputs = CASE.inputs(cell, dtype, batch=batch, **sizes)
            CASE.judge(inputs, dtype, function=fused, gradients=dtype == torch.bfloat16)


def native(cell: str, inputs: Inputs, drive: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Contexts and last state by the operator of the cell, for a drive as it is."""
    params = inputs["params"]
    how = ("sequential", 0.0, None, True)
    if isinstance(params, ContextParams):
        given = params.weight_c, params.ln_weight, params.ln_bias
        outputs, last, _ = context_sweep(drive, *given, start, *how)
        return outputs, last
    gates = torch.stack([params.weight_f, params.weight_i, params.weight_d])
    biases = torch.stack([params.bias_f, params.bias_i, params.bias_d])
    network = params.weight_c, params.weight_h, params.bias_h
    outputs, last, _ = gated_sweep(
        drive, *network, gates, biases, params.ln_weight, params.ln_bias, start, torch.inf, *how
    )
    return outputs, last


def driven(cell: str, **sizes: int) -> tuple[Inputs, Tensor, Tensor]:
    inputs = CASE.inputs(cell, torch.float32, **sizes)
    shape = (sizes["layers"], sizes["width"]) if cell == "context" else (sizes["hidden"],)
    return inputs, torch.randn(sizes["batch"], sizes["tokens"], *shape), inputs["state"]


@cells
def test_rows_do_not_depend_on_each_other(cell: str) -> None:
    """Bit for bit: tiles of any number of rows add in the same order."""
    inputs, drive, start = driven(cell, batch=70, tokens=3, input=2, width=37, hidden=41, layers=2)
    together, last = native(cell, inputs, drive, start)
    for batch in range(1, 70):
        rows = slice(70 - batch, 70)
        outputs, end = native(cell, inputs, drive[rows].contiguous(), start[rows].contiguous())
        assert torch.equal(outputs, together[rows])
        assert torch.equal(end, last[rows])


@cells
def test_states_can_be_handed_on(cell: str) -> None:
    inputs, drive, start = driven(cell, batch=3, tokens=11, input=2, width=37, hidden=41, layers=2)
    whole, end = native(cell, inputs, drive, start)
    parts, state = [], start
    for part in drive.split([1, 4, 6], 1):
        outputs, state = native(cell, inputs, part.contiguous(), state)
        parts.append(outputs)
    assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(state, end)
    assert torch.equal(state, whole.flatten(2)[:, -1, -37:])


@cells
def test_nan_stays_in_its_row_and_after_its_token(cell: str, threads: Any) -> None:
    for count in (1, 2):
        threads(count)
        inputs, drive, start = driven(cell, batch=6, tokens=5, input=2, width=130, hidden=130, layers=1)
        clean, _ = native(cell, inputs, drive, start)
        drive[2, 3].view(-1)[7] = torch.nan
        outputs, last = native(cell, inputs, drive, start)
        assert outputs[2, 3:].isnan().all() and last[2].isnan().all()
        outputs[2, 3:], clean[2, 3:] = 0, 0
        assert torch.equal(outputs, clean)


def test_clamp_and_its_gradient() -> None:
    inputs = CASE.inputs("gated", torch.float32, batch=3, tokens=6, width=20, hidden=24)
    inputs["params"] = inputs["params"]._replace(clamp=0.75)
    contexts, _, _ = fused(**inputs)
    assert (contexts.abs() == 0.75).any() and (contexts.abs() < 0.75).any()
    CASE.judge(inputs, torch.float32, function=fused)


@cells
def test_the_operators_pass_opcheck(cell: str) -> None:
    inputs, drive, start = driven(cell, batch=2, tokens=3, input=2, width=5, hidden=6, layers=2)
    params = inputs["params"]
    how = ("sequential", 1e-5, None, True)
    if isinstance(params, ContextParams):
        tensors = [drive, params.weight_c, params.ln_weight, params.ln_bias, start]
        arguments = (*(x.requires_grad_() for x in tensors), *how)
        torch.library.opcheck(context_sweep, arguments)
        return
    assert isinstance(params, GatedParams)
    gates = torch.stack([params.weight_f, params.weight_i, params.weight_d])
    biases = torch.stack([params.bias_f, params.bias_i, params.bias_d])
    tensors = [drive, params.weight_c, params.weight_h, params.bias_h, gates, biases]
    tensors += [params.ln_weight, params.ln_bias, start]
    torch.library.opcheck(gated_sweep, (*(x.requires_grad_() for x in tensors), 0.5, *how))


# Block and auto


def contracting(tokens: int = 400, batch: int = 1) -> Inputs:
    """A recurrence that forgets within a few tokens: the input outweighs the context."""
    inputs = CASE.inputs("context", torch.float32, batch=batch, tokens=tokens, input=16, width=24, layers=1)
    params = inputs["params"]
    params = params._replace(
        weight_x=4 * params.weight_x, ln_weight=torch.ones(1, 24), ln_bias=torch.zeros(1, 24)
    )
    return {**inputs, "params": params}


def marginal(tokens: int = 400) -> Inputs:
    """With no weights the context never changes, so what enters a chunk never fades."""
    inputs = contracting(tokens)
    params = inputs["params"]._replace(
        **{
            name: torch.zeros_like(getattr(inputs["params"], name))
            for name in ("weight_c", "weight_x", "bias")
        }
    )
    return {**inputs, "params": params}


@pytest.mark.parametrize("tokens", [2400, 2401, 2407])
@pytest.mark.parametrize("method", ["block", "auto"])
@pytest.mark.parametrize("tol", [1e-3, 1e-5])
def test_block_is_sequential_to_within_its_certificate(tokens: int, method: str, tol: float) -> None:
    inputs = contracting(tokens)
    contexts, last, info = fused(**inputs, method=method, tol=tol)
    expected, end, _ = fused(**inputs, method="sequential")
    assert info.method == "block" and info.sweeps == 2
    assert info.residual <= tol and 0 < info.rho < 1
    # A jump moves the trajectory by at most tol in every one of 24 numbers, and the recurrence shrinks it.
    bound = 24**0.5 * tol / (1 - info.rho)
    assert (contexts - expected).abs().max() <= bound
    assert (last - end).abs().max() <= bound
    assert torch.equal(last, contexts[:, -1])


def test_gradients_of_block_are_those_of_the_recurrence() -> None:
    inputs = contracting()
    exact = CASE.results(lambda given: fused(**given, method="sequential"), inputs)
    found = CASE.results(lambda given: fused(**given, method="block", tol=1e-6), inputs)
    for name, gradient in found.items():
        # Borders differ by 1e-6 of what is passed on there, and each is one of at most 8.
        assert (gradient - exact[name]).abs().max() <= 8e-5 * exact[name].abs().max(), name


def test_what_does_not_contract_is_sequential_or_refused() -> None:
    inputs = marginal(2400)
    expected, _, _ = fused(**inputs, method="sequential")
    for method in ("block", "auto"):
        contexts, _, info = fused(**inputs, method=method)
        assert info.method == "sequential" and info.residual == 0
        assert info.rho == pytest.approx(1, abs=torch.finfo(torch.float32).eps ** 0.5)
        assert torch.equal(contexts, expected)
    with pytest.raises(
        RuntimeError, match=r"'block' does not converge: a token multiplies differences by about 1"
    ):
        fused(**inputs, method="block", fallback=False)
    with pytest.raises(
        RuntimeError, match=r"'block' does not converge: chunks of 64 tokens differ by .* after 2"
    ):
        ops.context_sweep(**inputs, method="block", fallback=False, backend="reference")


def test_a_certificate_that_is_not_reached_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimate of the first tokens may be wrong for later ones."""
    monkeypatch.setattr("newllm.ops.shooting.contraction", lambda *_: 0.5)
    contexts, _, info = fused(**marginal(), method="block")
    assert info.method == "sequential" and info.sweeps == 4
    assert torch.equal(contexts, fused(**marginal(), method="sequential")[0])
    with pytest.raises(
        RuntimeError, match=r"chunks of 100 tokens differ by .* after 3 sweeps, and tol is 1e-05"
    ):
        fused(**marginal(), method="block", fallback=False)


@pytest.mark.parametrize(("tokens", "batch"), [(20, 1), (400, 9)])
def test_auto_is_sequential_where_blocks_cannot_pay(tokens: int, batch: int) -> None:
    contexts, _, info = fused(**contracting(tokens, batch))
    assert (info.method, info.sweeps) == ("sequential", 1) and info.rho.isnan()
    assert torch.equal(contexts, fused(**contracting(tokens, batch), method="sequential")[0])


def test_rho_is_the_growth_of_a_tangent() -> None:
    """Beside the exact derivative along the same tokens: a difference of a hundredth is nearly one."""
    from newllm.reference.context import context_cell, context_drive

    inputs = contracting(48)
    params, state = inputs["params"], inputs["state"]
    drive = context_drive(inputs["x"], params)
    tangent, growth, context = torch.randn_like(state), [], state
    for token in drive.unbind(1):
        step = lambda c, token=token: context_cell(token, c, params)  # noqa: E731
        context, tangent = torch.func.jvp(step, (context,), (tangent,))
        growth.append(tangent.norm())
        tangent = tangent / tangent.norm()
    exact = torch.stack(growth[16:]).log().mean().exp()
    _, _, info = fused(**contracting(), method="block")
    assert abs(info.rho.log() / exact.log() - 1) < 0.1


def test_what_is_not_offered() -> None:
    with pytest.raises(
        RuntimeError, match="context_jacobi has no fused implementation for device type 'cpu'"
    ):
        fused(**contracting(8), method="jacobi")
    with pytest.raises(ValueError, match=r"takes? float16, bfloat16 and float32, got torch.float64"):
        fused(**CASE.inputs("context", torch.float64))
