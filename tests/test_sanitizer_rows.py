"""The rows that compute-sanitizer sees launch every kernel in each of its dtypes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.reliability_parts import Options
from tests.sanitizer_parts import (
    KERNELS,
    PARTS,
    TOOLS,
    Launched,
    _mine,
    gpu_only,
    hazards,
    kernels,
    missing,
    rows,
    sanitize,
)


def test_the_list_is_short_and_named() -> None:
    found = rows()
    assert len({str(row) for row in found}) == len(found) <= 300
    assert sorted(str(row) for part in range(1, PARTS + 1) for row in _mine(f"{part}/{PARTS}")) == sorted(
        map(str, found)
    )


def test_every_kernel_is_launched_in_each_of_its_dtypes(fused_device: str) -> None:
    """None is run: what is launched does not depend on what the others computed."""
    assert len(kernels()) > 15
    with Launched(skip=True) as launched:
        for row in rows():
            if row.family != "context_sweep":
                launched.run(row, fused_device)
    on_hopper = fused_device == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    swept = {name for name in gpu_only() if "_hopper_" not in name}
    assert set(missing(launched.found)) == (swept if on_hopper else gpu_only())


def test_a_kernel_that_no_row_launches_is_named(fused_device: str) -> None:
    with Launched(skip=True) as launched:
        for row in rows():
            if row.family == "layer" and row.dtype == torch.float32:
                launched.run(row, fused_device)
    assert "_memory_retrieve_forward_kernel float32" in missing(launched.found)
    assert "_infini_attention_forward_kernel bfloat16" in missing(launched.found)
    assert "_infini_attention_forward_kernel float32" not in missing(launched.found)


def test_every_tool_sees_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = Options("cpu", 9, 1, None, None, tmp_path, arguments=("--dry-run", "--print-limit", "5"))
    assert sanitize(options)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(TOOLS) * PARTS
    assert lines[0].startswith("compute-sanitizer --tool racecheck --error-exitcode 66 --print-limit 5 ")
    assert lines[0].endswith(f"sanitize-rows --device cuda --part 1/{PARTS} --out FOLDER")


def _hazard(kernel: str, file: str, *lines: int) -> list[str]:
    places = [f"Write access at {kernel}+0x3a0 in {file}:{line}" for line in lines]
    return [f"========= Error: Race reported between {places[0]}",
            *(f"=========     and {place} [13 hazards]" for place in places[1:]), "========= "]  # fmt: skip


def test_hazards_of_the_compilers_dispatch_are_told_apart() -> None:
    kernel, file = "_infini_attention_forward_hopper_kernel", "attention_hopper_forward.py"
    lines = [line.strip() for line in (KERNELS / file).read_text(encoding="utf-8").splitlines()]
    start, sent = lines.index(f"def {kernel}(") + 1, lines.index("gl.warp_specialize(") + 1
    dispatch, own = _hazard(kernel, file, start, sent), _hazard(kernel, file, start, sent + 3)
    portable = _hazard("_rotate_kernel", "rotate.py", 33, 33)
    assert hazards([*dispatch, *dispatch]) == ([], 2, 0)
    real, dispatched, _ = hazards([*own, *dispatch, *portable])
    assert dispatched == 1 and len(real) == len(own) + len(portable)
    assert f":{sent + 3}" in real[1] and "rotate.py:33" in real[3]
    # An access that is not understood is nobody's dispatch, alone or beside one that is.
    unknown = "========= Error: Race reported between Write access at sweep_grid_kernel+0x3a0"
    assert hazards([unknown])[1] == 0
    assert hazards([*dispatch, unknown.removeprefix("========= Error: ")])[1] == 0


def test_hazards_of_torchs_own_kernels_are_told_apart() -> None:
    place = "access at void at::native::reduce_kernel<(int)512, (int)1>(T3)+0xe960"
    torchs = [f"========= Error: Race reported between Read {place}", f"=========     and Write {place}"]
    assert hazards([*torchs, *torchs]) == ([], 0, 2)
    beside = _hazard("_rotate_kernel", "rotate.py", 33)
    real, dispatched, found = hazards([*torchs, *beside])
    assert "rotate.py:33" in real[0] and (dispatched, found) == (0, 1)
    both = [*torchs, "=========     and Write access at _rotate_kernel+0x3a0 in rotate.py:33"]
    assert len(hazards(both)[0]) == len(both)


def test_without_a_gpu_the_tools_are_not_run(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="sanitize needs a CUDA device"):
        sanitize(Options("cpu", 9, 1, None, None, tmp_path))
