"""Training batches, made on the fly and the same on every run: each step has a seed of its own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from newllm.data.packing import random_blocks
from newllm.data.passkey import PasskeyTask, training_batch
from newllm.training.config import TaskConfig
from newllm.training.dilution import diluted


class NeedleBatches:
    """``steps`` batches of text in which keys are hidden and asked for, along a curriculum of lengths.

    Each is a dict of ``input_ids [B, T]``, ``loss_weight [B, T]`` (what predicting a token counts; the
    answers of a batch sum to 1, its text to ``text_weight``) and, with dilution,
    ``segment_weight [B, ceil(T / segment)]``.

    Raises:
        ValueError: for a text shorter than a sample, or a sample too short for a key.
    """

    def __init__(self, task: PasskeyTask, config: TaskConfig, *, segment: int, steps: int, seed: int) -> None:
        longest = max(config.lengths)
        if len(task.filler) < longest:
            raise ValueError(f"text must hold at least {longest} tokens, one sample, got {len(task.filler)}")
        task.last_start(min(config.lengths) - config.key_length)
        self.task, self.config, self.segment = task, config, segment
        self.steps, self.seed = steps, seed

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for step in range(self.steps):
            yield self.batch(step)

    def batch(self, step: int) -> dict[str, Tensor]:
        """The batch of ``step``, whatever was asked for before."""
        config = self.config
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        progress = step / self.steps
        length = config.lengths[int(progress * len(config.lengths))]
        rows = min(config.tokens_per_step // length, config.max_rows)
        needles = round(config.needle_share * rows)
        ids, weight, kept = self._needles(length, needles, generator)
        text = random_blocks(self.task.filler, length, rows - needles, generator)
        ids = torch.cat([ids, text])
        weight = torch.cat([weight, torch.zeros(text.shape)])
        kept = torch.cat([kept, torch.ones(len(text), kept.shape[1], dtype=torch.bool)])
        plain = (weight == 0).float()
        weight = weight / max(1.0, float(weight.sum())) + plain * (config.text_weight / float(plain.sum()))
        made = {"input_ids": ids, "loss_weight": weight}
        return made | diluted(kept, config.dilution, progress, generator)

    def _behind(self, length: int, generator: torch.Generator) -> int:
        """How much text follows the answers of a batch, so that questions stand anywhere in a segment."""
        if not self.config.shift:
            return 0
        spare = length - len(self.task.question) - self.task.needle_length - self.task.key_length
        return int(torch.randint(min(self.segment, spare + 1), (1,), generator=generator))

    def _needles(self, length: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Samples with a key: ids and answer marks ``[B, T]``, and the segments that hold the key."""
        answer = self.task.key_length
        behind = self._behind(length, generator)
        end = length - behind
        last = self.task.last_start(end - answer)
        made = training_batch(
            self.task,
            length=end - answer,
            samples=rows,
            segment=self.segment,
            generator=generator,
            edge=self.config.edge,
            # A sample of about one segment has no border to cross.
            near=self.config.near,
            straddle=self.config.straddle if last + self.task.needle_length > self.segment else 0.0,
        )
        parts = [made.input_ids, made.answers[:, -1:]]
        if behind:
            parts.append(random_blocks(self.task.filler, behind, rows, generator))
        made = made._replace(input_ids=torch.cat(parts, 1))
        weight = torch.zeros(made.input_ids.shape)
        weight[:, end - answer : end] = 1.0
        return made.input_ids, weight, made.needle_segments(self.segment)
