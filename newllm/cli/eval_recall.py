"""``newllm eval NAME --suite ...``: recall by length and depth beside its controls, resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from newllm.cli.loading import Dtype

if TYPE_CHECKING:
    from newllm.evaluation.recall import Answerer
    from newllm.evaluation.rows import Row

Control = Literal["zeroed", "cleaned", "window", "oracle", "blind"]
_UNITS = {"k": 2**10, "m": 2**20}


@dataclass
class SuiteOptions:
    """Ask for what is hidden in long text: the share that comes back to the token, by length and depth.

    Prompts are streamed through the model's state of constant size. Each cell becomes a line of rows as soon
    as it is measured; cells that are there are not measured again. Leaves a heat map for each suite.

    Args:
        model: folder or hub id of a Senri.
        suite: passkey, niah, ruler, babilong, or names of theirs with commas between them; capacity, alone:
            random pairs in the memories' trained features.
        lengths: tokens of prompts, such as 4k,16k or 4k:1m for every doubling.
        depths: where the first thing asked for stands, from 0 to 1 ([null]: anywhere).
        samples: prompts of a cell (null: 100 up to 128k, 40 up to 1m, 8 up to 16m, 4 beyond).
        control: also measure the model with emptied memories (zeroed), with memories cleaned by a truncated
            SVD (cleaned) or without any (window), and readers of the whole prompt (oracle) or of its question
            alone (blind).
        text: whose validation documents things hide in: a name, a file or a folder.
        key_length: digits of a passkey.
        rows: the file of results.
        out: folder of the heat maps.
        dtype: of the weights (auto: the checkpoint's).
        autocast: compute in bfloat16 with float32 weights, as --train.bf16 does.
        device: where to run.
        batch_tokens: tokens of one pass.
        seed: seed of the prompts.
    """

    model: str
    suite: str = field(kw_only=True)
    lengths: str = "4k:32k"
    depths: list[float | None] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    samples: int | None = None
    control: list[Control] = field(default_factory=list)
    text: str = "embedded"
    key_length: int = 5
    rows: str = "runs/recall.jsonl"
    out: str = "runs/eval-recall"
    dtype: Dtype = "auto"
    autocast: bool = False
    device: str = "auto"
    batch_tokens: int = 32768
    seed: int = 0


def parse_lengths(text: str) -> list[int]:
    """``4k,16k`` as it says; ``4k:1m`` every doubling of 4,096 up to 1,048,576.

    Raises ``ValueError`` for anything else.
    """
    first, colon, last = text.partition(":")
    if not colon:
        return [_tokens(word, text) for word in text.split(",")]
    low, high = _tokens(first, text), _tokens(last, text)
    found = []
    while low <= high:
        found.append(low)
        low *= 2
    if not found:
        raise ValueError(f"lengths must rise, got {text!r}")
    return found


def _tokens(word: str, text: str) -> int:
    number, unit = (word[:-1], word[-1:]) if word[-1:].lower() in _UNITS else (word, "")
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"lengths must be numbers such as 4k,16k or 4k:1m, got {text!r}")
    return int(number) * _UNITS.get(unit.lower(), 1)


def run(options: SuiteOptions) -> None:
    """Measure, draw, print."""
    if options.suite == "capacity":
        from newllm.cli.diagnose_capacity import CapacityOptions, run as run_capacity

        return run_capacity(
            CapacityOptions(options.model, seed=options.seed, rows=options.rows, out=options.out)
        )
    from rich.console import Console

    from newllm.cli.loading import load
    from newllm.data.recall.suites import GROUPS, make_suite, suite_names
    from newllm.data.sources import open_source
    from newllm.data.vocabularies import fingerprint
    from newllm.evaluation.recall import Task, measure, usual_samples
    from newllm.evaluation.rows import RowFile

    names, lengths = suite_names(options.suite), parse_lengths(options.lengths)
    held = open_source(options.text).validation
    text = held.joined()
    model, tokenizer = load(options.model, dtype=options.dtype, device=options.device)
    window, segment = int(model.config.sliding_window or model.config.segment), int(model.config.segment)
    suites = [
        make_suite(name, tokenizer, text, segment=segment, key_length=options.key_length) for name in names
    ]
    count = options.samples
    samples: Callable[[int], int] = usual_samples if count is None else lambda length: count
    task = Task(lengths, options.depths, samples, options.seed, options.batch_tokens)
    rows, found = RowFile(options.rows), []
    with _precision(options.autocast, model.device.type):
        for answerer, facts in _answerers(options, model):
            facts |= {
                "text": options.text, "text_sha256": held.sha256[:12], "autocast": options.autocast,
                "tokenizer": fingerprint(tokenizer)[:12], "window": window, "segment": segment,
            }  # fmt: skip
            for suite in suites:
                digits = {"key_length": options.key_length} if suite.name in GROUPS["passkey"] else {}
                found += measure(answerer(suite), suite, task, facts=facts | digits, rows=rows)
    console = Console()
    console.print(_table(found))
    console.print(f"{rows.path}, {', '.join(pictures(found, options.out))}", highlight=False)


def _answerers(
    options: SuiteOptions, model: Any
) -> Iterator[tuple[Callable[[Any], Answerer], dict[str, Any]]]:
    """The model and its controls, and the facts of their rows; the one without memories comes last."""
    from newllm.evaluation.control import clean_memories, remove_memories, zero_memories
    from newllm.evaluation.recall import model_answers, reader_answers
    from newllm.evaluation.rows import weights_digest
    from newllm.runs import commit

    head = commit()
    facts = {"model": options.model, "weights": weights_digest(model), "commit": head}
    yield partial(_same, model_answers(model)), {**facts, "memory": "on"}
    for name, change in (("zeroed", zero_memories), ("cleaned", clean_memories)):
        if name in options.control:
            yield partial(_same, model_answers(model, before_answer=change)), {**facts, "memory": name}
    for name, sees in (("oracle", None), ("blind", 0)):
        if name in options.control:
            reader = {"model": name, "weights": None, "commit": head, "memory": "reader"}
            yield partial(reader_answers, sees=sees), reader
    if "window" in options.control:
        remove_memories(model)
        yield partial(_same, model_answers(model)), {**facts, "memory": "window"}


def _same(answerer: Answerer, suite: Any) -> Answerer:
    """A model answers every suite alike."""
    return answerer


def _precision(autocast: bool, device: str) -> Any:
    import torch

    return torch.autocast(device, torch.bfloat16) if autocast else nullcontext()


def pictures(rows: list[Row], out: str, prefix: str = "") -> list[str]:
    """A heat map for each suite that was measured at depths, and each window if there are several."""
    from pathlib import Path

    from newllm.evaluation.plots import recall_figure
    from newllm.files import replace_file

    groups: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        if row["depth"] is not None:
            groups.setdefault(row["suite"], {}).setdefault(row["window"], []).append(row)
    paths = []
    for suite, windows in groups.items():
        for window, own in windows.items():
            figure = recall_figure({"window": window, "recall": _by_cell(own)}, f"Recall: {suite}")
            name = suite if len(windows) == 1 else f"{suite}-{window}"
            path = Path(out) / f"{prefix}{name}.png"
            replace_file(path, partial(figure.savefig, dpi=150, format="png"))
            paths.append(str(path))
    return paths


def _by_cell(rows: list[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Who answered -> multiple of the window -> depth -> mean score of all rows of that cell."""
    cells: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        name = row["model"] if row["memory"] == "reader" else f"memory {row['memory']}"
        multiple = f"{row['length'] / row['window']:.10g}"
        cells.setdefault((name, multiple, str(row["depth"])), []).append(row["score"])
    means: dict[str, dict[str, dict[str, float]]] = {}
    for (name, multiple, depth), scores in cells.items():
        means.setdefault(name, {}).setdefault(multiple, {})[depth] = fmean(scores)
    return means


def _table(rows: list[Row]) -> Any:
    """Scores, lengths downwards and depths to the right."""
    from rich.table import Table

    depths = list(dict.fromkeys(row["depth"] for row in rows))
    table = Table(title="share of answers that came back, by depth", title_justify="left")
    for column in ("suite", "model", "memory", "length"):
        table.add_column(column, justify="right" if column == "length" else "left")
    for depth in depths:
        table.add_column("any" if depth is None else f"{depth:g}", justify="right")
    for key in dict.fromkeys(_line(row) for row in rows):
        scores = {row["depth"]: f"{row['score']:.3f}" for row in rows if _line(row) == key}
        suite, model, memory, length = key
        table.add_row(suite, model, memory, f"{length:,}", *(scores.get(depth, "") for depth in depths))
    return table


def _line(row: Row) -> tuple[str, str, str, int]:
    return row["suite"], row["model"], row["memory"], row["length"]
