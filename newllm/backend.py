"""Which implementation an operator runs, and what this installation and machine offer.

The only module of newllm that asks about devices or installed packages. An explicit ``backend=``
wins over :func:`use_backend`, which wins over the automatic choice. A named backend never falls back.
"""

from __future__ import annotations

import os
import platform
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from itertools import product
from types import TracebackType
from typing import Literal, NamedTuple, get_args

import torch

Backend = Literal["reference", "fused"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


def native() -> dict[str, str]:
    """What ``newllm._C`` says of itself; nothing where the installation has none."""
    if find_spec("newllm._C") is None:
        return {}
    info: dict[str, str] = import_module("newllm._C").build_info()
    return info


def _swept() -> frozenset[str]:
    """The device types that ``newllm._C`` was compiled for."""
    info = native()
    cuda = {"cuda"} if info and not info["cuda"].startswith("absent") else set()
    return frozenset({"cpu", *cuda}) if info else frozenset()


# Operator -> the device types for which it has a fused implementation. Jacobi's method of the context sweep
# is in Triton, its other methods are in newllm._C.
FUSED: dict[str, frozenset[str]] = {
    "memory_update": frozenset({"cuda"}),
    "memory_retrieve": frozenset({"cuda"}),
    "memory_scan": frozenset({"cuda"}),
    "window_attention": frozenset({"cuda"}),
    "infini_attention": frozenset({"cuda"}),
    "infini_decode": frozenset({"cuda"}),
    "gemv": frozenset({"cuda"}),
    "context_sweep": _swept(),
    "context_jacobi": frozenset({"cuda"}),
}

# A plain global: Dynamo guards it, which it can do neither for a ContextVar nor for a cached function.
_chosen: Backend | None = None


def resolve(
    op: str, device: torch.device, backend: str | None = None, unsupported: str | None = None
) -> Backend:
    """The backend that operator ``op`` takes on ``device``; traceable by ``torch.compile(fullgraph=True)``.

    ``backend`` is the operator's own argument; ``None`` leaves the choice to :func:`use_backend` and,
    without one, takes the fused implementation where there is one. ``unsupported`` says what the fused
    implementation does not offer of this call (None: it offers all); the automatic choice then takes
    the reference.

    Raises ValueError for an unknown operator or backend. When "fused" is asked for, here or through
    :func:`use_backend`: RuntimeError if ``op`` has no fused implementation for ``device``, ValueError
    if it has one that does not support this call.
    """
    if op not in FUSED:
        raise ValueError(f"op must be one of {', '.join(FUSED)}; got {op!r}")
    named = _chosen if backend is None else _checked(backend)
    available = device.type in FUSED[op]
    if named == "fused" and not available:
        raise RuntimeError(f"backend 'fused' cannot run: {_no_kernels(op, device)}")
    if named == "fused" and unsupported is not None:
        raise ValueError(f"backend 'fused' cannot run {op}: {unsupported}")
    if named is not None:
        return named
    return "fused" if available and unsupported is None else "reference"


class use_backend:
    """Choose the backend of every operator call that names none.

    ``use_backend("reference")`` holds until the next choice; ``with use_backend("reference"):`` until
    the end of the block; ``use_backend(None)`` returns to the automatic choice. The choice is global
    to the process. Raises ValueError for an unknown name.
    """

    def __init__(self, name: str | None) -> None:
        global _chosen
        self._previous = _chosen
        _chosen = None if name is None else _checked(name)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _chosen
        _chosen = self._previous


class Choice(NamedTuple):
    """What :func:`explain` says of one operator on one device; ``backend`` is None where a call fails."""

    op: str
    device: str
    backend: Backend | None
    reason: str


def explain() -> list[Choice]:
    """For each operator and each device of this machine, the backend that a call takes, and why."""
    return [_explain(op, device) for op in FUSED for device in devices()]


def devices() -> list[torch.device]:
    """The devices of this machine, the CPU first."""
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(cuda))]


