"""What a finished training leaves beside its weights: curves and a summary, from its own log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from newllm.training.best import best_evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES, SUMMARY = "training_curves.png", "summary.md"
_BLUE, _VERMILION = "#0072B2", "#D55E00"
_LARGE = 1000.0
Rows = Sequence[Mapping[str, Any]]


def upper_limit(values: Sequence[float]) -> float | None:
    """The top of a linear axis: 1.5 times the 95th percentile where something exceeds 1000, else None."""
    if not values or max(values) <= _LARGE:
        return None
    return 1.5 * float(np.percentile(values, 95))


def curves(rows: Rows) -> Figure:
    """Loss and perplexity over the steps, in training and validation, on linear axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    panels: Any = figure.subplots(2, 1, sharex=True)
    for axes, name, of in zip(panels, ("loss (nats)", "perplexity"), (float, np.exp), strict=True):
        drawn: list[float] = []
        for label, key, color in (("training", "loss", _BLUE), ("validation", "eval_loss", _VERMILION)):
            points = [(row["step"], float(of(row[key]))) for row in rows if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), color=color, label=label, marker=".", markersize=3)
                drawn += [value for _, value in points if np.isfinite(value)]
        axes.set_ylabel(name)
        axes.set_ylim(0, upper_limit(drawn))
        axes.grid(alpha=0.3)
    if panels[0].lines:
        panels[0].legend()
    panels[1].set_xlabel("step")
    return figure


def summary(
    rows: Rows, *, model: Mapping[str, Any], data: Mapping[str, Any], facts: Mapping[str, Any]
) -> str:
    """The run in a page of Markdown: model, data, results, how it ended."""
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    looks = [row for row in rows if "eval_loss" in row]
    results: dict[str, Any] = {}
    if losses:
        results["last training loss"] = f"{losses[-1][1]:.4f} at step {losses[-1][0]:,}"
    best = best_evaluation(rows)
    if best is not None:
        row = next(row for row in looks if row["step"] == best[0])
        results["best validation loss"] = f"{best[1]:.4f} at step {best[0]:,}"
        results["its perplexity"] = f"{row['eval_perplexity']:.3f}"
        results["its accuracy"] = f"{row['eval_accuracy']:.4f}"
    parts = {"Model": model, "Data": data, "Results": results, "Run": facts}
    lines = ["# Training", ""]
    for title, entries in parts.items():
        lines += [f"## {title}", "", "| | |", "|---|---|"]
        shown = {name: "none" if value is None else value for name, value in entries.items()}
        lines += [f"| {name.replace('_', ' ')} | {value} |" for name, value in shown.items()]
        lines += [""]
    return "\n".join(lines)
