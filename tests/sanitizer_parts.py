"""The part ``sanitize`` of ``python -m benchmarks.reliability``: kernels under NVIDIA's compute-sanitizer.

Every option of every operator once in every dtype, forwards and backwards, at small odd sizes: together they
launch every kernel. The part compiles them first, then lets each tool see all of them in parts; options that
it does not know go to compute-sanitizer, and ``--dry-run`` prints what it would run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from newllm.evaluation.rows import RowFile
from tests.reliability_parts import Options, in_parts, judges
from tests.row_families import DTYPES, FAMILIES, Row, Sizes, judged_gradients

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
# The slowest first: the others fill what it leaves idle.
TOOLS = ("racecheck", "memcheck", "initcheck", "synccheck")
# Prime to the number of widths: the slow, wide rows lie in all parts.
PARTS = 19
# Kernels that not all dtypes have.
DTYPES_OF = {
    "_infini_attention_backward_slopes_kernel": (torch.float32,),
    "_gemv_together_kernel": (torch.bfloat16, torch.float16),
}
# Some rows have more barriers in shared memory than the tool has room for by itself; 65,536 take gigabytes.
_OPTIONS = {"synccheck": ("--num-cuda-barriers", "4096")}
# The exit status with which a tool says that it found something.
FOUND = 66
_WIDTHS = ((64, 64), (16, 24), (80, 96), (128, 40), (256, 256))
_HEADS = {"batch": 2, "heads": 4, "kv_heads": 2}
_LENGTHS = {"tokens": 37, "window": 21, "segment": 17, "before": 43}
# Few rows and many, one layer and several, widths beyond a cluster: what the kernels differ in.
_SWEPT: dict[str, list[Sizes]] = {
    "context": [
        {"batch": batch, "tokens": 5, "input": 5, "width": width, "layers": layers}
        for batch, width, layers in
        [(1, 33, 1), (1, 768, 1), (3, 257, 1), (9, 768, 1), (30, 129, 1), (130, 96, 1), (3, 129, 2),
         (2, 1100, 1)]
    ],
    "gated": [
        {"batch": batch, "tokens": 4, "input": 5, "width": width, "hidden": hidden, "layers": deeper}
        for batch, width, hidden, deeper in
        [(1, 32, 70, 1), (9, 100, 33, 0), (9, 768, 700, 0), (3, 129, 64, 3)]
    ],
}  # fmt: skip
# Very few vectors, and a few more, which float32 does not have.
_MULTIPLIED = (
    {"batch": 3, "width": 70, "query": 33, "key": 20, "value": 7},
    {"batch": 9, "width": 1100, "query": 33, "key": 20, "value": 7},
)
SWEEPS = {
    f"{cell}{direction} {kernel} {dtype}"
    for cell, kernel, dtypes in (
        ("Context", "cluster", ("float32", "bfloat16")),
        ("Context", "tensor", ("bfloat16",)),
        ("Context", "grid", ("float32", "bfloat16")),
        ("Gated", "cluster", ("bfloat16",)),
        ("Gated", "grid", ("float32", "bfloat16")),
    )
    for dtype in dtypes
    for direction in ("Forward", "Adjoint")
}


def rows() -> list[Row]:
    """The named list: at most 300."""
    return [*_rows()]


def _rows() -> Iterator[Row]:
    widths = cycle(_WIDTHS)
    for name, family in FAMILIES.items():
        for option in family.options:
            for dtype in DTYPES:
                if name == "context_sweep":
                    yield from (Row(name, option, dtype, sizes, 0) for sizes in _SWEPT[option])
                    continue
                if name == "gemv":
                    few = _MULTIPLIED[: 1 if dtype == torch.float32 else 2]
                    yield from (Row(name, option, dtype, sizes, 0) for sizes in few)
                    continue
                key, value = next(widths)
                lengths = {x: n for x, n in _LENGTHS.items() if name in ("layer", "window") or x != "before"}
                if "local" in option:
                    lengths["window"] = lengths["segment"]
                yield Row(name, option, dtype, {**_HEADS, "key": key, "value": value, **lengths}, 0)
    for name in ("layer", "window"):
        lengths = (
            {**_LENGTHS, "tokens": 36} if name == "layer" else {"tokens": 36, "window": 21, "segment": 17}
        )
        sizes = {**_HEADS, "key": 128, "value": 128, **lengths}
        yield Row(name, FAMILIES[name].options[0], torch.bfloat16, sizes, 0)
    # More tiles than an H100 has multiprocessors, so that a program takes a second one.
    sizes = {**_HEADS, "key": 128, "value": 128, "tokens": 2200, "window": 70, "segment": 64, "before": 43}
    yield Row("layer", "learned delta padded stream", torch.bfloat16, sizes, 0)
    for dtype in DTYPES:
        sizes = {"batch": 3, "tokens": 21, "input": 5, "width": 129, "layers": 2}
        yield Row("context_sweep", "jacobi", dtype, sizes, 0)


def kernels() -> set[str]:
    """The kernels there are in Triton and Gluon, by name."""
    lines = [line for path in KERNELS.glob("*.py") for line in path.read_text(encoding="utf-8").splitlines()]
    names = (line.removeprefix("def ").split("(")[0] for line in lines if line.startswith("def _"))
    return {name for name in names if name.endswith("_kernel")}


class Launched:
    """While it is entered, the kernels that are launched, by name and dtype; ``skip``: none is run."""

    def __init__(self, skip: bool = False) -> None:
        self.skip, self.found = skip, set[str]()
        self.dtype = ""

    def __enter__(self) -> Launched:
        from newllm.kernels import rotate
        from newllm.ops import native

        self._kind: Any = type(rotate._rotate_kernel)
        self._native: Any = native
        self._replaced = run, planned = self._kind.run, native.planned

        def launched(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            self.found.add(f"{kernel.fn.__name__} {self.dtype}")
            return None if self.skip else run(kernel, *args, **kwargs)

        def counted(kind: str, *args: Any, **kwargs: Any) -> Any:
            plan = planned(kind, *args, **kwargs)
            self.found.add(f"{kind} {plan.kernel} {_title(args[2])}")
            return plan

        self._kind.run, native.planned = launched, counted  # type: ignore[assignment]
        return self

    def __exit__(self, *raised: object) -> None:
        self._kind.run, self._native.planned = self._replaced

    def run(self, row: Row, device: str) -> None:
        """Results and gradients of a row by the kernels."""
        self.dtype = _title(row.dtype)
        case = FAMILIES[row.family].case(row.option)
        inputs = case.inputs("changed", row.dtype, device=device, seed=row.seed, **row.sizes)
        call = partial(case.call, function=partial(case.public, backend="fused"))
        case.results(call, inputs, judged_gradients(row, inputs) or device == "cuda")
        if device == "cuda":
            torch.cuda.synchronize()


def gpu_only() -> set[str]:
    """What no interpreter runs: the native sweeps, Jacobi's, the kernels for Hopper in their only dtype."""
    hopper = {f"{name} bfloat16" for name in kernels() if name.endswith("_hopper_kernel")}
    swept = [name for name in kernels() if name.startswith("_context_")]
    return SWEEPS | hopper | {f"{name} {_title(dtype)}" for name in swept for dtype in DTYPES}


