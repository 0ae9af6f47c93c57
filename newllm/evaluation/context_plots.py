"""Pictures of contexts: where repetitions go, what is forgotten, how phases went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from newllm.evaluation.context_checks import PassConvergence

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
Rows = Sequence[Mapping[str, Any]]


def attractor_figure(distances: Mapping[str, Any], points: Mapping[str, Any]) -> Figure:
    """Per updater: pairwise distances of fixed points ``[n, n]``, and deviations of each dimension.

    ``points`` are the fixed points ``[n, C]`` themselves. Distances share one colour scale.
    """
    figure = _figure(4.2 * len(distances), 6.5)
    panels: Any = figure.subplots(2, len(distances), squeeze=False)
    most = max(float(np.max(table)) for table in distances.values())
    for column, (name, table) in enumerate(distances.items()):
        image = panels[0][column].imshow(table, cmap="viridis", vmin=0, vmax=most)
        pairs = np.asarray(table)[np.triu_indices(len(table), 1)]
        panels[0][column].set_title(f"{name}: mean distance {pairs.mean():.3g}")
        panels[0][column].set_xlabel("token")
        panels[0][column].set_ylabel("token")
        spread = np.sort(np.asarray(points[name]).std(0, ddof=1))[::-1]
        panels[1][column].bar(range(len(spread)), np.maximum(spread, 1e-6), width=1.0, color=_COLORS[column])
        panels[1][column].axhline(1e-3**0.5, color="black", linestyle="--", linewidth=1)
        panels[1][column].set_yscale("log")
        panels[1][column].set_ylim(1e-5, 10)
        panels[1][column].set_xlabel("dimension, by deviation (dashed: variance 0.001)")
        panels[1][column].set_ylabel("deviation over tokens")
    figure.colorbar(image, ax=list(panels[0]), label="L2 distance of fixed points")
    figure.suptitle("Fixed points of repeated tokens")
    return figure


def fixed_point_figure(rows: Rows) -> Figure:
    """Nine panels over the rows of ``attractor.fixed_points``."""
    names = (
        ("l2", "L2, once to fixed point"), ("cosine", "cosine"), ("angle", "angle (degrees)"),
        ("pearson", "Pearson correlation"), ("norm_once", "norm after one reading"),
        ("norm_fixed", "norm of the fixed point"), ("magnitude", "difference of norms"),
        ("direction", "distance by direction"), ("last_change", "change by the last reading"),
    )  # fmt: skip
    figure = _figure(11, 8.5)
    panels: Any = figure.subplots(3, 3)
    for axes, (name, label) in zip(panels.flat, names, strict=True):
        values = np.asarray([row[name] for row in rows])
        # A histogram of values that differ by rounding alone needs a width of its own.
        wider = 1e-6 if np.ptp(values) < 1e-6 else 0.0
        axes.hist(values, bins=20, range=(values.min() - wider, values.max() + wider), color=_COLORS[0])
        axes.axvline(values.mean(), color=_COLORS[1], label=f"mean {values.mean():.4g}")
        axes.set_xlabel(label)
        axes.legend(fontsize="small")
    panels[0][0].set_ylabel("tokens")
    figure.suptitle(f"One reading of a token beside its fixed point, {len(rows)} tokens")
    return figure


def fixed_point_detail(paths: Any, rows: Rows, shown: int = 6) -> Figure:
    """Six panels: of single tokens, the distance to the last state and to the next one, by reading.

    ``paths`` are contexts ``[n, readings, C]``.
    """
    figure = _figure(11, 6.5)
    panels: Any = figure.subplots(2, 3, sharex=True, sharey=True)
    for axes, path, row in zip(panels.flat, np.asarray(paths)[:shown], rows[:shown], strict=False):
        readings = np.arange(1, len(path))
        axes.plot(readings, _floor(np.linalg.norm(path[:-1] - path[-1], axis=-1)), color=_COLORS[0])
        axes.plot(readings, _floor(np.linalg.norm(np.diff(path, axis=0), axis=-1)), color=_COLORS[1])
        axes.set_yscale("log")
        axes.set_title(f"token {row['token']}: {row['steps'] or 'more'} readings", fontsize="medium")
    panels[0][0].legend(["to the last state", "to the next state"])
    figure.supxlabel("reading")
    figure.supylabel("L2 distance")
    return figure


def convergence_figure(found: Mapping[str, PassConvergence]) -> Figure:
    """Per recurrence: what each pass changes, and how two starts agree by position."""
    figure = _figure(9, 4)
    left, right = figure.subplots(1, 2)
    for color, (name, one) in zip(_COLORS * len(found), found.items(), strict=False):
        passes = range(2, len(one.differences) + 2)
        left.plot(passes, _floor(one.differences), marker="o", color=color, label=name)
        places = range(1, len(one.two_starts) + 1)
        right.plot(places, _floor(one.two_starts), color=color, label=f"{name}: {one.horizon or 'no'} tokens")
    left.set_xlabel("pass")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_ylabel("mean L2 change of contexts")
    right.axhline(1e-3, color="black", linestyle="--", linewidth=1)
    right.set_xlabel("position (tokens)")
    right.set_ylabel("mean squared distance of two starts")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def rank_figure(spectra: Mapping[str, Any]) -> Figure:
    """Singular values of contexts, as shares of the largest, by set."""
    figure = _figure(6.5, 4)
    axes = figure.subplots()
    for color, (name, values) in zip(_COLORS * len(spectra), spectra.items(), strict=False):
        axes.plot(range(1, len(values) + 1), np.asarray(values) / np.max(values), color=color, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("singular value")
    axes.set_ylabel("share of the largest")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def bars_figure(table: Mapping[str, Mapping[str, float]], *, bound: float, label: str) -> Figure:
    """Groups of bars, ``table[group][bar]``, on a logarithmic axis with a dashed ``bound``."""
    figure = _figure(8, 4)
    axes = figure.subplots()
    names = list(dict.fromkeys(name for bars in table.values() for name in bars))
    for place, name in enumerate(names):
        at = np.arange(len(table)) + (place - (len(names) - 1) / 2) * 0.8 / len(names)
        values = _floor([bars[name] for bars in table.values()])
        drawn = axes.bar(at, values, 0.8 / len(names), color=_COLORS[place], label=name)
        axes.bar_label(drawn, fmt="{:.2g}", fontsize="x-small")
    axes.axhline(bound, color="black", linestyle="--", linewidth=1)
    axes.set_yscale("log")
    axes.set_xticks(range(len(table)), list(table))
    axes.set_ylabel(label)
    axes.legend()
    return figure


def lines_figure(
    lines: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str, log: str = "", marker: str = "o"
) -> Figure:
    """Named lines of points; ``log`` names the logarithmic axes, such as ``"xy"``."""
    figure = _figure(7, 4.2)
    axes = figure.subplots()
    for color, (name, points) in zip(_COLORS * (1 + len(lines)), lines.items(), strict=False):
        axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, color=color, label=name)
    _dress(axes, x, y, log)
    return figure


def phases_figure(rows: Rows) -> Figure:
    """Both phases from a run's metrics: converged share and change by sweep, perplexity by epoch."""
    figure = _figure(12, 4)
    panels: Any = figure.subplots(1, 3)
    sweeps: dict[str, list[Mapping[str, Any]]] = {}
    epochs: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if "sweep" in row:
            sweeps.setdefault(f"block {row['block']}", []).append(row)
        elif "epoch" in row:
            epochs.setdefault(str(row["model"]), []).append(row)
    for color, (name, group) in zip(_COLORS, sweeps.items(), strict=False):
        places = [row["sweep"] for row in group]
        panels[0].plot(places, [100 * row["convergence_rate"] for row in group], color=color, label=name)
        panels[1].plot(places, _floor([row["change"] for row in group]), color=color, label=name)
    for color, (name, group) in zip(_COLORS, epochs.items(), strict=False):
        places = [row["epoch"] for row in group]
        held = [row["validation_perplexity"] for row in group]
        panels[2].plot(places, held, color=color, marker="o", markersize=3, label=f"{name} contexts")
        taught = [row["train_perplexity"] for row in group]
        panels[2].plot(places, taught, color=color, linestyle=":", label=f"{name} contexts, training")
    _dress(panels[0], "sweep", "converged positions (%)", "")
    _dress(panels[1], "sweep", "mean squared change of contexts", "y")
    _dress(panels[2], "epoch", "perplexity", "y")
    return figure


def _dress(axes: Axes, x: str, y: str, log: str) -> None:
    from matplotlib.ticker import LogFormatter, StrMethodFormatter

    class Plain(LogFormatter):
        """Labels also between the powers of an axis of less than a decade, as 20,000 and not 2 x 10^4."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:,.6g}" if super().__call__(x, pos) else ""

    for name in log:
        axes.set(**{f"{name}scale": "log"})
        getattr(axes, f"{name}axis").set_minor_formatter(Plain(minor_thresholds=(1, 0.4)))
        getattr(axes, f"{name}axis").set_major_formatter(StrMethodFormatter("{x:,.6g}"))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small")


def _floor(values: Any) -> Any:
    """What a logarithmic axis can show."""
    return np.maximum(np.asarray(values, dtype=float), 1e-12)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
