"""Training batches of suites in words: what is hidden in text is asked for at its end."""

from __future__ import annotations

from random import Random

import torch
from torch import Tensor

from newllm.data.recall.drafts import Encoded, Language, encoded, written
from newllm.data.recall.prompts import GIVEN, Written, cell_seed
from newllm.data.recall.suites import drafting
from newllm.training.config import TaskConfig
from newllm.training.dilution import diluted

# Prompts of a suite that are planned before the first batch.
_PLANNED = 100


class SuiteBatches:
    """Batches of the ``suites`` of ``config`` along its curriculum of lengths, each a function of its number.

    Dicts of ``input_ids``, ``loss_weight`` and ``segment_weight`` like those of ``NeedleBatches``: answers
    count 1 in all, the text before them ``text_weight``. ``needle_share``, ``edge``, ``near`` and ``shift``
    are what they are there: shares of samples that ask, and of those whose first needle stands at the start
    or in the last tenth of the text, and questions that stand anywhere in a segment. ``straddle`` is left to
    chance: needles are long. A prompt that does not fit its length is drawn again, so that short lengths ask
    what is short.

    Raises:
        ValueError: for a suite that is not written in words, a shortest length that is too short for all
            prompts, or a longest length that is too short for one.
    """

    def __init__(self, words: Language, config: TaskConfig, *, segment: int, steps: int, seed: int) -> None:
        self.words, self.config, self.segment, self.steps, self.seed = words, config, segment, steps, seed
        self.drafts = [drafting(name)[0] for name in config.suites]
        random = Random(0)
        drafts = [draft(None, random) for draft in self.drafts for _ in range(_PLANNED)]
        planned = [_least(encoded(words, draft)) for draft in drafts]
        for length, least in (min(config.lengths), min(planned)), (max(config.lengths), max(planned)):
            if length < least:
                raise ValueError(f"length {length} is too short for its prompt, which needs {least} tokens")

    def batch(self, step: int) -> dict[str, Tensor]:
        """The batch of ``step``."""
        config, progress = self.config, step / self.steps
        length = config.lengths[min(int(progress * len(config.lengths)), len(config.lengths) - 1)]
        rows = min(config.tokens_per_step // length, config.max_rows)
        asked = round(config.needle_share * rows)
        made = [self._row(length, step, row, asks=row < asked) for row in range(rows)]
        ids, weight, kept = (torch.stack(parts) for parts in zip(*made, strict=True))
        plain = (weight == 0).float()
        weight = weight / max(1.0, float(weight.sum())) + plain * (config.text_weight / float(plain.sum()))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        batch = {"input_ids": ids, "loss_weight": weight}
        return batch | diluted(kept, config.dilution, progress, generator)

    def _plan(self, length: int, random: Random) -> Encoded:
        """A draft that fits ``length`` tokens, with as many questions as do."""
        while True:
            draft = random.choice(self.drafts)(self._depth(random), random)
            for questions in range(min(self.config.questions, 1 + len(draft.more)), 0, -1):
                plan = encoded(self.words, draft, questions)
                if _least(plan) <= length:
                    return plan

    def _row(self, length: int, step: int, row: int, *, asks: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Ids and weights ``[length]``, and which segments hold a needle ``[ceil(length / segment)]``.

        A row of text alone, which does not ``ask``, keeps all its segments.
        """
        random = Random(cell_seed("train", self.seed, step, row))
        if not asks:
            kept = torch.ones(-(-length // self.segment), dtype=torch.bool)
            return self._filler(length, random), torch.zeros(length), kept
        plan = self._plan(length, random)
        spare = length - _least(plan)
        behind = random.randrange(min(self.segment, spare + 1)) if self.config.shift else 0
        made = written(self.words, plan, length - plan.answer_tokens - behind, random)
        return self._filled(made, length, random)

    def _filler(self, count: int, random: Random) -> Tensor:
        """``count`` tokens of the text from a random place on, in a circle."""
        filler = self.words.filler
        return filler[(random.randrange(len(filler)) + torch.arange(count)) % len(filler)]

    def _depth(self, random: Random) -> float | None:
        lot = random.random()
        if lot < self.config.edge:
            return 0.0
        return 1 - random.random() / 10 if lot < self.config.edge + self.config.near else None

    def _filled(self, made: Written, length: int, random: Random) -> tuple[Tensor, Tensor, Tensor]:
        """The prompt, its answer, and filler behind it."""
        pieces = [*zip(made.pieces, made.parts, strict=True)]
        answer = torch.tensor([token for piece, _ in pieces for token in piece])
        end = len(made.prompt) + len(answer)
        ids = torch.cat([made.prompt, answer, self._filler(length - end, random)])
        weight = torch.zeros(length)
        # Not what is given between the answer's parts: a comma, or a further question.
        asked = [part != GIVEN for piece, part in pieces for _ in piece]
        weight[len(made.prompt) : end] = torch.tensor(asked, dtype=weight.dtype)
        first = torch.arange(0, length, self.segment)
        kept = torch.zeros(len(first), dtype=torch.bool)
        for start, stop in made.spans:
            kept |= (first < stop) & (first + self.segment > start)
        return ids, weight, kept


def _least(plan: Encoded) -> int:
    """Tokens of a sample without any filler."""
    return plan.prompt_tokens + plan.answer_tokens
