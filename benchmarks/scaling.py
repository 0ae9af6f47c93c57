"""Fill ``docs/scaling.md`` from ``benchmarks/results/scale_out.jsonl``: a model of time and bytes.

``python benchmarks/scaling.py [--rows FILE] [--page FILE]`` replaces what stands between the page's two
marks. For slices of n tokens on P ranks the forward and backward pass of L layers takes

    seconds = L (a n + b + c + halo / bandwidth) + (P - 1) hop + max(0, (P - 1) hop - a n / 2)
    hop = chain n + latency + message / bandwidth

a and b are fitted to the rows of one GPU, latency and bandwidth to those of a single hop, and c is what the
layers of several GPUs took beyond all the rest (median). ``chain`` is what a
token costs in the fold from rank to rank: its share of a segment's K (V + 1) sums, read and written once at
the memory's bandwidth. Hops are the only term that grows with the ranks. They are paid once, not in each
layer, since ranks run askew, and backwards they hide behind the window's gradients.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from newllm.files import replace_file

ROOT = Path(__file__).resolve().parent.parent
ROWS, PAGE = ROOT / "benchmarks/results/scale_out.jsonl", ROOT / "docs/scaling.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
# Bytes per second that a chain of sums reaches, about two thirds of what a copy does.
MEMORY_BANDWIDTH = 2e12
# Their share of a layer's forward and backward time.
WINDOW_GRADIENTS = 0.5
# Of a model whose prediction stands beside that of a single layer.
LAYERS = 32
RANKS = (1, 2, 8, 64, 256, 1024)
TOKENS = (2**19, 2**22, 10**7, 10**8)
Row = dict[str, Any]


class Model(NamedTuple):
    """A layer's seconds ``per_token``, ``fixed``, and, where it is sliced, ``more``; a hop's ``latency``;
    ``bandwidth`` in bytes a second.
    """

    per_token: float
    fixed: float
    latency: float
    bandwidth: float
    sent: int
    state: int
    segment: int
    more: float = 0.0

    def seconds(self, tokens: int, ranks: int, layers: int = 1) -> float:
        """Forward and backward of some layers over ``tokens`` in even slices."""
        own = tokens / ranks
        work = self.per_token * own + self.fixed
        if ranks == 1:
            return layers * work
        # A segment's sums are read and what stands before it is written.
        chain = own / self.segment * 1.5 * self.state / MEMORY_BANDWIDTH
        hop = chain + self.latency + self.state / self.bandwidth
        halo = (self.sent - 2 * self.state) / self.bandwidth
        way = (ranks - 1) * hop
        return (
            layers * (work + self.more + halo) + way + max(0.0, way - WINDOW_GRADIENTS * self.per_token * own)
        )


def read_rows(path: Path) -> list[Row]:
    """The rows of a jsonl file; none where there is no file."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines()]


def fit(rows: Iterable[Row], shape: str) -> Model | None:
    """The model of a layer's shape; None without rows of one GPU at two lengths, and of hops."""
    rows = [*rows]
    layers = [row for row in rows if row["part"] == "layer" and row["shape"] == shape]
    alone = [row for row in layers if row["gpus"] == 1]
    sliced = [row for row in layers if row["gpus"] > 1]
    hops = [row for row in rows if row["part"] == "hop"]
    if len({row["tokens"] for row in alone}) < 2 or len({row["bytes"] for row in hops}) < 2 or not sliced:
        return None
    per_token, fixed = np.polyfit([row["tokens"] for row in alone], [row["ms"] / 1e3 for row in alone], 1)
    per_byte, latency = np.polyfit([row["bytes"] for row in hops], [row["ms"] / 1e3 for row in hops], 1)
    row = sliced[0]
    state = row["kv_heads"] * row["width"] * (row["width"] + 1) * 4
    model = Model(
        float(per_token), max(0.0, float(fixed)), max(0.0, float(latency)), 1 / max(float(per_byte), 1e-15),
        row["sent"], state, row["window"],
    )  # fmt: skip
    more = [each["ms"] / 1e3 - model.seconds(each["tokens"], each["gpus"]) for each in sliced]
    return model._replace(more=max(0.0, float(np.median(more))))


def table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> list[str]:
    """A Markdown table."""
    lines = [" | ".join(map(str, row)) for row in (head, ["---"] * len(head), *rows)]
    return [f"| {line} |" for line in lines] + [""]


