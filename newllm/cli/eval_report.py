"""``newllm eval report``: docs/recall.md and its pictures from rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class ReportOptions:
    """Write the page of recall from rows, and beside it a heat map of each suite and the curve of capacity.

    Args:
        rows: files of rows.
        out: the page.
    """

    rows: list[str] = field(
        default_factory=lambda: ["benchmarks/results/recall.jsonl", "benchmarks/results/smollm2.jsonl"]
    )
    out: str = "docs/recall.md"


def run(options: ReportOptions) -> None:
    """Read, write, print where."""
    from functools import partial

    from newllm.cli.eval_recall import pictures
    from newllm.evaluation.plots import capacity_figure
    from newllm.evaluation.recall_report import recall_report
    from newllm.evaluation.rows import RowFile
    from newllm.files import replace_file

    found = [name for name in options.rows if Path(name).exists()]
    if not found:
        raise FileNotFoundError(
            f"rows must name at least one file that exists, got {', '.join(options.rows)}"
        )
    rows = [row for name in found for row in RowFile(name).rows]
    out = Path(options.out)
    placed = (row for row in rows if row.get("depth") is not None and row.get("window"))
    drawn = [row for row in placed if not row.get("variant")]
    paths = pictures(drawn, str(out.parent), "recall-")
    untrained = [row for row in rows if row["suite"] == "capacity" and row["model"] == "untrained"]
    if untrained:
        paths.append(str(out.parent / "recall-capacity.png"))
        figure = capacity_figure(untrained)
        replace_file(Path(paths[-1]), partial(figure.savefig, dpi=150, format="png"))
    page = recall_report(rows, found)
    page += "".join(f"\n![{Path(path).stem}]({Path(path).name})\n" for path in paths)
    replace_file(out, lambda path: path.write_text(page, encoding="utf-8"))
    print(", ".join([str(out), *paths]))
