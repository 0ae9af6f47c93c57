"""The figures of docs/reliability.md: the page is what the files say, and every check is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from source_tree import ROOT

from benchmarks.reliability_report import CHECKS, PAGE, filled
from tests.reliability_parts import RESULTS

FACTS = {"device": "a GPU", "torch": "2.13.0", "commit": "0123456789", "date": "2026-11-22T00:00:00"}


def lines_of(folder: Path, file: str, *rows: dict[str, Any]) -> list[str]:
    """The lines of figures that ``rows`` give."""
    (folder / f"{file}.jsonl").write_text("".join(json.dumps({**FACTS, **row}) + "\n" for row in rows))
    page = filled("before <!-- figures: begin -->old<!-- figures: end --> behind", folder)
    assert page.startswith("before ") and page.endswith(" behind") and "old" not in page
    return [line for line in page.splitlines() if "a GPU" in line]


def test_the_page_is_what_the_files_say() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert PAGE.is_relative_to(ROOT) and filled(page, RESULTS) == page


def test_checks_without_rows_say_so(tmp_path: Path) -> None:
    page = filled("<!-- figures: begin --><!-- figures: end -->", tmp_path)
    assert page.count("| not run |") == len(CHECKS)


def test_the_last_row_of_a_part_counts(tmp_path: Path) -> None:
    judged = {"part": "2/60", "rows": 256, "worst_share": 0.5, "second_looks": ["a"]}
    failed = {**judged, "failures": ["row 7: q: error 2, allowed 1"]}
    other = {**judged, "part": "3/60", "worst_share": 0.7501, "failures": ["row | 9: k: error 3, allowed 1"]}
    (line,) = lines_of(tmp_path, "rows", failed, {**judged, "failures": []}, other)
    said = "512 in 2 of 60 parts | at most 0.7501 of a bar; 2 second looks; failed: row / 9: k"
    assert line == f"| `rows` | a GPU | {said} | 2.13.0, 0123456, 2026-11-22 |"


def test_repetitions_and_tools_are_counted(tmp_path: Path) -> None:
    calls = [{"part": name, "runs": runs, "failures": []} for name, runs in (("a", 1000), ("b", 2000))]
    (line,) = lines_of(tmp_path, "determinism", *calls)
    assert "| 2 configurations, 1,000 calls or more each | none failed |" in line
    tools = [{"part": f"{tool} 1/10", "rows": 9, "failures": []} for tool in ("memcheck", "racecheck")]
    *_, first, second = lines_of(tmp_path, "sanitizer", *tools)
    assert "| memcheck: 9 rows in 1 parts | none failed |" in first and "racecheck: 9 rows" in second
