"""``newllm demo``: train a small Senri and its window-only control, and show what the memory recalls."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from newllm.cli.options import parse
from newllm.cli.presets import preset_path
from newllm.training.config import Recipe

MULTIPLES = (4, 16, 64)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PRESET = "demo"
_HELD_OUT = 0.1
_SHOWN = 160


@dataclass
class Options:
    """Train a small model of constant memory and see it recall, in five minutes on two cores.

    A window-only control learns from the same data. Leaves results.json, recall.png, sample.txt, the model
    and its metrics.

    Args:
        out: folder of the results.
        steps: training steps of each model (null: the preset's).
        samples: prompts of each length and depth.
        seed: seed of weights and data (null: the preset's).
    """

    out: str = "runs/demo"
    steps: int | None = None
    samples: int = 100
    seed: int | None = None


def run(options: Options) -> None:
    """Train, measure, draw, and write ``results.json``."""
    from rich.console import Console

    from newllm.data.passkey import byte_passkey
    from newllm.data.text import embedded_corpus
    from newllm.evaluation.passkey import state_bytes
    from newllm.models.files import save_model
    from newllm.runs import Run, provenance
    from newllm.training.scratch import scratch_model, window_only

    started = time.monotonic()
    console = Console()
    recipe = _recipe(options)
    corpus = embedded_corpus()
    border = int(len(corpus.text) * (1 - _HELD_OUT))
    training, held_out = (
        byte_passkey(text, recipe.task.key_length) for text in (corpus.text[:border], corpus.text[border:])
    )
    text = {"name": corpus.name, "characters": len(corpus.text), "sha256": corpus.sha256}
    record = Run(options.out, {**asdict(recipe), "text": text}, seed=recipe.train.seed)
    console.print(
        f"text: the Python language reference, {len(corpus.text):,} characters; results: {record.out}"
    )

    window = recipe.model.window
    recall: dict[str, Any] = {}
    for name, config in (("memory", recipe.model), ("window_only", window_only(recipe.model))):
        model, tokenizer = scratch_model(config, seed=recipe.train.seed)
        size = sum(parameter.numel() for parameter in model.parameters())
        console.print(f"\n[bold]{name}[/bold]: {config.layers} layers, window {window}, {size:,} parameters")
        _train(model, training, recipe, record, name)
        recall[name] = _recall(model, held_out, window, options.samples, recipe.train.seed)
        if name == "memory":
            sizes = {str(window * multiple): state_bytes(model, window * multiple) for multiple in MULTIPLES}
            sample = _continuation(model, tokenizer, corpus.text[border : border + window * MULTIPLES[-1]])
            save_model(model, tokenizer, record.out / "model", overwrite=True)
    results = {
        "window": window,
        "recall": recall,
        "state_bytes": sizes,
        "seconds": round(time.monotonic() - started, 1),
        "provenance": provenance(recipe.train.seed),
    }
    _show(console, record, results, sample)


def _recipe(options: Options) -> Recipe:
    """The preset, as it was asked to be changed."""
    recipe = parse(Recipe, ["--config", str(preset_path(PRESET))], name="newllm demo")
    assert recipe is not None
    changed = {key: value for key in ("steps", "seed") if (value := getattr(options, key)) is not None}
    return replace(recipe, train=replace(recipe.train, **changed))


def _train(model: Any, task: Any, recipe: Any, record: Any, name: str) -> None:
    from newllm.training.batches import NeedleBatches
    from newllm.training.trainer import LanguageTrainer

    record.log(model=name)
    batches = NeedleBatches(
        task,
        recipe.task,
        segment=model.config.segment,
        steps=recipe.train.steps,
        seed=recipe.train.seed,
    )
    trainer = LanguageTrainer(model, batches, recipe.train, record)
    trainer.fit()
    if trainer.interrupted:
        raise KeyboardInterrupt
    model.eval()


def _recall(model: Any, task: Any, window: int, samples: int, seed: int) -> dict[str, dict[str, float]]:
    """Exact-match share by multiple of the window and by depth."""
    from newllm.evaluation.passkey import passkey_recall

    cells = passkey_recall(
        model,
        task,
        lengths=[window * multiple for multiple in MULTIPLES],
        depths=DEPTHS,
        samples=samples,
        # Every depth lies beyond what the stacked windows reach, so that only a memory can know.
        reach=model.config.num_hidden_layers * window,
        seed=seed,
    )
    table: dict[str, dict[str, float]] = {}
    for cell in cells:
        table.setdefault(str(cell.length // window), {})[str(cell.depth)] = cell.score
    return table


def _continuation(model: Any, tokenizer: Any, text: str) -> str:
    """What the model writes after ``text``, read as one stream."""
    import torch

    from newllm.models.sampling import Sampling
    from newllm.models.session import Session

    session = Session(model, tokenizer)
    sampling = Sampling(temperature=0.7, top_k=20)
    generator = torch.Generator().manual_seed(0)
    return str(session.generate(text, max_new_tokens=_SHOWN, sampling=sampling, generator=generator))


def _show(console: Any, record: Any, results: dict[str, Any], sample: str) -> None:
    from rich.table import Table

    from newllm.evaluation.plots import recall_figure

    path = record.result("results.json", results)
    picture = record.plot("recall.png", recall_figure(results))
    record.text("sample.txt", sample + "\n")
    table = Table(title="Exact-match recall of a hidden key, by length in windows and by depth")
    for column in ("model", "windows", *(f"{depth:g}" for depth in DEPTHS)):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, lengths in results["recall"].items():
        for multiple, depths in lengths.items():
            scores = [f"{score:.2f}" for score in depths.values()]
            table.add_row(name.replace("_", " "), multiple, *scores)
    console.print()
    console.print(table)
    sizes = ", ".join(f"{size:,} at {length} tokens" for length, size in results["state_bytes"].items())
    console.print(f"bytes of state: {sizes}")
    console.print("the model goes on with its text like this:", style="dim")
    console.print(repr(sample), markup=False, highlight=False)
    console.print(f"{results['seconds']} s; {path} and {picture}")
