"""The README's tables of times, made from the rows in ``benchmarks/results`` and from nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from newllm.files import replace_file
from newllm.measuring import SUITES
from newllm.measuring.bars import standings
from newllm.measuring.entries import OURS
from newllm.measuring.rows import Row, read_rows
from newllm.measuring.tables import Grid, bars_grid, milliseconds

TRAINING = "train_step"
BEGIN, END = "<!-- newllm bench report: begin -->", "<!-- newllm bench report: end -->"


def text(results: Path) -> str:
    """Markdown for the suites that ``results`` has rows of: the layer's times, every bar, what ran where.

    And the training steps that ``benchmarks/train_step.py`` wrote.
    """
    found = {suite: read_rows(results / f"{suite}.jsonl") for suite in SUITES if _exists(results, suite)}
    if not found:
        return "No rows have been recorded yet."
    parts = [layer_grid(found["layer"]).markdown()] if "layer" in found else []
    reached = [
        each for suite, rows in found.items() for each in standings(suite, rows) if each.value is not None
    ]
    if reached:
        parts.append(bars_grid(reached).markdown())
    parts += [_origin(suite, rows) for suite, rows in found.items()]
    if _exists(results, TRAINING):
        lines = (results / f"{TRAINING}.jsonl").read_text(encoding="utf-8").splitlines()
        parts += training_steps([json.loads(line) for line in lines])
    return "\n\n".join(parts)


def layer_grid(rows: list[Row]) -> Grid:
    """Milliseconds of every computation, a column for each shape and direction."""
    columns = [*dict.fromkeys((row.shape, row.direction) for row in rows)]
    times = {(row.op, row.variant, row.impl, row.shape, row.direction): row.ms for row in rows}
    lines = []
    for op, variant, impl in dict.fromkeys((row.op, row.variant, row.impl) for row in rows):
        found = [times.get((op, variant, impl, *column)) for column in columns]
        by = f"newllm {impl}" if impl in OURS else impl
        lines.append((f"{op}, {variant}", by, *("" if ms is None else milliseconds(ms) for ms in found)))
    heads = (f"{shape} {direction}, ms" for shape, direction in columns)
    return Grid("layer", ("what", "by", *heads), lines)


def training_steps(rows: list[dict[str, Any]]) -> list[str]:
    """What was trained, tokens a second of each model by the length of its sequences, and where it ran."""
    impls = [*dict.fromkeys(row["impl"] for row in rows)]
    speeds = {(row["tokens"], row["impl"]): row for row in rows if row["tokens_per_second"]}
    lines = []
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        own = [speeds.get((tokens, impl)) for impl in impls]
        cells = ("" if row is None else _step_cell(row) for row in own)
        lines.append((f"{tokens:,}", *cells))
    first = rows[0]
    return [
        f"Whole training steps of {first['shape']}'s shape, batch 1, window {first['window']}, a memory in "
        "two layers; tokens a second (peak beyond weights and optimiser, share of attention):",
        Grid("training steps", ("tokens", *impls), lines, words=1).markdown(),
        f"`benchmarks/results/{TRAINING}.jsonl`: {first['device']}, {first['dtype']}, "
        f"torch {first['torch']}, triton {first['triton']}, commit {first['commit'][:12]}, "
        f"{first['date'][:10]}.",
    ]


def _step_cell(row: dict[str, Any]) -> str:
    share = "" if row["attention_share"] is None else f", {row['attention_share']:.0%}"
    memory = "" if row["gib"] is None else f" ({row['gib']:.1f} GiB{share})"
    return f"{row['tokens_per_second']:,.0f}{memory}"


def update(readme: Path, results: Path) -> None:
    """Put :func:`text` between the two markers of ``readme``.

    Raises ValueError where there are no markers.
    """
    before = readme.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(before):
        raise ValueError(f"{readme} must hold the lines {BEGIN} and {END}")
    block = f"{BEGIN}\n{text(results)}\n{END}"
    after = pattern.sub(lambda _: block, before)
    replace_file(readme, lambda file: file.write_text(after, encoding="utf-8"))


def _exists(results: Path, suite: str) -> bool:
    return (results / f"{suite}.jsonl").is_file()


def _origin(suite: str, rows: list[Row]) -> str:
    row, *_ = rows
    commits = ", ".join(dict.fromkeys((each.commit or "unknown")[:12] for each in rows))
    return (
        f"`benchmarks/results/{suite}.jsonl`: {row.device}, {row.dtype}, torch {row.torch}, "
        f"triton {row.triton}, commit {commits}, {max(each.date for each in rows)[:10]}; ceilings "
        f"{row.peak_tflops:,.4g} TFLOP/s and {row.peak_gbs:,.4g} GB/s."
    )
