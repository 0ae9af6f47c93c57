"""``newllm eval``: what a model's memory is worth."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from newllm.cli import Command
from newllm.cli.eval_harness import HarnessOptions, run as run_harness
from newllm.cli.eval_memory import MemoryOptions, run as run_memory
from newllm.cli.eval_recall import SuiteOptions, run as run_suites
from newllm.cli.eval_report import ReportOptions, run as run_report
from newllm.cli.loading import Dtype

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from newllm.data.passkey import PasskeyTask
    from newllm.data.text import Text
    from newllm.evaluation.passkey import Cell
    from newllm.evaluation.perplexity import PerplexityReport
    from newllm.runs import Run

_MIB = 2**20


@dataclass
class PerplexityOptions:
    """Stream a text through one session of constant memory: perplexity by position, and the memory taken.

    Leaves results.json, metrics.jsonl, perplexity.png and config.yaml.

    Args:
        model: Senri folder or hub id.
        text: a name, a file or a folder (see ``newllm data list``).
        out: folder of the results (null: runs/eval-perplexity-<model>).
        dtype: of the weights (auto: the checkpoint's).
        device: where to run.
        chunk: tokens of one pass.
        max_tokens: tokens of the text to read (null: all).
        memory: off leaves the window alone.
        sequence_ranks: processes of torchrun that read the text together, in slices; the first reports.
    """

    model: str
    text: str = "embedded"
    out: str | None = None
    dtype: Dtype = "auto"
    device: str = "auto"
    chunk: int = 1024
    max_tokens: int | None = None
    memory: bool = True
    sequence_ranks: int = 1


@dataclass
class PasskeyOptions:
    """Hide a key in a text, ask for it at the end: exact recall by length of the text and depth of the key.

    Leaves results.json, metrics.jsonl, recall.png and config.yaml.

    Args:
        model: Senri folder or hub id.
        text: what the key hides in: a name, a file or a folder (see ``newllm data list``).
        out: folder of the results (null: runs/eval-passkey-<model>).
        dtype: of the weights (auto: the checkpoint's).
        device: where to run.
        multiples: lengths of the prompts in windows.
        lengths: lengths in tokens instead.
        depths: places of the key, from 0, the first token, to 1, the last.
        beyond_windows: keep every key out of what the stacked windows can see (layers * window tokens).
        samples: prompts of each length and depth.
        key_length: digits of the key (null: 3 for byte models, 5 for others).
        control: measure the same model without its memories too.
        batch_tokens: tokens of one pass.
        seed: seed of the prompts.
        sequence_ranks: processes of torchrun that read each prompt together, in slices; the first reports.
    """

    model: str
    text: str = "embedded"
    out: str | None = None
    dtype: Dtype = "auto"
    device: str = "auto"
    multiples: list[float] = field(default_factory=lambda: [4, 16, 64])
    lengths: list[int] | None = None
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    beyond_windows: bool = False
    samples: int = 20
    key_length: int | None = None
    control: bool = False
    batch_tokens: int = 32768
    seed: int = 0
    sequence_ranks: int = 1


def run_perplexity(options: PerplexityOptions) -> None:
    """Measure, draw, write and print."""
    from rich.console import Console

    from newllm.cli.ranks import line_over
    from newllm.data.tokenizer import encode
    from newllm.evaluation.control import remove_memories
    from newllm.evaluation.perplexity import perplexity_by_position
    from newllm.evaluation.plots import perplexity_figure
    from newllm.models.session import Session
    from newllm.runs import commit

    if options.max_tokens is not None and options.max_tokens < 2:
        raise ValueError(f"max_tokens must be at least 2, got {options.max_tokens}")
    model, tokenizer, text = _opened(options)
    if not options.memory:
        remove_memories(model)
    session = Session(model, tokenizer, chunk=options.chunk)
    ids = encode(tokenizer, text.text)
    _check_length(ids, text, _window(model))
    record, head = _record(options, "perplexity", text, seed=0), commit()
    with line_over(options.sequence_ranks, model.device) as line:
        report = perplexity_by_position(
            session,
            ids[: options.max_tokens],
            progress=record.writes,
            on_chunk=lambda chunk: record.log(**chunk._asdict()),
            mesh=line,
        )
    if not record.writes:
        return
    shared = {"suite": "perplexity", "model": options.model, "text": text.name, "memory": options.memory}
    rows = [
        {
            **shared,
            "start": cell.start,
            "length": cell.end,
            "depth": None,
            "samples": cell.tokens,
            "score": cell.perplexity,
            "ci95": cell.perplexity_ci95,
            "seed": None,
            "commit": head,
        }
        for cell in (*report.bins, report.total)
    ]
    path = record.result("results.json", {"window": report.window, "bins": rows[:-1], "total": rows[-1]})
    picture = record.plot("perplexity.png", perplexity_figure(report))
    console = Console()
    console.print(_perplexity_table(report, text.name))
    console.print(_memory_line(report), highlight=False)
    console.print(f"{path} and {picture}", highlight=False)


def run_passkey(options: PasskeyOptions) -> None:
    """Measure, draw, write and print."""
    from rich.console import Console

    from newllm.cli.ranks import line_over
    from newllm.evaluation.control import remove_memories
    from newllm.evaluation.passkey import passkey_recall
    from newllm.evaluation.plots import recall_figure
    from newllm.runs import commit

    model, tokenizer, text = _opened(options)
    window = _window(model)
    task = _task(tokenizer, text.text, options.key_length)
    _check_length(task.filler, text, window)
    lengths = options.lengths or [round(multiple * window) for multiple in options.multiples]
    reach = model.config.num_hidden_layers * window if options.beyond_windows else 0
    for length in lengths:
        task.last_start(length, reach)
    record, head = _record(options, "passkey", text, seed=options.seed), commit()
    rows: list[dict[str, Any]] = []
    recall: dict[str, list[Cell]] = {}
    with line_over(options.sequence_ranks, model.device) as line:
        for name in ("memory", "window_only") if options.control else ("memory",):
            if name == "window_only":
                remove_memories(model)
            shared = {"suite": "passkey", "model": options.model, "memory": name == "memory", "reach": reach}

            def keep(cell: Cell, shared: dict[str, Any] = shared) -> None:
                rows.append({**shared, **cell._asdict(), "seed": options.seed, "commit": head})
                record.log(**rows[-1])

            recall[name] = passkey_recall(
                model,
                task,
                lengths=lengths,
                depths=options.depths,
                samples=options.samples,
                reach=reach,
                seed=options.seed,
                batch_tokens=options.batch_tokens,
                progress=record.writes,
                mesh=line,
                on_cell=keep,
            )
    if not record.writes:
        return
    results = {"window": window, "recall": _by_multiple(recall, window), "rows": rows}
    path = record.result("results.json", results)
    picture = record.plot("recall.png", recall_figure(results))
    console = Console()
    console.print(_recall_table(recall))
    console.print(f"{path} and {picture}", highlight=False)


def _opened(options: PerplexityOptions | PasskeyOptions) -> tuple[Any, Any, Text]:
    """The model, its tokenizer and the text, in each of the processes that share it."""
    from newllm.cli.loading import load
    from newllm.cli.ranks import check_ranks, rank_device
    from newllm.data.text import load_text

    check_ranks(options.sequence_ranks)
    text = load_text(options.text)
    device = rank_device(options.device, options.sequence_ranks)
    return *load(options.model, dtype=options.dtype, device=device), text


def _record(options: PerplexityOptions | PasskeyOptions, suite: str, text: Text, *, seed: int) -> Run:
    """The folder of the results, which the first process alone writes."""
    from newllm.backend import process
    from newllm.runs import Run

    folder = options.out or f"runs/eval-{suite}-{Path(options.model).resolve().name}"
    source = {"name": text.name, "characters": len(text.text), "sha256": text.sha256}
    return Run(folder, {**asdict(options), "text": source}, seed=seed, writes=process()[0] == 0)


def _window(model: Any) -> int:
    return int(model.config.sliding_window or model.config.segment)


def _check_length(ids: Tensor, text: Text, window: int) -> None:
    if len(ids) < window:
        raise ValueError(
            f"text must hold at least one window of {window} tokens, got {len(ids)} tokens in {text.name}"
        )


def _task(tokenizer: Any, text: str, key_length: int | None) -> PasskeyTask:
    from newllm.data.passkey import byte_passkey, text_passkey
    from newllm.data.tokenizer import is_byte_tokenizer

    if is_byte_tokenizer(tokenizer):
        return byte_passkey(text, *([] if key_length is None else [key_length]))
    return text_passkey(tokenizer, text, *([] if key_length is None else [key_length]))


def _by_multiple(recall: dict[str, list[Cell]], window: int) -> dict[str, dict[str, dict[str, float]]]:
    """Model -> length in windows -> depth -> score, as ``newllm demo`` writes it."""
    tables: dict[str, dict[str, dict[str, float]]] = {}
    for name, cells in recall.items():
        table = tables.setdefault(name, {})
        for cell in cells:
            table.setdefault(f"{cell.length / window:.10g}", {})[str(cell.depth)] = cell.score
    return tables


def _recall_table(recall: dict[str, list[Cell]]) -> Table:
    from rich.table import Table

    table = Table(title="exact recall of the key, with 95 % intervals", title_justify="left")
    for column in ("model", "length", "depth", "samples", "recalled", "from", "to"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, cells in recall.items():
        for cell in cells:
            shares = [f"{share:.3f}" for share in (cell.score, *cell.ci95)]
            table.add_row(
                name.replace("_", " "), f"{cell.length:,}", f"{cell.depth:g}", str(cell.samples), *shares
            )
    return table


def _perplexity_table(report: PerplexityReport, text: str) -> Table:
    from rich.table import Table

    table = Table(title=f"perplexity of {text} by position, with 95 % intervals", title_justify="left")
    for column in ("positions", "tokens", "loss (nats)", "perplexity", "from", "to"):
        table.add_column(column, justify="right")
    for cell in (*report.bins, report.total):
        table.add_row(
            f"{cell.start:,} - {cell.end - 1:,}",
            f"{cell.tokens:,}",
            f"{cell.nll:.4f}",
            *(f"{value:.2f}" for value in (cell.perplexity, *cell.perplexity_ci95)),
            end_section=cell is report.bins[-1],
        )
    return table


def _memory_line(report: PerplexityReport) -> str:
    settled, last = report.settled(), report.chunks[-1]
    after = [chunk.resident_bytes / _MIB for chunk in report.chunks if chunk.tokens >= settled.tokens]
    return (
        f"resident memory: {after[0]:,.0f} MiB after the first window ({settled.tokens:,} tokens), "
        f"{after[-1]:,.0f} MiB at the end, at most {max(after):,.0f} MiB between; state of the stream: "
        f"{settled.state_bytes:,} and {last.state_bytes:,} bytes; "
        f"{report.total.tokens / last.seconds:,.0f} tokens/s"
    )


COMMANDS = {
    "recall": Command(SuiteOptions, run_suites, flag="--suite"),
    "report": Command(ReportOptions, run_report),
    "harness": Command(HarnessOptions, run_harness, flag="--harness"),
    "memory": Command(MemoryOptions, run_memory),
    "perplexity": Command(PerplexityOptions, run_perplexity),
    "passkey": Command(PasskeyOptions, run_passkey),
}