def process() -> tuple[int, int]:
    """The number of this process and how many were launched together, as torchrun says; (0, 1) alone."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def training_device() -> torch.device:
    """The accelerator that this process trains on, or else the CPU."""
    found = devices()
    if len(found) == 1:
        return found[0]
    return found[1 + int(os.environ.get("LOCAL_RANK", 0)) % (len(found) - 1)]


def accelerator_memory() -> float:
    """GB (10^9 bytes) of the first accelerator, 0 without one."""
    found = devices()
    return torch.cuda.get_device_properties(found[1]).total_memory / 1e9 if len(found) > 1 else 0.0


def sweep_limit(device: int, width: int = 1, **sizes: int) -> str | None:
    """Why the native sweeps cannot run on this CUDA device; None if they can.

    ``sizes`` are ``layers`` of the context cell, or ``hidden`` and ``deeper`` of the gated one. While
    ``torch.compile`` traces, which cannot follow the question, the operator itself will say so.
    """
    if "cuda" not in FUSED["context_sweep"] or torch.compiler.is_compiling():
        return None
    return _refusal(device, width=width, **(sizes or {"layers": 1}))


@cache
def _refusal(device: int, **sizes: int) -> str | None:
    """Why some sweep of these sizes cannot run, in either direction, of a single row or of many."""
    module = import_module("newllm._C")
    plan = module.plan_gated_sweep if "hidden" in sizes else module.plan_context_sweep
    for adjoint, runs in product((False, True), (1, 1024)):
        reason: str | None = plan(adjoint=adjoint, runs=runs, bfloat16=False, device=device, **sizes).reason
        if reason is not None:
            return reason
    return None


def build_info() -> dict[str, str]:
    """Versions, the native extension and the devices, as text: for ``newllm doctor`` and for run records."""
    from newllm import __version__

    packages = {name: version_of(name) for name in ("triton", "transformers")}
    return {
        "newllm": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **packages,
        "native": _native(),
        "devices": ", ".join(_describe(device) for device in devices()),
    }


def unsupported() -> list[str]:
    """Installed packages outside of the ranges in newllm's own metadata; none known from bare sources."""
    from packaging.requirements import Requirement

    try:
        declared = [Requirement(text) for text in requires("newllm") or ()]
    except PackageNotFoundError:
        return []
    needed = [each for each in declared if each.marker is None or each.marker.evaluate({"extra": ""})]
    found = [(each, version_of(each.name)) for each in needed]
    return [
        f"{each.name} {has} (supported: {','.join(sorted(map(str, each.specifier), reverse=True))})"
        for each, has in found
        if has != "not installed" and not each.specifier.contains(has, prereleases=True)
    ]


def installed(module: str) -> bool:
    """Whether ``module``, a dotted name, can be found; the packages around it are imported to look."""
    parts = module.split(".")
    return all(find_spec(".".join(parts[:depth])) is not None for depth in range(1, len(parts) + 1))


def version_of(package: str) -> str:
    """The version of an installed package, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _checked(name: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    return name


def _no_kernels(op: str, device: torch.device) -> str:
    return f"{op} has no fused implementation for device type {device.type!r}"


def _why_not_fused(op: str, device: torch.device) -> str | None:
    """Why every call of ``op`` on ``device`` takes the reference; None where calls can be fused."""
    if device.type not in FUSED[op]:
        return _no_kernels(op, device)
    limit = sweep_limit(device.index) if op == "context_sweep" and device.type == "cuda" else None
    return f"{op} cannot be fused on {device}: {limit}" if limit else None


def _explain(op: str, device: torch.device) -> Choice:
    problem = _why_not_fused(op, device)
    if _chosen is None:
        reason = problem or f"automatic: {op} has a fused implementation"
        return Choice(op, str(device), "reference" if problem else "fused", reason)
    if _chosen == "fused" and problem:
        return Choice(op, str(device), None, f"use_backend('fused'), but {problem}")
    return Choice(op, str(device), _chosen, f"use_backend({_chosen!r})")


def _native() -> str:
    info = native()
    if not info:
        return "absent: no C++ compiler worked when newllm was installed, or it runs from sources as they are"
    return f"present, by {info['compiler']}; CPU: {info['cpu']}; CUDA: {info['cuda']}"


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return f"{device} ({torch.cuda.get_device_name(device)})"
