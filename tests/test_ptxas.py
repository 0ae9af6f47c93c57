"""The ptxas that compiles the kernels: never one that forgets half an address."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest

knobs = pytest.importorskip("triton.knobs")

from newllm.kernels.compiler import FIRST_SOUND, choose_ptxas  # noqa: E402


def version() -> tuple[int, ...]:
    return tuple(map(int, knobs.nvidia.ptxas.version.split(".")))


def named(folder: Path, release: str) -> str:
    """A program that says it is a ptxas of this release."""
    path = folder / f"ptxas-{release}"
    path.write_text(f"#!{sys.executable}\nprint('Cuda compilation tools, release {release}, V{release}.1')\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Whatever a test chooses is forgotten after it."""
    monkeypatch.setattr(knobs, "propagate_env", False)
    monkeypatch.setattr(knobs, "nvidia", knobs.nvidia.copy())
    return tmp_path


def test_kernels_are_never_compiled_by_an_old_one() -> None:
    assert version() >= FIRST_SOUND


@pytest.mark.parametrize(("first", "second", "taken"), [("12.8", "12.9", (12, 9)), ("13.1", "12.9", (13, 1))])
def test_the_first_sound_one_is_taken(first: str, second: str, taken: tuple[int, int], tools: Path) -> None:
    knobs.nvidia.ptxas, knobs.nvidia.ptxas_blackwell = named(tools, first), named(tools, second)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose_ptxas()
    assert version() == taken


def test_old_ones_alone_are_told_of(tools: Path) -> None:
    knobs.nvidia.ptxas = knobs.nvidia.ptxas_blackwell = old = named(tools, "12.8")
    with pytest.warns(UserWarning, match=r"ptxas 12\.8 at .* let TRITON_PTXAS_PATH name a ptxas of .* 12\.9"):
        choose_ptxas()
    assert knobs.nvidia.ptxas.path == old
