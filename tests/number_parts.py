"""The parts ``rows`` and ``fuzz`` of ``python -m benchmarks.reliability``: numbers under the error rule."""

from __future__ import annotations

from functools import partial

from tests import fuzz_families
from tests.reliability_parts import Options, Verdict, in_parts, judges, summary
from tests.row_families import DRAWS, LARGE, SECOND_LOOK, SMALL, Row, group, share

# 15,360 rows in 60 parts; a group is compiled once for all its rows.
ROWS, GROUPS_A_PART, ROWS_A_GROUP = 15_360, 8, 32
FUZZ, CASES_A_PART, CASES_A_TASK = 10_000, 500, 20


def look(row: Row, device: str) -> Verdict:
    """A row's verdict: over one draw, where that does not hold over a few, and at a second look over many."""
    found, looks = 0.0, 0
    for looks, draws in ((1, 1), (1, DRAWS), (2, SECOND_LOOK)):
        try:
            return Verdict(str(row), row.family, share(row, device, count=draws), looks)
        except AssertionError as error:
            told = str(error)
    return Verdict(str(row), row.family, found, looks, told)


def judge_group(number: int, device: str, rows: int) -> list[Verdict]:
    """The verdicts of one group."""
    scale = LARGE if device == "cuda" else SMALL
    return [look(row, device) for row in group(number, scale, rows)]


def judge_cases(numbers: range) -> list[Verdict]:
    """The verdicts of fuzz cases."""
    return [judge_case(number) for number in numbers]


def judge_case(number: int) -> Verdict:
    """The verdict of one fuzz case."""
    row = fuzz_families.drawn(number)
    name, kind = f"case {number}: {row}", row.family.split()[0]
    try:
        found, looks = fuzz_families.judged(row)
    except AssertionError as error:
        return Verdict(name, kind, 0.0, 2, str(error))
    return Verdict(name, kind, found, looks)


def rows(options: Options) -> bool:
    """Parameter rows of every operator on a GPU, in the interpreter without one."""
    count = options.count or ROWS
    groups = -(-count // ROWS_A_GROUP)
    judge = partial(judge_group, device=options.device, rows=min(count, ROWS_A_GROUP))

    with judges(options.device, options.jobs) as judged:

        def run(part: str) -> dict[str, object]:
            mine = _mine(part, groups)
            found = judged(judge, mine)
            return {"groups": [mine.start, mine.stop], **summary(each for some in found for each in some)}

        # The next part begins where the last groups of one leave processes idle.
        parts = options.parts(-(-groups // GROUPS_A_PART))
        return in_parts("rows", parts, run, options, at_once=2)


def fuzz(options: Options) -> bool:
    """Random cases on a CPU: streams cut anywhere, native sweeps, large inputs, interpreted kernels."""
    count = options.count or FUZZ

    with judges("cpu", options.jobs) as judged:

        def run(part: str) -> dict[str, object]:
            mine = _mine(part, count)
            tasks = [mine[start : start + CASES_A_TASK] for start in range(0, len(mine), CASES_A_TASK)]
            found = judged(judge_cases, tasks)
            return {"seeds": [mine.start, mine.stop], **summary(each for some in found for each in some)}

        return in_parts("fuzz", options.parts(-(-count // CASES_A_PART)), run, options)


def _mine(part: str, total: int) -> range:
    """Those of ``total`` things that part "3/8" does."""
    number, parts = (int(each) for each in part.split("/"))
    if not 1 <= number <= parts:
        raise ValueError(f"part must be K/N with K from 1 to N, got {part}")
    return range(total * (number - 1) // parts, total * number // parts)
