"""The measurement of several GPUs: parts that end, fail and hang, and the rows of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from source_tree import ROOT

from benchmarks.scale_out import together


def ranks(code: str, seconds: float = 20.0) -> str | None:
    """What is said of two ranks that run ``code``."""
    place = "import os, sys, time; rank, size = int(os.environ['RANK']), int(os.environ['WORLD_SIZE']); "
    return together([sys.executable, "-c", place + code], 2, seconds)


def test_ranks_that_end_well() -> None:
    assert ranks("assert size == 2 and os.environ['MASTER_PORT']") is None


def test_a_rank_that_fails_is_named_and_the_others_end() -> None:
    began = time.monotonic()
    assert ranks("sys.exit(3) if rank == 1 else time.sleep(60)") == "rank 1 ended with 3"
    assert time.monotonic() - began < 20


def test_nothing_is_left_of_ranks_that_hang(tmp_path: Path) -> None:
    said = ranks(f"open(f'{tmp_path}/{{os.getpid()}}', 'w'); time.sleep(60)", 1.5)
    assert said == "out of time, 2 seconds"
    pids = [path.name for path in tmp_path.iterdir()]
    assert len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.slow
def test_every_part_has_rows_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/scale_out.py", "--out", str(tmp_path), "--seconds", "0.1"]
    more = ["--parts", "exact", "layer", "step", "prefill", "forward", "hop", "--patience", "10"]
    subprocess.run([*command, *more], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    rows = [json.loads(line) for line in (tmp_path / "scale_out.jsonl").read_text().splitlines()]
    assert {row["part"] for row in rows} >= {"exact", "layer speedup", "step speedup", "prefill speedup",
                                             "forward", "hop"}  # fmt: skip
    assert all(row["output_bits"] for row in rows if row.get("rule") == "linear")
