"""Rows and bars as tables: on the screen, as plain text, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from newllm.measuring.bars import MEASURES, Bar, Key, Standing, standings
from newllm.measuring.entries import FUSED, OURS
from newllm.measuring.rows import Row
from newllm.measuring.work import DIRECTIONS

if TYPE_CHECKING:
    from rich.table import Table

    from newllm.measuring.session import Report


class Grid(NamedTuple):
    """A table: the first ``words`` columns hold words, the others figures."""

    title: str
    columns: tuple[str, ...]
    lines: list[tuple[str, ...]]
    words: int = 2

    def plain(self) -> str:
        """Aligned text."""
        table = [self.columns, *self.lines]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join([self.title, *("  ".join(self._aligned(line, widths)).rstrip() for line in table)])

    def markdown(self) -> str:
        """A Markdown table without its title."""
        rule = ["---" if place < self.words else "---:" for place in range(len(self.columns))]
        return "\n".join(f"| {' | '.join(line)} |" for line in (self.columns, rule, *self.lines))

    def rich(self) -> Table:
        """The table for a terminal."""
        from rich.table import Table

        table = Table(title=self.title, title_justify="left")
        for place, name in enumerate(self.columns):
            table.add_column(name, justify="left" if place < self.words else "right")
        for line in self.lines:
            table.add_row(*line)
        return table

    def _aligned(self, line: Sequence[str], widths: list[int]) -> list[str]:
        return [
            f"{cell:<{width}}" if place < self.words else f"{cell:>{width}}"
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]


def grids(report: Report) -> list[Grid]:
    """The times of each shape, and last how they stand with the bars that could be measured."""
    shapes = dict.fromkeys(row.shape for row in report.rows)
    times = [times_grid([row for row in report.rows if row.shape == shape]) for shape in shapes]
    reached = [each for each in standings(report.suite, report.rows) if each.value is not None]
    return [*times, *([bars_grid(reached)] if reached else [])]


def notes(report: Report) -> list[str]:
    """What ran where, what was left out, and what failed, each with its reason."""
    first = report.rows[0]
    ran = (
        f"{first.suite} on {first.device}, {first.dtype}, torch {first.torch}, triton {first.triton}; "
        f"ceilings: {first.peak_tflops:,.4g} TFLOP/s in a product, {first.peak_gbs:,.4g} GB/s in a copy"
    )
    failed = [
        f"failed: {what(row.key)}, {row.impl}: {row.error}" for row in report.rows if row.error is not None
    ]
    return [ran, *(f"left out: {line}" for line in report.left_out), *failed]


def times_grid(rows: list[Row]) -> Grid:
    """Milliseconds, their multiple of the floor and GiB, both directions in one line."""
    directions = [direction for direction in DIRECTIONS if any(row.direction == direction for row in rows)]
    units = [("ms", "x floor", "GiB") for _ in directions]
    heads = [(f"{direction} {unit[0]}", *unit[1:]) for direction, unit in zip(directions, units, strict=True)]
    cells = {(row.op, row.variant, row.impl, row.direction): row for row in rows}
    lines = []
    for op, variant, impl in dict.fromkeys((row.op, row.variant, row.impl) for row in rows):
        found = [cells.get((op, variant, impl, direction)) for direction in directions]
        figures = [figure for row in found for figure in _figures(row)]
        lines.append((f"{op}, {variant}", _by(impl, found), *figures))
    return Grid(
        f"{rows[0].suite}, {rows[0].shape}", ("what", "by", *(name for head in heads for name in head)), lines
    )


def _by(impl: str, found: list[Row | None]) -> str:
    details = dict.fromkeys(row.detail for row in found if row is not None and row.detail is not None)
    name = f"newllm {impl}" if impl in OURS else impl
    return f"{name} ({', '.join(details)})" if details else name


def _figures(row: Row | None) -> list[str]:
    if row is None or row.ms is None:
        return ["" if row is None else "failed", "", ""]
    above = f"{row.ms / row.floor_ms:.2f}" if row.floor_ms else ""
    return [milliseconds(row.ms), above, "" if row.gib is None else f"{row.gib:.3f}"]


def milliseconds(ms: float) -> str:
    """Three digits or more, tenths of a microsecond at most."""
    return f"{ms:.4f}" if ms < 1 else f"{ms:.3f}" if ms < 10 else f"{ms:,.1f}"


def bars_grid(reached: Iterable[Standing]) -> Grid:
    """Each bar with its figure; must and aim, met or not."""
    columns = ("what", "beside", "measured", "must", "", "aim", "")
    return Grid("bars", columns, [_bar_line(each) for each in reached])


def _bar_line(standing: Standing) -> tuple[str, ...]:
    bar, value = standing
    measure = MEASURES[bar.measure]
    figure = "" if value is None else f"{value:.3g} {measure.unit}"
    sign = "≥" if measure.at_least else "≤"
    levels = []
    for level in (bar.must, bar.aim):
        levels += ["" if level is None else f"{sign} {level:g}", standing.verdict(level)]
    return what(bar.own), _beside(bar), figure, *levels


def what(key: Key) -> str:
    """What a key measures, in words."""
    op, _, variant, shape, direction = key
    return f"{op}, {variant}, {shape} {direction}"


def _beside(bar: Bar) -> str:
    if bar.own == bar.other:
        return ""
    op, impl, variant, shape, _ = bar.other
    if impl == FUSED:
        return f"{variant}, {shape}"
    return f"{impl}, window alone" if op == "window_attention" else impl
