"""``newllm train senri``, ``recall`` and ``hf``: from any text to a trained model, with nothing lost."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from newllm.cli import Command
from newllm.cli.train_context import COMMANDS as CONTEXT
from newllm.cli.train_symbols import COMMANDS as SYMBOLS
from newllm.data.sources import Offline
from newllm.training.config import (
    ConvertConfig,
    ModelConfig,
    SourceConfig,
    StreamConfig,
    TaskConfig,
    TrainConfig,
)


@dataclass(kw_only=True)
class CommonOptions:
    """What every family's training is asked.

    Args:
        data: what to train on: a name (see newllm data sources), a file or a folder, or several joined by +.
        offline: auto lets a stand-in take the place of a dataset out of reach, and says so; error does not.
        tokenizer: of a new model: bytes, bpe:SIZE, words:SIZE, a folder or a hub id (null: the base's, or
            bytes). One with a size learns from the data, and with stream.kind needles from what is hidden.
        profile: the machine's, which sets what is null (auto: by the accelerator's memory).
        out: folder of the run.
        resume: go on from the newest intact checkpoint in the folder, from the start where there is none.
        overwrite: begin anew in the folder of an unfinished run.
        launch: processes to train in, one per GPU.
        source: which documents are read.
        stream: what batches are made of.
        task: the curriculum of stream.kind needles.
        train: how it is trained.
    """

    data: str = "embedded"
    offline: Offline = "auto"
    tokenizer: str | None = None
    profile: str = "auto"
    out: str = "runs/train"
    resume: bool = False
    overwrite: bool = False
    launch: int = 1
    source: SourceConfig = field(default_factory=SourceConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(kw_only=True)
class SenriOptions(CommonOptions):
    """Train a Senri model: from scratch, on from a Senri folder, or a Llama-family checkpoint converted.

    Leaves best/ (by the validation text, with --train.eval-steps), last/, metrics.jsonl, training_curves.png
    and summary.md. Ctrl-C and SIGTERM save a checkpoint; --resume goes on from the newest.

    Args:
        base: folder, hub id, GGUF file or fetched model to train on (null: a new model).
        model: the model, when new.
        convert: the window and memory of a base that has none.
    """

    base: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)


@dataclass(kw_only=True)
class RecallOptions(SenriOptions):
    """Train a small Senri from scratch to find keys at any depth of streams far longer than it is trained on.

    The same as newllm train senri with its needles: --preset million and quick are made for it.

    Args:
        stream: what batches are made of.
    """

    out: str = "runs/recall"
    stream: StreamConfig = field(default_factory=lambda: StreamConfig(kind="needles"))


@dataclass
class HfOptions(CommonOptions):
    """Train any causal model of transformers as it is, beside Senri: the same data, logs and checkpoints.

    Args:
        base: folder or hub id of the model.
    """

    base: str


class Parts(NamedTuple):
    """A model, its tokenizer, and the segment of its memory (None: it has none)."""

    model: Any
    tokenizer: Any
    segment: int | None


def run_senri(options: SenriOptions) -> int:
    """Train, and leave everything in the run's folder."""

    def parts(corpus: Any) -> Parts:
        from newllm.cli.loading import source_path
        from newllm.modules import InfiniAttention
        from newllm.training.assemble import chosen_tokenizer, senri_base
        from newllm.training.scratch import scratch_model

        seed = options.train.seed
        if options.base is None:
            suites = options.task.suites if options.stream.kind == "needles" else []
            tokenizer = chosen_tokenizer(options.tokenizer, corpus, suites)
            model, tokenizer = scratch_model(options.model, seed=seed, tokenizer=tokenizer)
        else:
            model, tokenizer = senri_base(source_path(options.base), options.convert, seed=seed)
        for module in model.modules():
            if isinstance(module, InfiniAttention):
                module.bptt_segments = options.stream.bptt_segments
        return Parts(model, tokenizer, model.config.segment)

    return _train(options, ["train", "senri"], parts)


def run_hf(options: HfOptions) -> int:
    """The same for another model."""

    def parts(corpus: Any) -> Parts:
        from newllm.training.assemble import plain_base

        return Parts(*plain_base(options.base), None)

    return _train(options, ["train", "hf", options.base], parts)


def _train(options: Any, words: list[str], make_parts: Any) -> int:
    from newllm.backend import process
    from newllm.cli.loading import quiet
    from newllm.training.launch import launch

    rank, processes = process()
    if options.launch < 1:
        raise ValueError(f"launch must be at least 1, got {options.launch}")
    out = Path(options.out)
    if options.resume and (out / "last").is_dir():
        print(f"the run in {out} is finished: its model is in {out / 'last'}")
        return 0
    if rank == 0:
        _check_unfinished(out, options)
    if options.launch > 1 and processes == 1:
        by_place = {"base"} if words[1] == "hf" else set()
        handed = {key: value for key, value in asdict(options).items() if key not in by_place}
        launch(words, {**handed, "launch": 1}, out, options.launch)
    quiet()
    return _fit(options, make_parts, rank, processes)


def _check_unfinished(out: Path, options: Any) -> None:
    """Refuse to lose a run that was cut off."""
    from newllm.training.checkpoints import Checkpoints

    steps = Checkpoints(out / "checkpoints").steps()
    if steps and not (out / "last").is_dir() and not (options.resume or options.overwrite):
        raise FileExistsError(
            f"out {out} holds an unfinished run at step {steps[-1]}: --resume goes on from it, "
            "--overwrite begins anew"
        )


