"""docs/recall.md from rows: what was measured, how, and what failed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import itemgetter

from newllm.evaluation.rows import Row

WHOLE = 0.99
_METHOD = """# Recall

What models with a memory recall from far beyond their window. Every figure comes from the rows of
{sources}; `newllm eval report` writes this page from them.

## Method

* **Forced answers.** An answer is right when each of its tokens is the likeliest given those before it, which
  is when greedy decoding would give it. Of several things asked for, a score is the share that came back.
* **Exact lengths.** A prompt has exactly the length that its row says, to the token, and is streamed through
  the state in pieces. Depth 0 is the first token, depth 1 the last place before the question.
* **Borders.** `passkey_border` puts each key across the border of a segment, cut in every way in turn.
* **Controls.** `zeroed` empties the memories just before the answer, so that a model keeps what it looked up
  while it read the question; `window` takes them out. Readers of the whole prompt (`oracle`) and of its
  question (`blind`) prove the suites (`tests/test_recall_suites.py`).
* **Counts of words.** `cwe` and `fwe` ask for what is frequent all over the prompt, so they have no depth;
  the answer is written freely, up to twice its tokens, and searched for each word, as RULER scores it.
* **Seeds.** A prompt depends on its suite, seed, length, depth and number alone: all models see the same.
  Filler is the validation documents of the text, which no training reads.
