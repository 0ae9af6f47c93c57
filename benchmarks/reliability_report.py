"""The figures of ``docs/reliability.md``, from the rows that ``python -m benchmarks.reliability`` leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from newllm.files import read_rows, replace_file
from tests.reliability_parts import Options

PAGE = Path(__file__).resolve().parent.parent / "docs/reliability.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
Rows = Sequence[dict[str, Any]]
# What was done, what came out, and the rows that say so.
Told = tuple[str, str, Rows]


def report(options: Options) -> bool:
    """Fill the page's block from the files in ``options.out``; True."""
    page = filled(PAGE.read_text(encoding="utf-8"), options.out)
    replace_file(PAGE, lambda path: path.write_text(page, encoding="utf-8"))
    print(PAGE)
    return True


def filled(page: str, results: Path) -> str:
    """``page`` with the figures of ``results`` between its marks."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    lines = ["| check | device | done | found | torch, commits, last day |", "|---|---|---|---|---|"]
    for name, (file, told) in CHECKS.items():
        path = results / f"{file}.jsonl"
        rows = [row for row in (read_rows(path, dict) if path.exists() else []) if _is_of(row, name)]
        lines += [*_lines(name, rows, told)] or [f"| `{name}` | | not run | | |"]
    body = "\n".join(lines)
    return f"{head}{BEGIN}\n{body}\n{END}{tail}"


def _is_of(row: dict[str, Any], name: str) -> bool:
    """A file of several checks names them in its parts."""
    return "test" not in row or row["part"] == name


def _lines(name: str, rows: Rows, told: Callable[[Rows], Iterator[Told]]) -> Iterator[str]:
    for device in dict.fromkeys(row.get("device", "cpu") for row in rows):
        mine = [row for row in rows if row.get("device", "cpu") == device]
        for done, found, source in told(mine):
            commits = ", ".join(dict.fromkeys(row["commit"][:7] for row in source))
            where = f"{source[-1]['torch']}, {commits}, {max(row['date'] for row in source)[:10]}"
            yield f"| `{name}` | {device} | {done} | {found} | {where} |"


def _judged(rows: Rows) -> Iterator[Told]:
    last = _last(rows)
    total = int(last[0]["part"].split("/")[1])
    worst = max(row["worst_share"] for row in last)
    looks = sum(len(row["second_looks"]) for row in last)
    yield (
        f"{sum(row['rows'] for row in last):,} in {len(last)} of {total} parts",
        f"at most {worst:.4f} of a bar; {looks} second looks; {_failures(last)}",
        last,
    )


def _repeated(rows: Rows) -> Iterator[Told]:
    last = _last(rows)
    runs = min(row["runs"] for row in last)
    yield f"{len(last)} configurations, {runs:,} calls or more each", _failures(last), last


def _sanitized(rows: Rows) -> Iterator[Told]:
    last = _last(rows)
    for tool in dict.fromkeys(row["part"].split()[0] for row in last):
        mine = [row for row in last if row["part"].startswith(tool)]
        yield f"{tool}: {sum(row['rows'] for row in mine)} rows in {len(mine)} parts", _failures(mine), mine


def _soaked(rows: Rows) -> Iterator[Told]:
    """Each run: its streams were measured together."""
    for date in dict.fromkeys(row["date"] for row in rows):
        run = [row for row in rows if row["date"] == date]
        worst = max(error for row in run for error in row["errors"].values())
        memories = [run[0][name] for name in ("resident_mb", "device_mb") if name in run[0]]
        held = " and ".join(f"{memory['first']:.1f} to {memory['last']:.1f}" for memory in memories)
        yield (
            f"{run[0]['tokens_now']:,} tokens of {', '.join(row['part'] for row in run)}, "
            f"to {run[0]['tokens']:,}; {run[0]['minutes']:.0f} minutes",
            f"errors at most {worst:.1e}, allowed {run[0]['bound']:.3g}; {held} MB; {_failures(run)}",
            run,
        )


def _opened(rows: Rows) -> Iterator[Told]:
    row = rows[-1]
    memory, grown = row["resident_mb"], row["grown_bytes_a_session"]
    yield (
        f"{row['sessions']:,} sessions",
        f"{memory[0]:.1f} to {memory[-1]:.1f} MB, {grown:+.0f} bytes a session; {_failures([row])}",
        [row],
    )


def _crashed(rows: Rows) -> Iterator[Told]:
    yield f"{sum(row['crashes'] for row in rows)} crashes of {len(rows)} activities", "none amiss", rows


def _damaged(rows: Rows) -> Iterator[Told]:
    yield (
        f"{sum(row['mutants'] for row in rows):,} mutants of {len(rows)} kinds of files",
        f"{sum(row.get('read', 0) for row in rows):,} read, "
        f"{sum(row.get('refused', 0) for row in rows):,} refused, none amiss",
        rows,
    )


def _installed(rows: Rows) -> Iterator[Told]:
    for row in rows:
        how = row["test"].split("[")[1].rstrip("]")
        yield (
            f"{how}: {row['sdist_bytes']:,} bytes, installed in {row['install_seconds']:.0f} s",
            f"native extension {row['extension']}",
            [row],
        )


def _last(rows: Rows) -> Rows:
    """The last row of each part."""
    return [*{row["part"]: row for row in rows}.values()]


def _failures(rows: Rows) -> str:
    found = [
        str(failure).split(": error")[0].replace("|", "/") for row in rows for failure in row["failures"]
    ]
    return f"failed: {'; '.join(dict.fromkeys(found))}" if found else "none failed"


# Check -> the file of its rows, and what is told of them. Of tests, only those that held leave rows.
CHECKS: dict[str, tuple[str, Callable[[Rows], Iterator[Told]]]] = {
    "rows": ("rows", _judged),
    "fuzz": ("fuzz", _judged),
    "determinism": ("determinism", _repeated),
    "sanitize": ("sanitizer", _sanitized),
    "soak": ("soak", _soaked),
    "sessions": ("sessions", _opened),
    "crashes": ("reliability", _crashed),
    "input": ("reliability", _damaged),
    "versions": ("reliability", _installed),
}
