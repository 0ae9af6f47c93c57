"""What every test shares: no network, one thread, fixed seeds, and memory that is never accidentally zero."""

from __future__ import annotations

import gc
import importlib.util
import os
import tempfile

# Read when huggingface_hub is first imported, so it has to be set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
# One thread, in processes that tests start, too: their tensors are small, and sums come out alike anywhere.
os.environ["OMP_NUM_THREADS"] = "1"

import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import settings
from interpreter import quicken
from processes import device_share
from source_tree import ROOT

from newllm import backend

# Read when a kernel's file is first imported: without a GPU, Triton's interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Where a plugin has imported PyTorch before.
torch.set_num_threads(1)

# No deadline, since the first call of an operator may compile; derandomised, so that a red test stays red.
settings.register_profile("newllm", deadline=None, derandomize=True, database=None)
settings.load_profile("newllm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` on a machine without a CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Let no garbage collection of a test look through what all modules hold: that takes it half a second."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """What was set aside may be freed."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """Triton's interpreter as the tests need it, where it runs the kernels."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available() and backend.installed("triton"):
            quicken(patch)
        yield


@pytest.fixture
def fused_device(monkeypatch: pytest.MonkeyPatch) -> str:
    """The device that runs kernels: "cuda", or "cpu" where the interpreter takes their place."""
    if torch.cuda.is_available():
        return "cuda"
    for op, devices in backend.FUSED.items():
        if "cuda" in devices:
            monkeypatch.setitem(backend.FUSED, op, devices | {"cpu"})
    return "cpu"


@pytest.fixture(autouse=True)
def device_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Give a GPU's memory back after each test; one marked ``large`` has all to itself."""
    if not torch.cuda.is_available() or not request.node.get_closest_marker("gpu"):
        yield
        return
    with device_share(Path(tempfile.gettempdir()), alone=bool(request.node.get_closest_marker("large"))):
        yield
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def native() -> ModuleType:
    """``csrc/build.py``."""
    spec = importlib.util.spec_from_file_location("csrc_build", ROOT / "csrc" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def seed() -> int:
    """The seed that every test starts from."""
    value = 0
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fill uninitialised tensors with NaN (integers: their largest value), unless marked ``no_poison``.

    PyTorch's own switch does this below Python, for ``empty``, ``empty_like``, ``new_empty``,
    ``empty_strided`` and ``resize_`` alike.
    """
    if request.node.get_closest_marker("no_poison"):
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
