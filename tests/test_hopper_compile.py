"""The kernels for Hopper compile everywhere, for they run on Hopper alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# What a program of one multiprocessor may have.
SHARED_MEMORY = 227 * 1024


def test_the_kernels_for_hopper_compile_without_a_gpu(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.hopper_compile"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in found] == [
        f"_infini_attention_{part}_hopper_kernel"
        for part in ("backward_keys", "backward_keys", *("forward", "backward_queries") * 2)
    ]
    for name, shared, products, idle_barriers in found:
        assert shared <= SHARED_MEMORY, name
        assert products > 0, name
        # A tile in a dead barrier's memory is overwritten where a device changes between processes.
        assert idle_barriers == [], name
