"""``newllm train context`` and ``newllm train context-kv``: context models, trained in two phases."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from newllm.cli import Command
from newllm.cli.train_cvfpt import CvfptOptions, run_cvfpt
from newllm.data.sources import Offline
from newllm.training.config import SourceConfig
from newllm.training.phase_config import Phase1Config, Phase2Config

# Longer contexts than this are seen again in no text.
_LONGEST = 64


@dataclass(kw_only=True)
class PhaseOptions:
    """What both families that are trained in two phases are asked.

    Args:
        data: what to train on: a name (see newllm data sources), a file or a folder.
        offline: auto lets a stand-in take the place of a dataset out of reach, and says so; error does not.
        tokenizer: bytes, bpe:SIZE, words:SIZE, a folder or a hub id.
        out: folder of the run.
        overwrite: replace the model that lies there.
        resume: go on from the newest checkpoint of the run.
        save_seconds: between checkpoints.
        tokens: most training tokens (null: all).
        validation_tokens: most validation tokens.
        embed_dim: width of embeddings.
        seed: of the weights.
        source: which documents are read.
        phase1: how contexts are trained.
        phase2: how tokens are predicted from them.
    """

    data: str = "embedded"
    offline: Offline = "auto"
    tokenizer: str = "bpe:2048"
    out: str
    overwrite: bool = False
    resume: bool = False
    save_seconds: float = 60.0
    tokens: int | None = None
    validation_tokens: int = 20000
    embed_dim: int = 768
    seed: int = 42
    source: SourceConfig = field(default_factory=SourceConfig)
    phase1: Phase1Config = field(default_factory=Phase1Config)
    phase2: Phase2Config = field(default_factory=Phase2Config)


@dataclass(kw_only=True)
class ContextOptions(PhaseOptions):
    """Train a ContextBlock without targets, then a TokenBlock on its contexts, beside an untrained control.

    An n-gram of the horizon that contexts have stands beside both. Leaves last/ (the best epoch's weights),
    metrics.jsonl, results.json, report.txt and phases.png. Ctrl-C saves; --resume goes on.

    Args:
        context_dim: numbers of a context.
        layers: layers of both blocks.
        input_tokens: embeddings that a token brings.
        plan: which contexts the TokenBlock reads.
    """

    context_dim: int = 256
    layers: int = 1
    input_tokens: int = 1
    out: str = "runs/context"
    plan: Literal["A", "D", "E", "F", "G"] = "E"


@dataclass(kw_only=True)
class ContextKVOptions(PhaseOptions):
    """Train ContextBlocks without targets, then attention over their contexts, beside an untrained control.

    An n-gram of the horizon that contexts have stands beside both. Leaves last/ (the best epoch's weights),
    metrics.jsonl, results.json, report.txt and phases.png. Ctrl-C saves; --resume goes on.

    Args:
        context_dims: numbers of the blocks' contexts.
        chunk_size: tokens of a chunk, or between slots.
        slot_kind: chunk or interval.
        max_contexts: most contexts that a token sees (null: all).
        heads: heads of the attention.
    """

    context_dims: list[int] = field(default_factory=lambda: [256])
    chunk_size: int = 100
    slot_kind: Literal["chunk", "interval"] = "chunk"
    max_contexts: int | None = None
    heads: int = 8
    out: str = "runs/context-kv"


def run_context(options: ContextOptions) -> int:
    """Train, and leave everything in the run's folder."""

    def make(vocabulary: int) -> Any:
        from newllm.models import ContextLMConfig, ContextLMForCausalLM

        config = ContextLMConfig(
            vocab_size=vocabulary, embed_dim=options.embed_dim, cell="context",
            context_dim=options.context_dim, num_hidden_layers=options.layers,
            input_tokens=options.input_tokens, plan=options.plan,
        )  # fmt: skip
        return ContextLMForCausalLM(config)

    return _train(options, make)


def run_context_kv(options: ContextKVOptions) -> int:
    """The same for Context-KV."""

    def make(vocabulary: int) -> Any:
        from newllm.models import ContextKVConfig, ContextKVForCausalLM

        config = ContextKVConfig(
            vocab_size=vocabulary, embed_dim=options.embed_dim, context_dims=options.context_dims,
            chunk_size=options.chunk_size, slot_kind=options.slot_kind, max_contexts=options.max_contexts,
            num_attention_heads=options.heads, intermediate_size=4 * options.embed_dim,
        )  # fmt: skip
        return ContextKVForCausalLM(config)

    return _train(options, make)


def _train(options: Any, make: Any) -> int:
    import signal

    import torch

    from newllm.backend import training_device
    from newllm.cli.loading import quiet
    from newllm.data.token_cache import cached_tokens
    from newllm.evaluation.context_checks import stream_checks
    from newllm.models.files import check_free, save_model
    from newllm.runs import Run
    from newllm.training.assemble import chosen_tokenizer, read_corpus
    from newllm.training.phase_checkpoints import PhaseCheckpoints, Stopped
    from newllm.training.two_phase import Stream, run_phases

    quiet()
    last = Path(options.out) / "last"
    check_free(last, options.overwrite or options.resume)
    corpus = read_corpus(options.data, options.source, offline=options.offline)
    print(corpus.said(), flush=True)
    tokenizer = chosen_tokenizer(options.tokenizer, corpus)
    train = Stream.of(cached_tokens(corpus.train, tokenizer), options.tokens)
    held = Stream.of(cached_tokens(corpus.validation, tokenizer), options.validation_tokens)
    torch.manual_seed(options.seed)
    model = make(len(tokenizer)).to(training_device())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(train.ids):,} training tokens, {len(held.ids):,} for validation; {parameters:,} parameters")
    config = {**asdict(options), "data_read": corpus.record()}
    run = Run(options.out, config, seed=options.seed, resume=options.resume)
    keep = PhaseCheckpoints(run.out / "checkpoints", seconds=options.save_seconds, resume=options.resume)
    for complaint in keep.complaints:
        print(f"newllm: {complaint}")
    run.rewind(keep.rounds)

    def log(row: dict[str, Any]) -> None:
        run.log(step=keep.rounds + 1, **row)
        print(", ".join(f"{name} {_short(value)}" for name, value in row.items()), flush=True)

    try:
        with keep.listening():
            found = run_phases(
                model, train.beside(model), held.beside(model), options.phase1, options.phase2,
                log=log, inspect=stream_checks, keep=keep,
            )  # fmt: skip
    except Stopped as stopped:
        number = signal.Signals(stopped.args[0])
        print(f"{number.name} after round {keep.rounds}; --resume goes on from {keep.checkpoints.folder}")
        return 128 + number
    found["ngram"] = _ngram(found, train, held, len(tokenizer))
    run.result("results.json", {"train_tokens": len(train.ids), "parameters": parameters, **found})
    save_model(model, tokenizer, last, overwrite=options.overwrite or options.resume)
    keep.checkpoints.clear()
    _report(run, found)
    print(f"the model is in {last}; everything else in {run.out}")
    return 0


def _ngram(found: dict[str, Any], train: Any, held: Any, vocabulary: int) -> dict[str, Any]:
    """An n-gram that sees as many tokens as the trained contexts remember."""
    from newllm.evaluation.ngram import NGram

    checks = found["trained"]["validation_check"]
    reach = max(check["horizon"] or _LONGEST for check in checks)
    order = 1 + min(reach, _LONGEST)
    model = NGram(train.ids, order, vocabulary)
    return {"order": order, "horizon": reach, "validation": model.evaluate(held.ids)}


def _report(run: Any, found: dict[str, Any]) -> None:
    from newllm.evaluation.context_plots import phases_figure
    from newllm.evaluation.context_report import phase_report

    report = phase_report(found)
    run.text("report.txt", report)
    run.plot("phases.png", phases_figure(run.rows()))
    print(report)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


COMMANDS = {
    "context": Command(ContextOptions, run_context),
    "context-kv": Command(ContextKVOptions, run_context_kv),
    "cvfpt": Command(CvfptOptions, run_cvfpt),
}
