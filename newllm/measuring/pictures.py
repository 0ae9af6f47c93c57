"""The layer's times as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from newllm.measuring.entries import OURS
from newllm.measuring.rows import Row
from newllm.measuring.tables import milliseconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's blue for newllm, a grey for attention alone, a lighter one for all the rest.
_OURS, _WINDOW, _OTHER = "#0072B2", "#8C8C8C", "#C9C9C9"
_TITLES = {
    "infini_attention": "Infini layer",
    "window_attention": "window alone",
    "full attention": "full attention",
}


def layer_figure(rows: list[Row]) -> Figure:
    """A panel of bars for each shape and direction; one axis a panel, logarithmic, in milliseconds."""
    from matplotlib.figure import Figure

    timed = [row for row in rows if row.ms is not None]
    panels = [*dict.fromkeys((row.shape, row.direction) for row in timed)]
    shapes = [*dict.fromkeys(shape for shape, _ in panels)]
    directions = [*dict.fromkeys(direction for _, direction in panels)]
    most = max(sum((row.shape, row.direction) == panel for row in timed) for panel in panels)
    size = 6.5 * len(directions), len(shapes) * (1.2 + 0.3 * most)
    figure = Figure(figsize=size, layout="constrained")
    grid: Any = figure.subplots(len(shapes), len(directions), squeeze=False)
    for shape, line in zip(shapes, grid, strict=True):
        for direction, axes in zip(directions, line, strict=True):
            chosen = [row for row in timed if (row.shape, row.direction) == (shape, direction)]
            _panel(axes, sorted(chosen, key=lambda row: row.ms or 0), f"{shape}, {direction}")
    first = timed[0]
    title = f"Time of one layer on {first.device}, {first.dtype}"
    figure.suptitle(f"{title}\ndotted: floor of the whole layer", fontsize="medium")
    return figure


def _panel(axes: Any, rows: list[Row], title: str) -> None:
    from matplotlib.ticker import LogLocator

    if not rows:
        axes.set_axis_off()
        return
    times = [row.ms or 0.0 for row in rows]
    places = range(len(rows))
    axes.barh(places, times, color=[_color(row) for row in rows], height=0.7)
    axes.set_yticks(places, [_label(row) for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log", subs=[])
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    for place, ms in zip(places, times, strict=True):
        axes.annotate(
            milliseconds(ms), (ms, place), (4, 0), textcoords="offset points", va="center", fontsize=9
        )
    floors = [row.floor_ms for row in rows if row.op == "infini_attention"]
    if floors:
        axes.axvline(min(floors), color="black", linestyle=":", linewidth=1)
    axes.set_xlim(min([*floors, *times]) / 1.5, 2 * max(times))
    axes.set_title(title, loc="left")
    axes.set_xlabel("ms (logarithmic)")
    axes.spines[["top", "right"]].set_visible(False)


def _color(row: Row) -> str:
    if row.impl in OURS:
        return _OURS
    return _WINDOW if row.op == "window_attention" else _OTHER


def _label(row: Row) -> str:
    title = _TITLES.get(row.op, row.op)
    if row.impl in OURS:
        return (
            f"newllm: {title}, {row.variant}"
            if row.impl == "fused"
            else f"{row.impl}: {title}, {row.variant}"
        )
    return f"{row.impl}: {title}" if row.impl not in title else title
