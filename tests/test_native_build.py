"""How ``newllm._C`` is built: with what there is, and without a compiler not at all."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from source_tree import ROOT, files

from newllm import backend

built = pytest.mark.skipif(not backend.native(), reason="newllm._C was not built for this installation")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources, with an extension that an earlier build left."""
    for name in files():
        if name.startswith(("csrc/", "kernels/", "newllm/")) or "/" not in name:
            (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / "tree" / name)
    (tmp_path / "tree" / "newllm" / "_C.stale.so").write_text("stale")
    return tmp_path / "tree"


def build(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``setup.py build_ext --inplace`` in ``tree``."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)


def test_without_a_compiler_the_installation_is_pure(tree: Path) -> None:
    done = build(tree, CXX="/bin/false")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler works; installing without newllm._C" in done.stderr
    assert not [*tree.rglob("_C*.so")]
    code = (
        # An editable installation offers its own extension to every newllm that lacks one.
        "import sys;"
        "sys.meta_path = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')];"
        "from newllm import backend; print(backend.build_info()['native']);"
        "print(*(sorted(backend.FUSED[f'context_{way}']) for way in ('sweep', 'jacobi')));"
        "print({c.op: c.reason for c in backend.explain()}['context_sweep'])"
    )
    env = {**os.environ, "PYTHONPATH": str(tree), "CUDA_VISIBLE_DEVICES": ""}
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env=env, capture_output=True, text=True, check=True
    )
    assert said.stdout.splitlines() == [
        "absent: no C++ compiler worked when newllm was installed, or it runs from sources as they are",
        "[] ['cuda']",
        "context_sweep has no fused implementation for device type 'cpu'",
    ]


@built
def test_a_failure_of_our_own_sources_is_an_error_with_its_log(tree: Path) -> None:
    # All sources include it, so that the first of them fails at once.
    (tree / "csrc" / "context_sweep.h").write_text("int broken = nonsense;\n")
    done = build(tree)
    assert done.returncode != 0
    assert "newllm._C does not compile" in done.stderr
    assert "nonsense" in done.stderr
    assert not [*tree.rglob("_C*.so")]


@built
def test_the_extension_says_what_it_was_built_with() -> None:
    info = backend.native()
    assert info.keys() == {"compiler", "cpu", "cuda"}
    assert info["cpu"] in ("plain", "avx2", "avx512")
    assert info["cuda"].startswith(("absent: ", "sm_"))
    assert info["compiler"] in backend.build_info()["native"]
    assert info["cpu"] in backend.build_info()["native"]


@built
def test_the_extension_needs_no_torch_and_leaks_no_symbols() -> None:
    spec = importlib.util.find_spec("newllm._C")
    assert spec is not None and spec.origin is not None
    code = (
        "import importlib.util as u, sys;"
        f"s = u.spec_from_file_location('newllm._C', {spec.origin!r}); m = u.module_from_spec(s);"
        "s.loader.exec_module(m); assert 'torch' not in sys.modules; print(m.build_info()['cpu'])"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == backend.native()["cpu"]
    symbols = subprocess.run(["nm", "-DC", spec.origin], capture_output=True, text=True, check=True).stdout
    assert "PyInit__C" in symbols
    assert "newllm::" not in symbols


def test_cuda_is_asked_for_or_left_out(native: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = [Path("kernel.cu")]
    monkeypatch.setenv("NVCC", "/bin/false")
    for wanted in ("0", "auto"):
        monkeypatch.setenv("NEWLLM_CUDA", wanted)
        assert native.find_cuda("g++", kernels).nvcc is None
    assert native.find_cuda("g++", kernels).said.startswith("absent: /bin/false fails")
    assert native.find_cuda("g++", []).said == "absent: no CUDA sources"
    monkeypatch.setenv("NEWLLM_CUDA", "1")
    with pytest.raises(RuntimeError, match="NEWLLM_CUDA=1, but /bin/false fails"):
        native.find_cuda("g++", kernels)
    monkeypatch.setenv("NEWLLM_CUDA", "yes")
    with pytest.raises(RuntimeError, match="NEWLLM_CUDA must be auto, 0 or 1, got 'yes'"):
        native.find_cuda("g++", kernels)


def test_architectures_end_with_code_for_later_ones(
    native: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nprintf 'compute_75\\ncompute_80\\ncompute_90\\n'\n")
    nvcc.chmod(0o755)
    names, flags = native.find_architectures(str(nvcc))
    assert names == "sm_80 sm_90a compute_90"
    assert flags.split()[-2:] == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    monkeypatch.setenv("NEWLLM_CUDA_ARCHS", "86")
    assert native.find_architectures(str(nvcc))[0] == "sm_86 compute_86"
