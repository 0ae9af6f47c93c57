"""The promises of ``docs/reliability.md`` tested at full size; the last result of each part is kept.

``python -m benchmarks.reliability PART`` runs the tests of one of PARTS with pytest, those marked ``slow``
included, and replaces the part's row in ``benchmarks/results/reliability.jsonl``: what passed and failed, the
counts and seeds that the tests themselves report (``record_property``), seconds, command, versions, devices
and commit. Exits with pytest's own code; a red part keeps its old row.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from newllm.files import replace_file
from newllm.runs import provenance

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/reliability.jsonl"
PARTS: dict[str, tuple[str, ...]] = {
    "crashes": ("tests/test_crashes.py", "tests/test_never_lose.py"),
    "input": ("tests/test_untrusted_input.py", "tests/test_no_code.py"),
    "versions": ("tests/test_versions.py", "tests/test_packaging.py"),
}
"""Part -> the arguments of pytest that choose its tests."""


def measured(report: Path) -> dict[str, Any]:
    """What a JUnit report of pytest says: counts of tests, and what each of them reported."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    bad = {
        kind: sum(case.find(kind) is not None for case in cases) for kind in ("failure", "error", "skipped")
    }
    reported = {
        case.attrib["name"]: {each.attrib["name"]: number(each.attrib["value"]) for each in found}
        for case in cases
        if (found := case.findall("properties/property"))
    }
    return {"passed": len(cases) - sum(bad.values()), **bad, "reported": reported}


def number(text: str) -> int | float | str:
    """A property's value as what it looks like."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def replace_row(row: dict[str, Any], path: Path = RESULTS) -> None:
    """Put ``row`` in the place of the one of its part."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [*(old for old in map(json.loads, lines) if old["part"] != row["part"]), row]
    text = "".join(f"{json.dumps(each)}\n" for each in sorted(rows, key=lambda each: str(each["part"])))
    replace_file(path, lambda file: file.write_text(text, encoding="utf-8"))


def main() -> int:
    """Run one part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part", choices=PARTS)
    part = parser.parse_args().part
    words = ["-m", "slow or not slow", "-p", "no:cacheprovider", *PARTS[part]]
    with tempfile.TemporaryDirectory() as folder:
        report, started = Path(folder) / "report.xml", time.perf_counter()
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "-o", "junit_family=xunit1"]
        code = subprocess.run([*command, *words], cwd=ROOT, check=False).returncode
        if code == 0:
            seconds = round(time.perf_counter() - started, 1)
            ran = {"part": part, "command": f"python -m benchmarks.reliability {part}", "seconds": seconds}
            replace_row({**ran, **measured(report), **provenance(0)})
    return code


if __name__ == "__main__":
    sys.exit(main())
