"""Suites of recall measured cell by cell, length by depth, resumable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm
from transformers import PreTrainedModel

from newllm.data.recall.prompts import Prompts, Suite, scores
from newllm.evaluation.forced import evaluating, last_logits
from newllm.evaluation.intervals import mean95, wilson95
from newllm.evaluation.rows import IDENTITY, Row, RowFile

# Rows side by side are cut so that a pass still reads this many tokens of each.
_LEAST_CHUNK = 8192
# Samples of a cell up to a length: long ones cost more and vary less.
_SAMPLES = ((2**17, 100), (2**20, 40), (2**24, 8))
_FEWEST = 4


class Task(NamedTuple):
    """Which cells to measure, and how: ``samples`` of a length, ``batch_tokens`` of one pass.

    ``forget`` empties the memories just before the answer, as a control.
    """

    lengths: Sequence[int]
    depths: Sequence[float | None]
    samples: Callable[[int], int]
    seed: int = 0
    batch_tokens: int = 32768
    forget: bool = False


def usual_samples(length: int) -> int:
    """Samples of a cell of ``length`` tokens: 100 up to 131,072, 40 up to 1M, 8 up to 16M, 4 beyond."""
    return next((count for longest, count in _SAMPLES if length <= longest), _FEWEST)


def measure(
    model: PreTrainedModel,
    suite: Suite,
    task: Task,
    *,
    facts: Row,
    rows: RowFile,
    progress: bool = True,
    on_row: Callable[[Row], object] = lambda row: None,
) -> list[Row]:
    """The row of every cell of ``task``; those that ``rows`` has are taken from there, new ones appended.

    ``facts`` are the fields that all rows share, among them ``model``, ``weights`` and ``commit``; ``memory``
    is set to "zeroed" where the task forgets. A row's ``score`` is the mean share of an answer's parts that
    came back whole, ``ci95`` its 95 % interval: Wilson's where each answer is right or wrong.

    Raises:
        ValueError: for prompts that do not fit their length.
    """
    found = []
    shared = {**facts, "suite": suite.name, "seed": task.seed}
    if task.forget:
        shared["memory"] = "zeroed"
    with evaluating(model), tqdm(unit="tok", unit_scale=True, disable=not progress) as bar:
        for length in task.lengths:
            for depth in task.depths:
                cell = {**shared, "length": length, "depth": depth, "samples": task.samples(length)}
                row = rows.find({key: cell.get(key) for key in IDENTITY})
                if row is None:
                    bar.set_description(f"{suite.name} of {length} tokens, depth {depth}")
                    row = {**cell, **_cell(model, suite, task, length, depth, bar)}
                    rows.append(row)
                on_row(row)
                found.append(row)
    return found


def side_by_side(length: int, samples: int, batch_tokens: int) -> int:
    """How many prompts of ``length`` are read at once: ``batch_tokens`` in pieces of a few thousand each."""
    return max(1, min(samples, batch_tokens // min(length, _LEAST_CHUNK)))


def _cell(
    model: PreTrainedModel, suite: Suite, task: Task, length: int, depth: float | None, bar: tqdm
) -> dict[str, Any]:
    samples = task.samples(length)
    together = side_by_side(length, samples, task.batch_tokens)
    values: list[float] = []
    for start in range(0, samples, together):
        numbers = range(start, min(start + together, samples))
        prompts = suite.prompts(length, depth, numbers, task.seed)
        values += answer_scores(model, prompts, task.batch_tokens // len(numbers), task.forget, bar.update)
    return {"score": sum(values) / samples, "ci95": interval(values)}


def answer_scores(
    model: PreTrainedModel,
    prompts: Prompts,
    chunk: int,
    forget: bool = False,
    on_tokens: Callable[[int], object] = lambda tokens: None,
) -> list[float]:
    """The score of each prompt, ``chunk`` tokens of a row at a time."""
    answers = prompts.answers.to(model.device)
    logits = last_logits(
        model, prompts.input_ids, keep=answers.shape[1], chunk=chunk, forget=forget, on_tokens=on_tokens
    )
    right = logits.argmax(-1) == answers
    return [float(score) for score in scores(right, prompts.parts.to(model.device)).double().cpu()]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of ``values``, shares of answers: Wilson's where all are 0 or 1."""
    if set(values) <= {0.0, 1.0}:
        return wilson95(round(sum(values)), len(values))
    low, high = mean95(sum(values), sum(value**2 for value in values), len(values))
    return max(0.0, low), min(1.0, high)
