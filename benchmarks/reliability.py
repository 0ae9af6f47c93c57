"""Long checks of reliability; see docs/reliability.md.

``python -m benchmarks.reliability PART`` runs one of PARTS at full size and keeps its result in
``benchmarks/results/reliability.jsonl``; ``-k WORDS`` runs those of its tests that pytest selects by them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import import_module

# Name -> the module and function that carries it out.
PARTS = {
    "crashes": "tests.suite_parts:crashes",
    "input": "tests.suite_parts:hostile_input",
    "versions": "tests.suite_parts:versions",
}


def main() -> None:
    """Run one part; the exit status is 1 where something did not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[*PARTS])
    parser.add_argument("-k", help="tests, as pytest's -k selects them")
    known = parser.parse_args()
    module, function = PARTS[known.name].split(":")
    part: Callable[[object], bool] = getattr(import_module(module), function)
    sys.exit(0 if part(known) else 1)


if __name__ == "__main__":
    main()