* **Intervals.** In brackets: the 95 % interval of the cell, Wilson's where each answer is right or wrong.
"""
_ABLATED = """\
The preset with one part changed, as `ABLATIONS` in `benchmarks/recall.py` says; `public-recipe` has none of
them. `python -m benchmarks.recall --preset quick --ablate --suites passkey,passkey_border --lengths 1024`
trains and measures all on one thread."""


def recall_report(rows: Sequence[Row], sources: Iterable[str]) -> str:
    """The page as Markdown, from all ``rows`` of the files ``sources``."""
    parts = [_METHOD.format(sources=", ".join(f"`{name}`" for name in sources))]
    capacity = [row for row in rows if row["suite"] == "capacity"]
    variants = [row for row in rows if row.get("variant")]
    rows = [row for row in rows if row["suite"] != "capacity" and not row.get("variant")]
    by_depth = [row for row in rows if row.get("depth") is not None]
    plain = [row for row in rows if row.get("depth") is None]
    if by_depth:
        parts.append("## By length and depth\n")
    for (suite, model, memory), group in groupby(sorted(by_depth, key=_who), _who):
        parts.append(f"### {suite}: {model}, memory {memory}\n\n{_table(list(group))}\n")
    if by_depth:
        parts.append(f"## What failed\n\n{_failures(by_depth)}\n")
    if variants:
        parts.append(f"## What each part of the recipe buys\n\n{_ABLATED}\n")
    for preset, group in groupby(sorted(variants, key=_preset), _preset):
        parts.append(f"### Preset {preset}\n\n{_ablations(list(group))}\n")
    if capacity:
        parts.append(f"## Random pairs in one head's memory\n\n{_capacities(capacity)}\n")
    if plain:
        parts.append(f"## Others\n\n{_others(plain)}\n")
    return "\n".join(parts)


_who = itemgetter("suite", "model", "memory")
_where = itemgetter("suite", "model", "depth")
_preset = itemgetter("preset")


def _table(rows: list[Row]) -> str:
    """Lengths downwards, depths to the right; over seeds the mean, and the interval of all samples."""
    depths = sorted({row["depth"] for row in rows})
    cells: dict[tuple[int, float], list[Row]] = defaultdict(list)
    for row in rows:
        cells[row["length"], row["depth"]].append(row)
    lines = [f"| length | {' | '.join(f'{depth:g}' for depth in depths)} | samples |"]
    lines.append("| ---: |" + " ---: |" * (len(depths) + 1))
    for length in sorted({row["length"] for row in rows}):
        own = [cells[length, depth] for depth in depths]
        counts = sorted({sum(row["samples"] for row in group) for group in own if group})
        lines.append(
            f"| {length:,} | {' | '.join(_cell(group) for group in own)} | {', '.join(map(str, counts))} |"
        )
    return "\n".join(lines) + f"\n\n{_facts(rows)}."


def _facts(rows: list[Row]) -> str:
    """Of whom the rows are."""
    first = rows[0]
    facts = [
        f"{first[name]:,} {words}" if isinstance(first.get(name), int) else ""
        for name, words in (("parameters", "parameters"), ("window", "tokens of window"))
    ]
    seeds = sorted({row["seed"] for row in rows})
    facts += [
        f"seeds {', '.join(map(str, seeds))}",
        f"commit {str(first['commit'])[:7]}",
        str(first.get("device", "")),
    ]
    return ", ".join(filter(None, facts))


def _cell(rows: list[Row]) -> str:
    if not rows:
        return ""
    total = sum(row["samples"] for row in rows)
    score = sum(row["score"] * row["samples"] for row in rows) / total
    low, high = min(row["ci95"][0] for row in rows), max(row["ci95"][1] for row in rows)
    return f"{score:.3f} [{low:.2f}, {high:.2f}]"


def _failures(rows: list[Row]) -> str:
    """Cells with a memory below ``WHOLE``."""
    failed = [row for row in rows if row["memory"] == "on" and row["score"] < WHOLE]
    asked = sum(row["memory"] == "on" for row in rows)
    if not failed:
        return f"None of {asked} cells with a memory is below {WHOLE}."
    lines = [f"{len(failed)} of {asked} cells with a memory are below {WHOLE}:\n"]
    for (suite, model, depth), group in groupby(sorted(failed, key=_where), _where):
        found = list(group)
        lengths = ", ".join(f"{row['length']:,}" for row in sorted(found, key=lambda row: row["length"]))
        low, high = min(row["score"] for row in found), max(row["score"] for row in found)
        scores = f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"
        lines.append(f"* {suite} of {model} at depth {depth:g}: {scores} ({lengths} tokens)")
    return "\n".join(lines)


def _ablations(rows: list[Row]) -> str:
    """Variants downwards, lengths to the right, the mean over seeds and the depths that no window reaches."""
    rows = [row for row in rows if row["depth"] is None or row["depth"] < 1]
    columns = sorted({(row["suite"], row["memory"], row["length"]) for row in rows})
    names = [f"{suite}, memory {memory}, {length:,}" for suite, memory, length in columns]
    lines = [
        f"| variant | steps trained | seeds | {' | '.join(names)} |",
        "| --- | ---: | ---: |" + " ---: |" * len(columns),
    ]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        cells = [
            [row for row in own if (row["suite"], row["memory"], row["length"]) == key] for key in columns
        ]
        steps = ", ".join(sorted({f"{row['steps']:,}" for row in own if row.get("steps")}))
        seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in own}))
        lines.append(f"| {variant} | {steps} | {seeds} | {' | '.join(_cell(group) for group in cells)} |")
    means = "The mean over depths below 1; in brackets the widest of the intervals' ends"
    return "\n".join(lines) + f"\n\n{means}: {_facts(rows)}."


def _capacities(rows: list[Row]) -> str:
    """Memories downwards, numbers of pairs to the right."""
    counts = sorted({row["length"] for row in rows})
    lines = [f"| memory | width | bytes | {' | '.join(map(str, counts))} |"]
    lines.append("| --- | ---: | ---: |" + " ---: |" * len(counts))
    for key in dict.fromkeys((row["model"], row["memory"], row["width"], row["state_bytes"]) for row in rows):
        own = {
            row["length"]: row
            for row in rows
            if (row["model"], row["memory"], row["width"], row["state_bytes"]) == key
        }
        scores = [f"{own[count]['score']:.3f}" if count in own else "" for count in counts]
        lines.append(f"| {key[0]}, {key[1]} | {key[2]} | {key[3]:,} | {' | '.join(scores)} |")
    first = rows[0]
    return "\n".join(lines) + (
        f"\n\nShare of standard normal pairs found again, the mean of {first['samples']} memories a cell, "
        f"commit {str(first['commit'])[:7]}."
    )


def _others(rows: list[Row]) -> str:
    lines = ["| suite | model | memory | size | samples | score | 95 % interval | seed |"]
    lines.append("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        interval = row.get("ci95")
        shown = "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
        lines.append(
            f"| {row['suite']} | {row['model']} | {row['memory']} | {row['length']} | {row['samples']} "
            f"| {row['score']:.3f} | {shown} | {row['seed']} |"
        )
    return "\n".join(lines)
