"""Pictures of evaluations, as matplotlib figures without a window; ``Run.plot`` writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from newllm.evaluation.perplexity import PerplexityReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's blue and vermilion, and a map of one hue: told apart by all eyes, and in grey.
_BLUE, _VERMILION = "#0072B2", "#D55E00"
_LINES = (_BLUE, _VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
_SHADES = "Blues"
_WELL = 0.97  # the share that a capacity is read at
_DARK = 0.6  # scores from here on are written in white
_MIB = 2**20


def recall_figure(results: Mapping[str, Any], title: str = "Exact-match recall of a hidden key") -> Figure:
    """One heat map of recall per model: length of the prompt to the right, depth of the key downwards.

    ``results`` holds ``window`` and ``recall``: model -> multiple of the window -> depth -> score from 0 to
    1, multiples and depths being numbers or their text (``results.json``).
    """
    from matplotlib.figure import Figure

    models, window = results["recall"], results["window"]
    cells = {name: _numbers(table) for name, table in models.items()}
    lengths, depths = _axes({place: 0.0 for table in cells.values() for place in table})
    width = 1.6 + len(cells) * (0.6 + 0.85 * max(len(lengths), 2))
    figure = Figure(figsize=(max(width, 5.5), 1.9 + 0.5 * len(depths)), layout="constrained")
    panels: Any = figure.subplots(1, len(cells), sharey=True, squeeze=False)[0]
    for axes, (name, table) in zip(panels, cells.items(), strict=True):
        image = _heat_map(axes, table, window)
        axes.set_title(name.replace("_", " "))
    panels[0].set_ylabel("depth of what is asked for\n(0: first token, 1: last place)")
    figure.supxlabel(f"length of the prompt (in windows of {window:,} tokens; in tokens)", fontsize="medium")
    figure.suptitle(title)
    bar = figure.colorbar(image, ax=list(panels), ticks=[0, 0.5, 1], shrink=0.9)
    bar.set_label("share recalled")
    return figure


def perplexity_figure(report: PerplexityReport) -> Figure:
    """Perplexity by position with its 95 % interval, and below it the memory that each chunk left in use."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    # A logarithmic axis has no 0: the first bin is drawn as wide as if it doubled, like those after it.
    first, total = report.bins[0], report.total
    edges = [max(first.start, first.end / 2), *(cell.end for cell in report.bins)]
    upper.stairs([cell.perplexity for cell in report.bins], edges, baseline=None, color=_BLUE, linewidth=2)
    for cell, (low, high) in zip(report.bins, pairwise(edges), strict=True):
        upper.fill_between([low, high], *cell.perplexity_ci95, color=_BLUE, alpha=0.2, linewidth=0)
    upper.axhline(total.perplexity, color="grey", linewidth=1, linestyle=":")
    upper.set_ylabel("perplexity (lower is better)")
    upper.set_title(f"Perplexity by position; dotted: {total.perplexity:.2f} over {total.tokens:,} tokens")
    tokens = [chunk.tokens for chunk in report.chunks]
    for name, color, sizes in (
        ("process (resident)", _VERMILION, [chunk.resident_bytes / _MIB for chunk in report.chunks]),
        ("state of the stream", _BLUE, [chunk.state_bytes / _MIB for chunk in report.chunks]),
    ):
        label = f"{name}: {sizes[-1]:,.4g} MiB at the end"
        lower.plot(tokens, sizes, color=color, linewidth=2, marker="o", markersize=3, label=label)
    lower.set_ylim(0, 1.6 * lower.get_ylim()[1])
    lower.legend(loc="upper left", framealpha=1, edgecolor="none")
    lower.set_ylabel("memory (MiB)")
    lower.set_xlabel("position in the stream (tokens)")
    lower.set_xscale("log")
    lower.set_xlim(edges[0], edges[-1])
    lower.xaxis.set_major_formatter("{x:,.0f}")
    for axes in (upper, lower):
        axes.axvline(report.window, color="black", linewidth=1, linestyle="--")
        axes.grid(alpha=0.3)
    place = (report.window, 0.97)
    upper.annotate(f"  window: {report.window:,}", place, xycoords=("data", "axes fraction"), va="top")
    return figure


def capacity_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Share of random pairs found again by how many were written, with 95 % intervals, a line a memory."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(row["memory"] for row in rows))
    for number, name in enumerate(names):
        own = sorted((row for row in rows if row["memory"] == name), key=lambda row: row["length"])
        counts = [row["length"] for row in own]
        low, high = zip(*(row["ci95"] for row in own), strict=True)
        color, dash = _LINES[number % len(_LINES)], "-" if number < len(_LINES) else "--"
        scores = [row["score"] for row in own]
        axes.plot(counts, scores, label=name, color=color, linestyle=dash, marker="o", markersize=3)
        axes.fill_between(counts, low, high, color=color, alpha=0.15, linewidth=0)
    axes.axhline(_WELL, color="black", linewidth=1, linestyle=":", label=f"{_WELL:.0%}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({row["length"] for row in rows}))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"pairs in a memory of width {rows[0]['width']}")
    axes.set_ylabel("share found again")
    axes.set_ylim(0, 1.03)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small", ncols=1 + len(names) // 16)
    return figure


Table = dict[tuple[float, float], float]


def _numbers(table: Mapping[Any, Mapping[Any, float]]) -> Table:
    return {
        (float(length), float(depth)): score
        for length, depths in table.items()
        for depth, score in depths.items()
    }


def _axes(table: Table) -> tuple[list[float], list[float]]:
    lengths, depths = (sorted(set(values)) for values in zip(*table, strict=True))
    return lengths, depths


def _heat_map(axes: Axes, table: Table, window: int) -> Any:
    lengths, depths = _axes(table)
    scores = [[table.get((length, depth), float("nan")) for length in lengths] for depth in depths]
    image = axes.imshow(scores, cmap=_SHADES, vmin=0, vmax=1, aspect="auto")
    for (length, depth), score in table.items():
        place = lengths.index(length), depths.index(depth)
        axes.text(*place, f"{score:.2f}", ha="center", va="center", color="wk"[score < _DARK])
    labels = [f"{length:g}x\n{round(length * window):,}" for length in lengths]
    axes.set_xticks(range(len(lengths)), labels)
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    return image