def missing(found: set[str]) -> list[str]:
    """The kernels, by dtype, that ``found`` lacks."""
    portable = {name for name in kernels() if not name.endswith("_hopper_kernel")}
    wanted = {f"{name} {_title(dtype)}" for name in portable for dtype in DTYPES_OF.get(name, DTYPES)}
    return sorted((wanted | gpu_only()) - found)


def _title(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run_rows(options: Options) -> bool:
    """The rows of one part, in this process; names what it launched in ``out``/kernels.json."""
    mine = _mine(options.part or "1/1")
    written = _products_into_zeros(options.device.upper())
    with Launched() as launched:
        for row in mine:
            print(row, flush=True)
            launched.run(row, options.device)
    del written
    (options.out / "kernels.json").write_text(json.dumps(sorted(launched.found)), encoding="utf-8")
    return True


def _products_into_zeros(key: str) -> torch.library.Library:
    """While it lives, torch's products on a device are into memory that was written.

    initcheck does not see all that cuBLAS stores: under it ``torch.mm`` of two bfloat16 matrices is by itself
    reported as not written, all of it.
    """
    library = torch.library.Library("aten", "IMPL")
    for name in ("mm", "bmm"):
        into = getattr(torch.ops.aten, name)
        library.impl(name, partial(_into_zeros, into.out), key)
        library.impl(f"{name}.dtype", partial(_into_zeros, into.dtype_out), key)
    return library


def _into_zeros(product: Any, x: Tensor, matrix: Tensor, *dtype: torch.dtype) -> Tensor:
    zeros = torch.zeros(*x.shape[:-1], matrix.shape[-1], dtype=(*dtype, x.dtype)[0], device=x.device)
    return product(x, matrix, *dtype, out=zeros)


def command(tool: str, part: str, folder: Path, others: tuple[str, ...]) -> list[str]:
    """How a part is run under a tool."""
    sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND)]
    sanitizer += [*_OPTIONS.get(tool, ()), *others]
    row = [sys.executable, "-m", "benchmarks.reliability", "sanitize-rows", "--device", "cuda"]
    return [*sanitizer, *row, "--part", part, "--out", str(folder)]


