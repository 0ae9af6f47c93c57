"""``docs/context-family.md`` from the rows of ``benchmarks/context_family.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from newllm.evaluation.context_checks import LONGEST_HORIZON
from newllm.files import replace_file

Rows = Sequence[dict[str, Any]]
Column = tuple[str, str, Callable[[float], str]]


def _number(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:,.{digits}f}"


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _signed(value: float) -> str:
    return f"{100 * value:+.2f} %"


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


class Question(NamedTuple):
    """What an experiment is to answer: its columns, and which variants answer it, each beside another."""

    title: str
    conditions: str
    columns: Sequence[Column]
    pairs: Sequence[tuple[str, str]]


QUESTIONS: dict[str, Question] = {
    "documents": Question(
        "Is phase 1 needed?",
        "The documents' experiment: trained contexts, the same block as it was drawn, and an n-gram of about "
        "the contexts' horizon (interpolated Witten-Bell).",
        (PERPLEXITY, ACCURACY, RANK, HORIZON, SWEEPS, EPOCH, *PHASES, SECONDS),
        (("trained", "untrained"), ("trained", "16-gram"), ("trained", "trained, reference path")),
    ),
    "diversity": Question(
        "Which diversity loss?",
        "The same batch of 5000 contexts, weight 1 and stopping rules for all.",
        (PERPLEXITY, ACCURACY, RANK, HORIZON, SWEEPS, EPOCH),
        (("mcdl", "oacd"), ("odcm", "oacd"), ("w_mse", "oacd")),
    ),
    "frozen": Question(
        "Frozen or end to end?",
        "End to end: gradients of the next token through 64 tokens of the recurrence, in batches of as many "
        "positions.",
        (PERPLEXITY, ACCURACY, HORIZON, EPOCH, SECONDS),
        (("end to end", "frozen after phase 1"), ("frozen after phase 1", "frozen as drawn")),
    ),
    "horizon": Question(
        "How far back does a context remember, and what does a longer memory buy?",
        "The horizon is the number of tokens after which two random starts agree to a mean squared distance "
        f"of 0.001, a dash where they do not within {LONGEST_HORIZON}. The input gain scales the half of W "
        "that reads the token: smaller steps contract less.",
        (PERPLEXITY, ACCURACY, HORIZON, RANK, SWEEPS),
        tuple(
            (f"input gain {gain}{state}", f"input gain 1{state}")
            for state in ("", ", untrained")
            for gain in ("0.5", "0.25")
        ),
    ),
    "chunks": Question(
        "Context-KV: chunk size against perplexity",
        "One ContextBlock, trained once for each seed; the variants are tokens of a chunk. A small chunk has "
        "more slots to attend to.",
        (PERPLEXITY, ACCURACY, EPOCH, *PHASES),
        (("16", "100"), ("200", "100")),
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
    for experiment, question in QUESTIONS.items():
        group = [row for row in rows if row["experiment"] == experiment]
        lines += [f"## {question.title}", "", question.conditions, ""]
        lines += [] if group else ["Not measured yet.", ""]
        for device in dict.fromkeys(row["device"] for row in group):
            own = [row for row in group if row["device"] == device]
            lines += [
                *_table(own, question.columns),
                "",
                *_answers(own, question.pairs),
                _conditions(own),
                "",
            ]
    replace_file(page, lambda path: path.write_text("\n".join(lines), encoding="utf-8"))
    print(page)


def _answers(rows: Rows, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """By how much perplexities of two variants differ, seed by seed; an n-gram is counted without any."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        found.setdefault(row["variant"], {})[row["seed"]] = row["perplexity"]
    lines = []
    for one, other in pairs:
        own, others = found.get(one, {}), found.get(other, {})
        if other.endswith("-gram") and others:
            others = dict.fromkeys(own, *others.values())
        changes = [value / others[seed] - 1 for seed, value in own.items() if seed in others]
        if changes:
            lower = sum(change < 0 for change in changes)
            lines.append(
                f"* {one} beside {other}: perplexity {_cell(changes, _signed)}, lower with {lower} of "
                f"{len(changes)} seeds"
            )
    return [*lines, ""] if lines else []


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
        f"{last['device']}; {last['data']}, {tokens:,} training tokens, embedding {last['embed_dim']}, "
        f"context {last['context_dim']}, at most {last['epochs']} epochs; torch {last['torch']}, commit "
        f"{last['commit'][:12]}, {last['date'][:10]}."
    )
    equal = [row["bit_equal"] for row in rows if "bit_equal" in row]
    if equal:
        said += f" Two runs of one seed: {'equal' if all(equal) else 'different'} weights, bit for bit."
    return said
