"""Small models, streams and runs for the tests of training."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from newllm.data.passkey import byte_passkey
from newllm.data.streams import Needles, OrderedStreams, PackedBlocks
from newllm.data.token_cache import Tokens
from newllm.runs import Run
from newllm.training.config import ModelConfig, TrainConfig
from newllm.training.scratch import scratch_model
from newllm.training.trainer import LanguageTrainer

SMALL = ModelConfig(hidden_size=16, intermediate_size=32, heads=2, window=8, memory_layers=[1])
SENTENCE = "the quick brown fox jumps over the lazy dog. "
NEEDLES = Needles(byte_passkey(SENTENCE * 40, key_length=2), 0.3, segment=8, blocks=2)


def text_tokens(documents: int = 6) -> Tokens:
    """Documents of different lengths that say one sentence again and again, each from another letter on."""
    rows = [(SENTENCE[number:] + SENTENCE * (number + 2)).encode() for number in range(documents)]
    ids = np.frombuffer(b"".join(rows), dtype=np.uint8).astype(np.uint16)
    return Tokens(ids, np.cumsum([0, *map(len, rows)]))


def stream(kind: str, sets: int = 1, needles: Needles | None = NEEDLES, **options: Any) -> Any:
    """Two rows of 16 tokens."""
    options = {"rows": 2, "length": 16, "seed": 5, "needles": needles, **options}
    if kind == "ordered":
        return OrderedStreams(text_tokens(), sets=sets, **options)
    return PackedBlocks(text_tokens(), **options)


def trainer(
    out: Path,
    config: TrainConfig,
    *callbacks: TrainerCallback,
    kind: str = "packed",
    model: Any = None,
    resume: bool = False,
    judged: bool = False,
    batches: int = 4,
    needles: Needles | None = NEEDLES,
) -> LanguageTrainer:
    """A trainer of a small new Senri (or of ``model``) that has not begun."""
    made = model if model is not None else scratch_model(SMALL, seed=config.seed)[0]
    sets = config.accumulation
    validation = (stream(kind, sets, None, shuffle=False), batches) if judged else None
    result = LanguageTrainer(
        made, stream(kind, sets, needles), config, Run(out, {}, seed=config.seed, resume=resume),
        validation=validation, carry=kind == "ordered", progress=False,
    )  # fmt: skip
    for callback in callbacks:
        result.add_callback(callback)
    return result


def weights(made: Any) -> dict[str, torch.Tensor]:
    """All weights of a trainer's model, copied."""
    return {name: tensor.clone() for name, tensor in made.model.state_dict().items()}


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    assert [name for name, tensor in one.items() if not torch.equal(tensor, other[name])] == []


def names(folder: Path) -> set[str]:
    """What lies in a folder."""
    return {path.name for path in folder.iterdir()}


def rows(out: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` without what depends on the clock."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    timed = ("tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


class Press(TrainerCallback):
    """Sends this process ``number`` during step ``step``."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.step:
            signal.raise_signal(self.number)
