"""``newllm eval report``: docs/recall.md and its heat maps from rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class ReportOptions:
    """Write the page of recall from rows, and a heat map of each suite beside it.

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
    from newllm.cli.eval_recall import pictures
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
    drawn = [row for row in rows if row.get("depth") is not None and row.get("window")]
    paths = pictures(drawn, drawn[0]["window"], str(out.parent), "recall-") if drawn else []
    page = recall_report(rows, found)
    page += "".join(f"\n![{Path(path).stem}]({Path(path).name})\n" for path in paths)
    replace_file(out, lambda path: path.write_text(page, encoding="utf-8"))
    print(", ".join([str(out), *paths]))