# The call that sends warps out, and an access to shared memory as racecheck reports it: kernel, file, line.
_SENT = "gl.warp_specialize("
_ACCESS = re.compile(r"access at (\w+)\+0x\w+ in (\w+\.py):(\d+)")
# How racecheck begins to tell of an access by one of torch's own kernels.
_TORCHS = "access at void at::native::"


def hazards(said: list[str]) -> tuple[list[str], int, int]:
    """What racecheck said of hazards, how many more are the compiler's dispatch of warps, how many torch's.

    In a warp-specialised kernel the first warps write what the others have to do, all meet at a barrier of
    those that racecheck does not follow (``barrier.sync``), the others read it, all meet again. Both are
    in lines that no access of the source is in: the kernel's first, and the call that sends the warps out.
    """
    reports = "\n".join(said).split("========= Error: ")[1:]
    ours = [each for each in reports if not _is_torchs(each)]
    real = [each for each in ours if not _is_dispatch(each)]
    lines = [line for each in real for line in each.splitlines()]
    return lines, len(ours) - len(real), len(reports) - len(ours)


def _is_torchs(report: str) -> bool:
    """Whether each access that a report tells of is in a kernel of torch's own."""
    return report.count(_TORCHS) == report.count("access at ") > 0


def _is_dispatch(report: str) -> bool:
    """Whether each access that a report tells of is known, and is the dispatch's."""
    places = _ACCESS.findall(report)
    return len(places) == report.count("access at") > 0 and all(
        kernel.endswith("_hopper_kernel") and _source(file, int(line)) in (f"def {kernel}(", _SENT)
        for kernel, file, line in places
    )


def _source(file: str, line: int) -> str:
    return (KERNELS / file).read_text(encoding="utf-8").splitlines()[line - 1].strip()


def sanitize(options: Options) -> bool:
    """Every tool over every part of the rows; a row of results for each."""
    others = tuple(word for word in options.arguments if word != "--dry-run")
    parts = [(tool, f"{number}/{PARTS}") for tool in TOOLS for number in range(1, PARTS + 1)]
    if "--dry-run" in options.arguments:
        for tool, part in parts:
            print(" ".join(command(tool, part, Path("FOLDER"), others)))
        return True
    if options.device != "cuda":
        raise RuntimeError("sanitize needs a CUDA device; --dry-run prints what it would run")
    if shutil.which("compute-sanitizer") is None:
        raise FileNotFoundError("compute-sanitizer is not on the path; the CUDA toolkit has it")
    # Triton compiles on the host, slowly under a tool; its cache serves all of them.
    shares = [f"{number}/{4 * PARTS}" for number in range(1, 4 * PARTS + 1)]
    with judges("cuda", options.jobs) as judged:
        broken = [each for some in judged(_compile, shares) for each in some]
    if broken:
        raise RuntimeError(f"rows fail without any tool: {broken}")

    def run(name: str) -> dict[str, object]:
        tool, part = name.split()
        with tempfile.TemporaryDirectory() as folder:
            # Each tensor in memory of its own, or a neighbour would hide what lies outside.
            environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            done = subprocess.run(
                command(tool, part, Path(folder), others),
                env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            told = Path(folder) / "kernels.json"
            found = json.loads(told.read_text(encoding="utf-8")) if told.exists() else []
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("=========")]
        status = f"exit status {done.returncode}"
        real, dispatched, torchs = hazards(said) if tool == "racecheck" else (said, 0, 0)
        held = done.returncode == 0 or (done.returncode == FOUND and dispatched + torchs > 0 and not real)
        # A crash ends with many lines of the interpreter's own calls.
        ended = [line for line in done.stderr.splitlines() if not line.startswith("frame #")]
        failures = [] if held else [status, *real[:40], *ended[-10:]]
        return {"rows": len(_mine(part)), "kernels": found, "said": said[-1:], "dispatched": dispatched,
                "torch_hazards": torchs, "failures": failures}  # fmt: skip

    held = in_parts("sanitizer", [f"{tool} {part}" for tool, part in parts], run, options, options.jobs)
    done = RowFile(options.out / "sanitizer.jsonl").rows
    for tool in TOOLS:
        seen = {name for row in done if row["part"].startswith(tool) for name in row["kernels"]}
        if lacking := missing(seen):
            print(f"{tool} has not seen {', '.join(lacking)}")
            held = False
    return held


def _compile(part: str) -> list[Any]:
    with Launched() as launched:
        for row in _mine(part):
            launched.run(row, "cuda")
    return []


def _mine(part: str) -> list[Row]:
    """Neighbours in the list are of one option; a part has some of each."""
    number, parts = (int(each) for each in part.split("/"))
    return rows()[number - 1 :: parts]
