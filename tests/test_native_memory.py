"""The native sweeps under AddressSanitizer and UndefinedBehaviorSanitizer, and under ThreadSanitizer."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
from source_tree import ROOT

FLAGS = "-O0 -g1 -std=c++17 -pthread -fno-sanitize-recover=all"
DRIVER = ROOT / "tests" / "sanitized_sweeps.cpp"


def objects(native: ModuleType) -> list[tuple[Path, str, str]]:
    """What is compiled: source, flags, name of the object; as csrc/build.py does."""
    plain = [*(ROOT / "csrc").glob("cpu_*.cpp"), DRIVER]
    found = [(path, "", path.stem) for path in plain]
    for path in (ROOT / "csrc").glob("*_sweep_cpu.cpp"):
        for name, flags in native.INSTRUCTIONS.items():
            found.append((path, f"-DNEWLLM_ISA={name} {flags}", f"{path.stem}.{name}"))
    return found


def sanitized(native: ModuleType, folder: Path, sanitizers: str, sources: Path = ROOT / "csrc") -> Path:
    """The driver, compiled with ``sanitizers``; skips the test where the compiler has none."""
    compiler = native.find_compiler()
    flags = [*FLAGS.split(), f"-fsanitize={sanitizers}"]
    if compiler is None or native.compiles([*compiler.split()], native.PROBE, ".cpp", *flags):
        pytest.skip("no C++ compiler with sanitizers")

    def compiled(each: tuple[Path, str, str]) -> Path:
        path, own, name = each
        source = sources / path.name if path.parent.name == "csrc" else path
        target = folder / f"{name}.o"
        command = [*compiler.split(), *flags, *own.split(), f"-I{sources}", "-c"]
        subprocess.run([*command, str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = [*pool.map(compiled, objects(native))]
    program = folder / "sweeps"
    subprocess.run([*compiler.split(), *flags, *map(str, made), "-o", str(program)], check=True)
    return program


def run(program: Path) -> subprocess.CompletedProcess[str]:
    """The driver, all instruction sets and sizes."""
    return subprocess.run([str(program)], capture_output=True, text=True, check=False)


def test_sweeps_stay_within_their_arrays(native: ModuleType, tmp_path: Path) -> None:
    """Addresses, alignment, integers, leaks: odd sizes, every instruction set, 1 and 3 threads."""
    done = run(sanitized(native, tmp_path, "address,undefined"))
    assert (done.returncode, done.stderr) == (0, "")
    ran, sets = (int(word) for word in done.stdout.split() if word.isdigit())
    assert ran == 112 * sets and sets >= 1


@pytest.mark.slow
def test_threads_of_a_sweep_do_not_race(native: ModuleType, tmp_path: Path) -> None:
    done = run(sanitized(native, tmp_path, "thread"))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_read_beyond_a_row_is_noticed(native: ModuleType, tmp_path: Path) -> None:
    """The check itself: without the bound on what is read, the sanitizer speaks."""
    sources = tmp_path / "csrc"
    sources.mkdir()
    for path in (ROOT / "csrc").glob("*.[ch]*"):
        text = path.read_text(encoding="utf-8").replace("drive + column, width - column", "drive + column")
        (sources / path.name).write_text(text, encoding="utf-8")
    done = run(sanitized(native, tmp_path, "address,undefined", sources))
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
