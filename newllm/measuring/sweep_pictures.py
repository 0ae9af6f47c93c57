"""The context sweeps' times as a picture: a step by width and by batch, and Jacobi's sweeps by rho."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from newllm.measuring.entries import OURS
from newllm.measuring.rows import Row
from newllm.measuring.shapes import CONVERGENCE, JACOBI
from newllm.measuring.work import FORWARD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's blue, vermilion and green for newllm's methods, greys for all the rest.
_METHODS = {"sequential": "#0072B2", "block": "#D55E00", "auto": "#009E73"}
_GREYS = {
    "eager loop": "#4D4D4D",
    "hoisted loop": "#8C8C8C",
    "compiled hoisted loop": "#A6A6A6",
    "LSTM": "#BFBFBF",
    "GRU": "#D4D4D4",
}
_DETAIL = re.compile(r"(\d+) sweeps, rho ([\d.]+)")


def sweep_figure(rows: list[Row]) -> Figure:
    """Two panels of times, in microseconds a step forwards, and one of sweeps where they were counted."""
    from matplotlib.figure import Figure

    timed = [row for row in rows if row.ms is not None and row.direction == FORWARD]
    steps = [row for row in timed if row.shape not in (CONVERGENCE, JACOBI) and "32K" not in row.shape]
    counted = [row for row in timed if row.shape == CONVERGENCE]
    panels = 3 if counted else 2
    figure = Figure(figsize=(5 * panels, 5.5), layout="constrained")
    axes: Any = figure.subplots(1, panels)
    _steps(axes[0], [row for row in steps if row.batch == 1], lambda row: row.width, "d, one row")
    _steps(axes[1], [row for row in steps if row.width == 768], lambda row: row.batch, "rows, d = 768")
    if counted:
        _sweeps(axes[2], counted)
    first = timed[0]
    figure.suptitle(f"Context sweeps on {first.device}, {first.dtype}", fontsize="medium")
    return figure


def _steps(axes: Any, rows: list[Row], size: Callable[[Row], int], title: str) -> None:
    for impl, variant in dict.fromkeys((row.impl, row.variant) for row in rows):
        chosen = sorted((row for row in rows if (row.impl, row.variant) == (impl, variant)), key=size)
        name = f"newllm {impl}, {variant}" if impl in OURS else impl
        color = _METHODS[variant] if impl == "fused" else _GREYS.get(impl, "#DDDDDD")
        times = [1e3 * (row.ms or 0) / row.tokens for row in chosen]
        axes.plot([*map(size, chosen)], times, marker="o", color=color, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(title)
    axes.set_title("us a step (logarithmic)", loc="left")
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _sweeps(axes: Any, rows: list[Row]) -> None:
    found = [match for row in rows if (match := _DETAIL.search(row.detail or ""))]
    points = sorted((float(match[2]), int(match[1])) for match in found)
    axes.plot([rho for rho, _ in points], [count for _, count in points], marker="o", color="#0072B2")
    axes.set_xlabel("rho: by what a token multiplies a difference")
    axes.set_title("sweeps of Jacobi's method to 1e-5", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
