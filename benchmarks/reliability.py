"""Long checks of reliability, in parts of minutes that a second call goes on with; see docs/reliability.md.

``python -m benchmarks.reliability PART`` runs what ``benchmarks/results/PART.jsonl`` lacks for this device,
until ``--minutes`` are over, and appends a row for each part done. ``--part 3/60`` runs that one alone.
``report`` fills the page's figures from these files.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch

from tests.reliability_parts import RESULTS, Options

# Name -> the module and function that carries it out.
PARTS = {
    "rows": "tests.number_parts:rows",
    "fuzz": "tests.number_parts:fuzz",
    "determinism": "tests.determinism_parts:determinism",
    "sanitize": "tests.sanitizer_parts:sanitize",
    "sanitize-rows": "tests.sanitizer_parts:run_rows",
    "soak": "tests.soak_parts:soak",
    "sessions": "tests.soak_parts:sessions",
    "crashes": "tests.suite_parts:crashes",
    "input": "tests.suite_parts:hostile_input",
    "versions": "tests.suite_parts:versions",
    "report": "benchmarks.reliability_report:report",
}


def main() -> None:
    """Read the options, run one part; the exit status is 1 where something did not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[*PARTS])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin nothing that would end later")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes")
    parser.add_argument("--count", type=int, help="rows, cases, runs or sessions; what is full by default")
    parser.add_argument("--part", help="K/N: only this part")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--resume", action="store_true", help="go on where the last call stopped (soak)")
    parser.add_argument("-k", help="tests of crashes, input and versions, as pytest's -k selects them")
    parser.add_argument("--commit", help="of a checkout without its history")
    known, others = parser.parse_known_args()
    if known.device == "cpu":
        # Read when a kernel's file is first imported, here and in the processes that this one starts.
        os.environ["TRITON_INTERPRET"] = "1"
    module, function = PARTS[known.name].split(":")
    part: Callable[[Options], bool] = getattr(import_module(module), function)
    given = {key: value for key, value in vars(known).items() if key != "name"}
    sys.exit(0 if part(Options(**given, arguments=tuple(others))) else 1)


if __name__ == "__main__":
    main()
