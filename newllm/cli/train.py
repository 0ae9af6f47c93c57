"""``newllm train``: a Senri from scratch, or a converted one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from newllm.training.config import ModelConfig, TaskConfig, TrainConfig


@dataclass
class Options:
    """Train a Senri model on text in which keys are hidden and asked for.

    Ctrl-C saves a checkpoint; --resume goes on from it. The preset ``demo`` is what ``newllm demo`` trains.

    Args:
        base: Senri folder to train on (null: a byte-level model from scratch).
        text: text to train on: a name, a file or a folder (see newllm data list).
        out: folder of the run; the model is left in its model/.
        resume: go on from the last checkpoint in the folder.
        model: the model, when made from scratch.
        task: what it is trained on.
        train: how it is trained.
    """

    base: str | None = None
    text: str = "embedded"
    out: str = "runs/train"
    resume: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def run(options: Options) -> int:
    """Train, and leave model, metrics and configuration in the run's folder."""
    from newllm.backend import devices
    from newllm.data.text import load_text
    from newllm.models.files import save_model
    from newllm.runs import Run
    from newllm.training.batches import NeedleBatches
    from newllm.training.trainer import SenriTrainer

    checkpoints = Path(options.out) / "checkpoints"
    if options.resume and not any(checkpoints.glob("checkpoint-*")):
        raise FileNotFoundError(f"resume needs a checkpoint in {checkpoints}, and there is none")
    text = load_text(options.text)
    model, tokenizer, task = _parts(options, text.text)
    model.to(devices()[-1])
    batches = NeedleBatches(
        task,
        options.task,
        segment=model.config.segment,
        steps=options.train.steps * options.train.accumulation,
        seed=options.train.seed,
    )
    source = {"name": text.name, "characters": len(text.text), "sha256": text.sha256}
    record = Run(
        options.out, {**asdict(options), "text": source}, seed=options.train.seed, resume=options.resume
    )
    trainer = SenriTrainer(model, batches, options.train, record)
    trainer.train(resume_from_checkpoint=options.resume)
    if trainer.interrupted:
        print(f"interrupted after step {trainer.state.global_step}; --resume goes on from {checkpoints}")
        return 130
    save_model(model, tokenizer, record.out / "model", overwrite=True)
    print(f"the model is in {record.out / 'model'}, its metrics in {record.metrics}")
    return 0


def _parts(options: Options, text: str) -> tuple[Any, Any, Any]:
    """Model, tokenizer and passkey task."""
    from newllm.data.passkey import byte_passkey, text_passkey
    from newllm.data.tokenizer import is_byte_tokenizer
    from newllm.models.files import load_model, load_tokenizer
    from newllm.training.scratch import scratch_model

    if options.base is None:
        model, tokenizer = scratch_model(options.model, seed=options.train.seed)
    else:
        model, tokenizer = load_model(options.base, dtype="float32"), load_tokenizer(options.base)
    digits = options.task.key_length
    task = (
        byte_passkey(text, digits) if is_byte_tokenizer(tokenizer) else text_passkey(tokenizer, text, digits)
    )
    return model, tokenizer, task