def _fit(options: Any, make_parts: Any, rank: int, processes: int) -> int:
    from newllm.backend import accelerator_memory, training_device
    from newllm.runs import provenance
    from newllm.training.assemble import make_streams, read_corpus
    from newllm.training.profiles import find_profile, rate_for_size, rows_for_length
    from newllm.training.trainer import LanguageTrainer

    def say(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    corpus = read_corpus(options.data, options.source, offline=options.offline)
    say(corpus.said())
    model, tokenizer, segment = make_parts(corpus)
    model.to(training_device())
    profile_name, profile = find_profile(options.profile, accelerator_memory())
    rows = options.stream.rows or rows_for_length(profile, options.stream.length)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lr = options.train.lr
    config = replace(options.train, lr=rate_for_size(profile.lr, parameters) if lr is None else lr)
    streams = make_streams(
        corpus, tokenizer, options.stream, options.task, config, rows=rows, segment=segment,
        processes=max(1, processes // config.sequence_ranks), progress=rank == 0,
    )  # fmt: skip
    data = {**corpus.record(), **streams.facts}
    shape = {"type": model.config.model_type, "parameters": parameters}
    if (base := getattr(model.config, "base_model", None)) is not None:
        shape["base"] = base
    say(", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in streams.facts.items()))
    say(f"model: {shape['type']}, {parameters:,} parameters")
    say(f"profile {profile_name}: {rows} rows of {options.stream.length} tokens, lr {config.lr:g}")
    record = _record(options, {"data_read": data, "model_made": shape, "profile_used": profile_name}, rank)
    made = provenance(config.seed)
    say(f"commit {made['commit']}, torch {made['torch']}, {made['devices']}; the run is in {record.out}")
    trainer = LanguageTrainer(
        model, streams.train, config, record, validation=streams.validation, tokenizer=tokenizer,
        carry=streams.carry,
    )  # fmt: skip
    for complaint in trainer.fit(resume=options.resume):
        say(f"newllm: {complaint}")
    if trainer.interrupted:
        number = signal.Signals(trainer.interrupted)
        step, folder = trainer.state.global_step, trainer.checkpoints.folder
        say(f"{number.name} after step {step}; --resume goes on from {folder}")
        return 128 + number
    if rank == 0:
        _finish(record, trainer, shape, data)
    return 0


def _record(options: Any, facts: dict[str, Any], rank: int) -> Any:
    """The run's folder; a run that is not resumed loses what lay there."""
    import shutil

    from newllm.files import read_yaml, reading
    from newllm.runs import Run

    out = Path(options.out)
    before = out / "config.yaml"
    if options.resume and before.is_file():
        with reading("the record", before):
            recorded = read_yaml(before, "the record") or {}
            old = recorded.get("data_read", {})
            known = {part: old[part]["sha256"] for part in ("train", "validation") if part in old}
            change = next(_changes(recorded, _kept(options)), None)
        for part, digest in known.items():
            if digest != facts["data_read"][part]["sha256"]:
                raise ValueError(f"resume needs the same {part} text as before, which was of {old['read']}")
        if change is not None:
            name, was, came = change
            raise ValueError(f"resume needs the same {name} as before, which was {was!r}, got {came!r}")
    elif rank == 0 and not options.resume:
        for name in ("checkpoints", "best", "last"):
            shutil.rmtree(out / name, ignore_errors=True)
    return Run(
        out, {**asdict(options), **facts}, seed=options.train.seed, resume=options.resume, writes=rank == 0
    )


def _kept(options: Any) -> dict[str, Any]:
    """What a run that goes on may not change: model and batches; how it learns from here on is free."""
    kept = ("base", "tokenizer", "model", "convert", "stream", "task")
    return {name: value for name, value in asdict(options).items() if name in kept}


def _changes(before: Any, now: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted names of options that were something else ``before``, what they were and are."""
    for name, value in now.items():
        if name not in before:
            continue
        if isinstance(value, dict):
            yield from _changes(before[name], value, f"{prefix}{name}.")
        elif value != before[name]:
            yield f"{prefix}{name}", before[name], value


def _finish(record: Any, trainer: Any, shape: dict[str, Any], data: dict[str, Any]) -> None:
    """Curves, summary, and where to find them."""
    from newllm.runs import provenance
    from newllm.training.outputs import CURVES, SUMMARY, curves, summary

    rows = record.rows()
    facts = {"steps": trainer.state.global_step, **provenance(trainer.config.seed)}
    record.plot(CURVES, curves(rows))
    flat = {name: value for name, value in data.items() if not isinstance(value, dict)}
    record.text(SUMMARY, summary(rows, model=shape, data=flat, facts=facts))
    best = record.out / "best"
    kept = f"{best} (best) and {record.out / 'last'}" if best.is_dir() else record.out / "last"
    print(f"the model is in {kept}; {record.metrics}, {record.out / CURVES}, {record.out / SUMMARY}")


COMMANDS = {
    "senri": Command(SenriOptions, run_senri),
    "recall": Command(RecallOptions, run_senri),
    "hf": Command(HfOptions, run_hf),
    **CONTEXT,
    **SYMBOLS,
}
