"""Parts of ``benchmarks/reliability.py`` that are tests at full size: what they count becomes a result."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from newllm.files import read_rows, replace_file
from newllm.runs import provenance
from tests.reliability_parts import Options

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/reliability.jsonl"
SUITES: dict[str, tuple[str, ...]] = {
    "crashes": ("tests/test_crashes.py", "tests/test_never_lose.py"),
    "input": ("tests/test_untrusted_input.py", "tests/test_no_code.py"),
    "versions": ("tests/test_versions.py", "tests/test_packaging.py"),
}


def run(suite: str, options: Options) -> bool:
    """Run the tests of ``suite`` that ``options.k`` selects (None: all), slow ones too; whether all held.

    The row of each test that held and counted something is replaced.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        how = ["-q", "-m", "slow or not slow", "-p", "no:cacheprovider", "-o", "junit_family=xunit1"]
        chosen = [*SUITES[suite], *(["-k", options.k] if options.k else [])]
        command = [sys.executable, "-m", "pytest", *how, f"--junitxml={report}", *chosen]
        done = subprocess.run(command, cwd=ROOT, check=False)
        held = provenance(0)
        replace_rows([{"part": suite, **row, **held} for row in counted(report)])
    return done.returncode == 0


crashes, hostile_input, versions = (partial(run, suite) for suite in SUITES)


def counted(report: Path) -> list[dict[str, Any]]:
    """What the tests in a JUnit report of pytest recorded, those that held."""
    return [
        {
            "test": case.attrib["name"],
            "seconds_taken": float(case.attrib["time"]),
            **{each.attrib["name"]: _number(each.attrib["value"]) for each in found},
        }
        for case in ElementTree.parse(report).getroot().iter("testcase")
        if case.find("failure") is None and case.find("error") is None
        if (found := case.findall("properties/property"))
    ]


def _number(text: str) -> float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def replace_rows(rows: list[dict[str, Any]], path: Path = RESULTS) -> None:
    """Put ``rows`` in the places of those of the same parts and tests."""
    known = {(row["part"], row["test"]): row for row in (read_rows(path, dict) if path.exists() else [])}
    known |= {(row["part"], row["test"]): row for row in rows}
    text = "".join(f"{json.dumps(known[key])}\n" for key in sorted(known))
    replace_file(path, lambda file: file.write_text(text, encoding="utf-8"))