def measured(rows: list[Row]) -> list[str]:
    """What was measured, and how near the model comes."""
    lines = ["### Measured", ""]
    timed = [row for row in rows if row["part"] in ("layer", "step", "prefill", "forward")]
    cells = []
    for row in timed:
        model = fit(rows, row["shape"]) if row["part"] == "layer" else None
        told = "" if model is None else f"{1e3 * model.seconds(row['tokens'], row['gpus']):.2f}"
        what = row.get("shape", "135M, compiled" if row.get("compiled") else "135M")
        cells.append((row["part"], what, f"{row['tokens']:,}", row["gpus"], f"{row['ms']:.2f}", told))
    lines += table(("part", "shape", "tokens", "GPUs", "ms", "model, ms"), cells)
    gains = [row for row in rows if "speedup" in row]
    lines += table(
        ("speed-up", "shape", "tokens", "times"),
        [
            (row["part"].split()[0], row.get("shape", "compiled" if row.get("compiled") else ""),
             f"{row['tokens']:,}", f"{row['speedup']:.3f}")
            for row in gains
        ],
    )  # fmt: skip
    checks = [row for row in rows if row["part"] == "exact"]
    names = ("out", "dq", "dk", "dv", "dbeta")
    lines += table(
        ("against one GPU", "rule", "equal bits: output, memory", *names),
        [
            (row["shape"], row["rule"], f"{row['output_bits']}, {row['state_bits']}",
             *(f"{row[name]:.1e}" for name in names))
            for row in checks
        ],
    )  # fmt: skip
    for row in rows:
        if row["part"] == "forward":
            told = f"{row['tokens']:,} tokens: error of the memory against float64 {row['state_error']:.1e}."
            lines += [told, ""]
    first = rows[0]
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    return [*lines, f"On {first['devices']}, torch {first['torch']}, commits {commits}.", ""]


def predicted(rows: list[Row]) -> list[str]:
    """Seconds of a layer and the efficiency, for more ranks and tokens than were measured."""
    lines = []
    for shape in sorted({row["shape"] for row in rows if row["part"] == "layer"}):
        model = fit(rows, shape)
        if model is None:
            lines += [f"No prediction for {shape}: it needs rows of one GPU at two lengths, and of hops.", ""]
            continue
        cells = []
        for tokens in TOKENS:
            one = model.seconds(tokens, 1)
            for ranks in RANKS:
                if tokens // ranks >= model.segment:
                    now = model.seconds(tokens, ranks)
                    deep = LAYERS * one / model.seconds(tokens, ranks, LAYERS)
                    cells.append((
                        f"{tokens:,}", f"{ranks:,}", f"{1e3 * now:,.2f}", f"{one / now:,.1f}",
                        f"{one / now / ranks:.2f}", f"{deep:,.1f}", f"{deep / ranks:.2f}",
                    ))  # fmt: skip
        lines += [f"### Predicted, shape {shape}", ""]
        head = "tokens", "GPUs", "ms of a layer, fwd+bwd", "times one GPU", "efficiency"
        lines += table((*head, f"{LAYERS} layers, times one GPU", "efficiency"), cells)
        lines += [
            f"Fitted: {1e9 * model.per_token:.3f} ns a token and {1e3 * model.fixed:.3f} ms, of a slice "
            f"{1e3 * model.more:.3f} ms more; a hop "
            f"{1e6 * model.latency:.1f} us and {model.bandwidth / 1e9:.1f} GB/s; "
            f"{model.sent:,} bytes sent by a rank in both passes.", "",
        ]  # fmt: skip
    return lines


def filled(page: str, rows: list[Row]) -> str:
    """``page`` with what ``rows`` say between its marks."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    if rows:
        body = "\n".join([*measured(rows), *predicted(rows)]).strip()
    else:
        body = (
            "Not measured yet: on a host with two GPUs\n"
            "`python benchmarks/scale_out.py --out benchmarks/results --processes 2` makes the rows,\n"
            "and then `python benchmarks/scaling.py` this part of the page."
        )
    return f"{head}{BEGIN}\n{body}\n{END}{tail}"


def main() -> None:
    """Fill the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    page = filled(PAGE.read_text(encoding="utf-8"), read_rows(args.rows))
    replace_file(args.page, lambda path: path.write_text(page, encoding="utf-8"))


if __name__ == "__main__":
    main()
