"""``docs/context-family.md`` from the rows of ``benchmarks/context_family.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from newllm.files import replace_file

Rows = Sequence[dict[str, Any]]
Column = tuple[str, str, Callable[[float], str]]


def _number(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:,.{digits}f}"


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


PERPLEXITY: Column = ("perplexity", "validation perplexity", _number(2))
ACCURACY: Column = ("accuracy", "accuracy", _percent)
HORIZON: Column = ("horizon", "horizon (tokens)", _number(0))
RANK: Column = ("validation_rank", "effective rank", _percent)
SWEEPS: Column = ("sweeps", "sweeps", _number(0))
EPOCH: Column = ("best_epoch", "best epoch", _number(0))
SECONDS: Column = ("seconds", "seconds", _number(1))
PHASES: Sequence[Column] = (
    ("phase1_seconds", "phase 1 (s)", _number(1)),
    ("phase2_seconds", "phase 2 (s)", _number(1)),
)
QUESTIONS: dict[str, tuple[str, str, Sequence[Column]]] = {
    "documents": (
        "Is phase 1 needed?",
        "The documents' experiment: trained contexts, the same block as it was drawn, and an n-gram of about "
        "the contexts' horizon (interpolated Witten-Bell).",
        (PERPLEXITY, ACCURACY, RANK, HORIZON, SWEEPS, EPOCH, *PHASES, SECONDS),
    ),
    "diversity": (
        "Which diversity loss?",
        "The same batch of 5000 contexts, weight 1 and stopping rules for all.",
        (PERPLEXITY, ACCURACY, RANK, HORIZON, SWEEPS, EPOCH),
    ),
    "frozen": (
        "Frozen or end to end?",
        "End to end: gradients of the next token through 64 tokens of the recurrence, in batches of as many "
        "positions.",
        (PERPLEXITY, ACCURACY, HORIZON, EPOCH, SECONDS),
    ),
    "horizon": (
        "How far back does a context remember, and what does a longer memory buy?",
        "The horizon is the number of tokens after which two random starts agree to a mean squared distance "
        "of 0.001. The input gain scales the half of W that reads the token: smaller steps contract less.",
        (PERPLEXITY, ACCURACY, HORIZON, RANK, SWEEPS),
    ),
    "chunks": (
        "Context-KV: chunk size against perplexity",
        "One ContextBlock, trained once for each seed; the variants are tokens of a chunk. A small chunk has "
        "more slots to attend to.",
        (PERPLEXITY, ACCURACY, EPOCH, *PHASES),
    ),
}


def write_report(rows: Rows, page: Path, source: Path) -> None:
    """Write the page; a question without rows says so."""
    lines = [
        "# The context family, measured", "",
        f"Made by `python -m benchmarks.context_family report` from `{source}`; `python -m "
        "benchmarks.context_family run` measures. Figures are means over seeds, in brackets the least and "
        "the most.", "",
    ]  # fmt: skip
    for device in dict.fromkeys(row["device"] for row in rows):
        lines += _device(device, [row for row in rows if row["device"] == device])
    if not rows:
        lines += ["Nothing has been measured yet.", ""]
    replace_file(page, lambda path: path.write_text("\n".join(lines), encoding="utf-8"))
    print(page)


def _device(device: str, rows: Rows) -> list[str]:
    lines = [f"## {device}", ""]
    for experiment, (question, conditions, columns) in QUESTIONS.items():
        group = [row for row in rows if row["experiment"] == experiment]
        lines += [f"### {question}", "", conditions, ""]
        if group:
            lines += [*_table(group, columns), "", _conditions(group), ""]
        else:
            lines += ["Not measured on this device.", ""]
    return lines


def _table(rows: Rows, columns: Sequence[Column]) -> list[str]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["variant"], []).append(row)
    if all(variant.isdigit() for variant in groups):
        groups = {variant: groups[variant] for variant in sorted(groups, key=int)}
    head = ["variant", "seeds", *(title for _, title, _ in columns)]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for variant, group in groups.items():
        cells = [_cell([row.get(key) for row in group], shown) for key, _, shown in columns]
        lines.append("| " + " | ".join([variant, str(len(group)), *cells]) + " |")
    return lines


def _cell(values: Sequence[float | None], shown: Callable[[float], str]) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return "-"
    low, high = shown(min(found)), shown(max(found))
    return low if low == high else f"{shown(mean(found))} ({low} to {high})"


def _conditions(rows: Rows) -> str:
    last = rows[-1]
    tokens = max(row["tokens"] for row in rows)
    said = (
        f"{last['data']}, {tokens:,} training tokens, embedding {last['embed_dim']}, "
        f"context {last['context_dim']}, at most {last['epochs']} epochs; torch {last['torch']}, commit "
        f"{last['commit']}, {last['date']}."
    )
    equal = [row["bit_equal"] for row in rows if "bit_equal" in row]
    if equal:
        said += f" Two runs of one seed: {'equal' if all(equal) else 'different'} weights, bit for bit."
    return said
