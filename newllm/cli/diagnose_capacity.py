"""``newllm diagnose capacity`` and ``newllm eval MODEL --suite capacity``: random pairs in memories."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class CapacityOptions:
    """How many random pairs of keys and values a memory of one head keeps apart, by its rule and features.

    Each number of pairs becomes a line of rows; leaves capacity.png.

    Args:
        model: folder or hub id of a Senri, whose trained features are measured (null: untrained ones).
        pairs: how many are written.
        width: of keys and values (of a model: its heads').
        trials: memories of each kind.
        seed: of the pairs.
        rows: the file of results.
        out: folder of the picture.
    """

    model: str | None = None
    pairs: list[int] = field(default_factory=lambda: [16, 32, 64, 96, 128, 192, 256])
    width: int = 128
    trials: int = 100
    seed: int = 0
    rows: str = "runs/capacity.jsonl"
    out: str = "runs/diagnose-capacity"


def run(options: CapacityOptions) -> None:
    """Measure, draw, print."""
    from functools import partial

    from rich.console import Console
    from rich.table import Table

    from newllm.backend import version_of
    from newllm.cli.loading import load
    from newllm.evaluation.capacity import UNTRAINED, measure_capacity, trained
    from newllm.evaluation.plots import capacity_figure
    from newllm.evaluation.rows import RowFile
    from newllm.files import replace_file
    from newllm.runs import commit

    kinds, width = UNTRAINED, options.width
    if options.model is not None:
        model, _ = load(options.model, dtype="float32", device="cpu")
        kinds, width = trained(model), int(model.config.head_dim)
    rows = RowFile(options.rows)
    facts = {
        "model": options.model or "untrained", "device": "cpu", "torch": version_of("torch"),
        "commit": commit(),
    }  # fmt: skip
    found = measure_capacity(
        kinds, options.pairs, width=width, trials=options.trials, seed=options.seed,
        facts=facts, on_row=rows.append,
    )  # fmt: skip
    picture = Path(options.out) / "capacity.png"
    figure = capacity_figure(found)
    replace_file(picture, partial(figure.savefig, dpi=150, format="png"))
    table = Table(title=f"share of random pairs of width {width} found again", title_justify="left")
    for column in ("memory", "bytes", *map(str, options.pairs)):
        table.add_column(column, justify="left" if column == "memory" else "right")
    for name, kind in kinds.items():
        scores = [f"{row['score']:.3f}" for row in found if row["memory"] == name]
        table.add_row(name, f"{kind.state_bytes(width):,}", *scores)
    console = Console()
    console.print(table)
    console.print(f"{rows.path}, {picture}", highlight=False)
