"""``newllm eval memory``: what each head takes from its memory."""

from __future__ import annotations

from dataclasses import dataclass

from newllm.cli.loading import Dtype


@dataclass
class MemoryOptions:
    """Read a text and report, head by head, the gate and how much of the output came from the memory.

    Args:
        model: folder or hub id of a Senri.
        text: a name, a file or a folder (see newllm data list).
        max_tokens: tokens of it to read.
        dtype: of the weights (auto: the checkpoint's).
        device: where to run.
        chunk: tokens of one pass.
        out: file of the report.
    """

    model: str
    text: str = "embedded"
    max_tokens: int = 16384
    dtype: Dtype = "auto"
    device: str = "auto"
    chunk: int = 1024
    out: str = "runs/memory.json"


def run(options: MemoryOptions) -> None:
    """Measure, write, print."""
    import json
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

    from newllm.cli.loading import load
    from newllm.data.text import load_text
    from newllm.data.tokenizer import encode
    from newllm.evaluation.memory_use import memory_use
    from newllm.files import replace_file
    from newllm.modules.gate import gate_histogram

    text = load_text(options.text)
    model, tokenizer = load(options.model, dtype=options.dtype, device=options.device)
    ids = encode(tokenizer, text.text)[: options.max_tokens]
    heads, fills = memory_use(model, ids, chunk=options.chunk)
    report = {
        "model": options.model, "text": text.name, "tokens": len(ids),
        "gate_histogram": gate_histogram(model),
        "heads": [use._asdict() for use in heads], "layers": [fill._asdict() for fill in fills],
    }  # fmt: skip
    replace_file(Path(options.out), lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))
    table = Table(title=f"what heads take from their memory over {len(ids):,} tokens", title_justify="left")
    for column in ("layer", "head", "gate", "share of output", "layer's effective rank"):
        table.add_column(column, justify="right")
    ranks = {fill.layer: fill.rank_ratio for fill in fills}
    for use in heads:
        table.add_row(
            str(use.layer), str(use.head), f"{use.gate:.3f}", f"{use.share:.3f}", f"{ranks[use.layer]:.3f}"
        )
    console = Console()
    console.print(table)
    console.print(f"heads by |gate| in tenths: {report['gate_histogram']}; {options.out}", highlight=False)
