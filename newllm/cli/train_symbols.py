"""``newllm train symbols``: exact tests of memory and of state, trained and measured in one go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from newllm.cli import Command
from newllm.training.config import ModelConfig, TrainConfig

if TYPE_CHECKING:
    from newllm.data.recall.symbols import SymbolTask

SUITE_ROWS = "runs/recall.jsonl"


@dataclass
class SymbolOptions:
    """Train a small model on associative recall, rewriting or words of a group, and test it on longer ones.

    mqar asks for the values of many keys (Zoology's settings), rewrite for the last of many values, parity,
    s3 and a5 for the product of all elements so far. Appends a row for each test.

    Args:
        task: mqar, rewrite, parity, s3 or a5.
        sizes: what it is trained on, one after another in equal shares: pairs, updates, or elements.
        tests: what it is tested on.
        length: symbols of a sequence of mqar.
        vocabulary: of mqar.
        cell: senri, or the context language model's gated or simple one.
        context_dim: numbers of its context.
        rows_per_step: sequences of a batch.
        samples: sequences of a test.
        out: folder of the run.
        rows: the file of results.
        name: of the model in the rows (null: the cell and its rule).
        model: the Senri.
        train: how it is trained.
    """

    task: Literal["mqar", "rewrite", "parity", "s3", "a5"]
    sizes: list[int] = field(default_factory=lambda: [4, 16, 64])
    tests: list[int] = field(default_factory=lambda: [64])
    length: int = 512
    vocabulary: int = 8192
    cell: Literal["senri", "gated", "simple"] = "senri"
    context_dim: int = 128
    rows_per_step: int = 64
    samples: int = 200
    out: str = "runs/symbols"
    rows: str = SUITE_ROWS
    name: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        """Raises ``ValueError`` for nothing to train on or to test."""
        for name in ("sizes", "tests"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must hold numbers of at least 1, got {getattr(self, name)}")
        for name in ("rows_per_step", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def run(
    options: SymbolOptions,
    exchange: Callable[[Any], tuple[Any, str, int]] | None = None,
    head: str | None = None,
) -> int | None:
    """Train, test, print.

    ``exchange`` may put another model in the place of the one that ``options`` describe: itself, its name in
    the rows, and bytes of its state. ``head`` is the commit of a checkout without its history.
    """
    import torch

    from newllm.backend import training_device, version_of
    from newllm.evaluation.recall import interval
    from newllm.evaluation.rows import RowFile, weights_digest
    from newllm.runs import Run, commit
    from newllm.training.symbols import SymbolBatches, accuracy, state_bytes
    from newllm.training.trainer import LanguageTrainer

    tasks, tests = ([_task(options, size) for size in sizes] for sizes in (options.sizes, options.tests))
    model = _model(options, max(task.vocabulary for task in (*tasks, *tests)))
    name, size = options.name or " ".join(filter(None, (options.cell, _rule(options)))), state_bytes(model)
    if exchange is not None:
        model, name, size = exchange(model)
    model = model.to(training_device())
    record = Run(options.out, asdict(options), seed=options.train.seed)
    config = options.train
    batches = SymbolBatches(tasks, rows=options.rows_per_step, steps=config.steps, seed=config.seed)
    trainer = LanguageTrainer(model, batches, config, record)
    trainer.fit()
    if trainer.interrupted:
        return 128 + trainer.interrupted
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu"
    facts = {
        "model": name, "weights": weights_digest(model), "memory": "on", "depth": None,
        "state_bytes": size, "steps": config.steps, "device": device, "torch": version_of("torch"),
        "seed": config.seed, "commit": head or commit(),
    }  # fmt: skip
    rows = RowFile(options.rows)
    for size, test in zip(options.tests, tests, strict=True):
        shares = accuracy(model, test, samples=options.samples, seed=config.seed)
        score, ci95 = sum(shares) / len(shares), interval(shares)
        rows.append(
            {
                "suite": options.task,
                **facts,
                "length": size,
                "samples": len(shares),
                "score": score,
                "ci95": ci95,
            }
        )
        print(f"{test.name}: {score:.4f} right, 95 % interval {ci95[0]:.4f} to {ci95[1]:.4f}", flush=True)
    return None


def _rule(options: SymbolOptions) -> str | None:
    return options.model.rule if options.cell == "senri" else None


def _task(options: SymbolOptions, size: int) -> SymbolTask:
    from newllm.data.recall import symbols

    if options.task == "mqar":
        return symbols.mqar(size, options.length, options.vocabulary)
    if options.task == "rewrite":
        return symbols.rewrite(size)
    return symbols.group_word(options.task, size)


def _model(options: SymbolOptions, vocabulary: int) -> Any:
    from newllm.training.scratch import context_of, senri_of

    if options.cell == "senri":
        return senri_of(options.model, vocabulary, seed=options.train.seed)
    return context_of(options.cell, options.context_dim, vocabulary, seed=options.train.seed)


COMMANDS = {"symbols": Command(SymbolOptions, run)}
