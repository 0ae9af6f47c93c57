"""Suites of recall measured cell by cell, length by depth, resumable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple
from zlib import crc32

from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from newllm.data.recall.prompts import Prompts, Suite, part_ids, scores, share_written
from newllm.evaluation.forced import evaluating, greedy_tokens, last_logits
from newllm.evaluation.intervals import mean95, wilson95
from newllm.evaluation.rows import IDENTITY, Row, RowFile

# Rows side by side are cut so that a pass still reads this many tokens of each.
_LEAST_CHUNK = 8192
# Samples of a cell up to a length: long ones cost more and vary less.
_SAMPLES = ((2**17, 100), (2**20, 40), (2**24, 8))
_FEWEST = 4


# Scores of prompts, of which so many tokens of a row may be read at once.
Answerer = Callable[[Prompts, int], list[float]]


class Task(NamedTuple):
    """Which cells to measure: ``samples`` of a length, about ``batch_tokens`` of one pass."""

    lengths: Sequence[int]
    depths: Sequence[float | None]
    samples: Callable[[int], int]
    seed: int = 0
    batch_tokens: int = 32768


def usual_samples(length: int) -> int:
    """Samples of a cell of ``length`` tokens: 100 up to 131,072, 40 up to 1M, 8 up to 16M, 4 beyond."""
    return next((count for longest, count in _SAMPLES if length <= longest), _FEWEST)


def measure(
    answerer: Answerer,
    suite: Suite,
    task: Task,
    *,
    facts: Row,
    rows: RowFile,
    progress: bool = True,
    on_row: Callable[[Row], object] = lambda row: None,
) -> list[Row]:
    """The row of every cell of ``task``, answered by ``answerer``.

    Cells that ``rows`` has are taken from there, new ones appended. ``facts`` are the fields that all rows
    share, among them those of ``IDENTITY`` that are not the cell's own. A row's ``score`` is the mean share
    of an answer's parts that came back whole, ``ci95`` its 95 % interval: Wilson's where each answer is right
    or wrong.

    Raises:
        ValueError: for prompts that do not fit their length, no samples, and depths outside 0 to 1.
    """
    _check(task)
    found = []
    shared = {**facts, "suite": suite.name, "seed": task.seed}
    with tqdm(unit="tok", unit_scale=True, disable=not progress) as bar:
        for length in task.lengths:
            for depth in task.depths if suite.placed else (None,):
                cell = {**shared, "length": length, "depth": depth, "samples": task.samples(length)}
                row = rows.find({key: cell.get(key) for key in IDENTITY})
                if row is None:
                    bar.set_description(f"{suite.name} of {length} tokens, depth {depth}")
                    row = {**cell, **_cell(answerer, suite, task, length, depth, bar)}
                    rows.append(row)
                on_row(row)
                found.append(row)
    return found


def _check(task: Task) -> None:
    for depth in task.depths:
        if depth is not None and not 0 <= depth <= 1:
            raise ValueError(f"depths must lie between 0 and 1, got {depth}")
    for name, count in (
        ("samples", min(map(task.samples, task.lengths))),
        ("batch_tokens", task.batch_tokens),
    ):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def side_by_side(length: int, samples: int, batch_tokens: int) -> int:
    """How many prompts of ``length`` are read at once: ``batch_tokens`` in pieces of a few thousand each."""
    return max(1, min(samples, batch_tokens // min(length, _LEAST_CHUNK)))


def _cell(
    answerer: Answerer, suite: Suite, task: Task, length: int, depth: float | None, bar: tqdm
) -> dict[str, Any]:
    samples = task.samples(length)
    together = side_by_side(length, samples, task.batch_tokens)
    values: list[float] = []
    for start in range(0, samples, together):
        numbers = range(start, min(start + together, samples))
        prompts = suite.prompts(length, depth, numbers, task.seed)
        values += answerer(prompts, task.batch_tokens // len(numbers))
        bar.update(prompts.input_ids.numel())
    return {"score": sum(values) / samples, "ci95": interval(values)}


def model_answers(
    model: PreTrainedModel, *, before_answer: Callable[[Cache], object] | None = None
) -> Answerer:
    """Answers forced on ``model`` or written by it, ``chunk`` tokens of a row at once through its state.

    ``before_answer`` may change the stream's cache just before the answers are asked for, as controls do.
    """

    def answer(prompts: Prompts, chunk: int) -> list[float]:
        if prompts.written:
            ids = prompts.input_ids[:, : prompts.length]
            with evaluating(model):
                tokens = greedy_tokens(
                    model, ids, tokens=prompts.written, chunk=chunk, before_answer=before_answer
                )
            return [share_written(row, part_ids(prompts, n)) for n, row in enumerate(tokens.tolist())]
        answers = prompts.answers.to(model.device)
        with evaluating(model):
            logits = last_logits(
                model, prompts.input_ids, keep=answers.shape[1], chunk=chunk, before_answer=before_answer
            )
        right = logits.argmax(-1) == answers
        return [float(score) for score in scores(right, prompts.parts.to(model.device)).double().cpu()]

    return answer


def reader_answers(suite: Suite, *, sees: int | None) -> Answerer:
    """Answers of one who reads the last ``sees`` tokens of a prompt, never less than its question.

    None reads all: the oracle. 0 is blind. W is a window, and full attention over W tokens. What is not seen
    is guessed, by chance that the whole prompt decides.
    """

    def answer(prompts: Prompts, chunk: int) -> list[float]:
        found = []
        for row, question in enumerate(prompts.question.tolist()):
            ids = prompts.input_ids[row, : prompts.length]
            random = Random(crc32(ids.numpy().tobytes()))
            seen = suite.solve(ids if sees is None else ids[-max(sees, question) :], random)
            wanted = part_ids(prompts, row)
            in_order = sum(map(tuple.__eq__, seen, wanted))
            right = len(set(seen) & set(wanted)) if prompts.written else in_order
            found.append(right / len(wanted))
        return found

    return answer


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of ``values``, shares of answers: Wilson's where all are 0 or 1."""
    if set(values) <= {0.0, 1.0}:
        return wilson95(round(sum(values)), len(values))
    low, high = mean95(sum(values), sum(value**2 for value in values), len(values))
    return max(0.0, low), min(1.0, high)
