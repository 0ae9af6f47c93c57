"""Which look at the validation text was the best: a function of the log alone, which survives a crash."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def _evaluations(history: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    return [(row["step"], row["eval_loss"]) for row in history if "eval_loss" in row]


def best_evaluation(history: Sequence[Mapping[str, Any]]) -> tuple[int, float] | None:
    """Step and loss of the lowest ``eval_loss`` of a log, the first of equals; None without any."""
    return min(_evaluations(history), key=lambda found: found[1], default=None)


def stale_evaluations(history: Sequence[Mapping[str, Any]], min_delta: float = 0.0) -> int:
    """How many looks have passed since one improved on all before it by more than ``min_delta``."""
    stale, best = 0, float("inf")
    for _, loss in _evaluations(history):
        stale = 0 if loss < best - min_delta else stale + 1
        best = min(best, loss)
    return stale
