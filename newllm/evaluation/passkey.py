"""Recall of a key hidden in real text, by length of the text and by depth of the key."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from newllm.data.passkey import PasskeyBatch, PasskeyTask, batch
from newllm.evaluation.forced import evaluating, last_logits
from newllm.evaluation.intervals import wilson95
from newllm.models.senri import SenriForCausalLM
from newllm.models.session import Session

if TYPE_CHECKING:
    from newllm.distributed.sequence_parallel import Mesh


class Cell(NamedTuple):
    """Share ``score`` of ``samples`` prompts of ``length`` tokens whose key, at ``depth``, came back whole.

    ``ci95`` is Wilson's interval.
    """

    length: int
    depth: float
    samples: int
    score: float
    ci95: tuple[float, float]


def passkey_recall(
    model: PreTrainedModel,
    task: PasskeyTask,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    reach: int,
    seed: int,
    batch_tokens: int = 32768,
    progress: bool = True,
    on_cell: Callable[[Cell], None] | None = None,
    mesh: Mesh | None = None,
) -> list[Cell]:
    """Exact-match recall in every cell of ``lengths`` (tokens) x ``depths`` (0 to 1).

    The answer is forced: it is right when each of its digits is the likeliest given those before it, which
    is when greedy decoding would give it. Short prompts are read side by side, ``batch_tokens`` tokens in
    all; longer ones in pieces of that size through the model's cache, so that a state of constant size
    bounds the memory taken. Prompts depend on (seed, length, depth) and the task alone: every model sees
    the same ones.

    Args:
        model: a causal model of transformers; used in evaluation mode, on its device.
        samples: prompts of a cell.
        reach: tokens before the question that the key keeps out of (layers * window: all that stacked
            windows can see).
        on_cell: called with each cell as soon as it is measured.
        mesh: ranks that share the reading of each prompt of a Senri model; they all call this and all get
            the same cells (see :func:`newllm.distributed.prefill.prefill`).

    Raises:
        ValueError: for a length too short for the task, a depth outside [0, 1], ``samples`` below 1, or
            ``batch_tokens`` below the answer's length.
    """
    _check(task, lengths, depths, samples, reach, batch_tokens)
    cells = []
    total = sum(length + task.key_length - 1 for length in lengths) * len(depths) * samples
    with evaluating(model), tqdm(total=total, unit="tok", unit_scale=True, disable=not progress) as bar:
        for length in lengths:
            for depth in depths:
                bar.set_description(f"recall of {length} tokens, depth {depth:g}")
                right = 0
                rows = max(1, batch_tokens // (length + task.key_length - 1))
                for prompts in _prompts(task, length, depth, samples, rows, reach, seed):
                    right += _count_right(model, prompts, batch_tokens // len(prompts.answers), bar, mesh)
                cells.append(Cell(length, depth, samples, right / samples, wilson95(right, samples)))
                if on_cell is not None:
                    on_cell(cells[-1])
    return cells


def state_bytes(model: SenriForCausalLM, length: int) -> int:
    """Bytes of all layers' states after reading ``length`` tokens."""
    session = Session(model)
    session.feed(torch.zeros(length, dtype=torch.int64))
    return session.state_bytes


def cell_generator(seed: int, length: int, depth: float) -> torch.Generator:
    """The generator that draws a cell's prompts."""
    digest = hashlib.sha256(f"{seed} {length} {float(depth)!r}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def _prompts(
    task: PasskeyTask, length: int, depth: float, samples: int, rows: int, reach: int, seed: int
) -> Iterator[PasskeyBatch]:
    """A cell's prompts, ``rows`` at a time, drawn one by one so that they do not depend on ``rows``."""
    generator = cell_generator(seed, length, depth)
    for start in range(0, samples, rows):
        drawn = [
            batch(task, length=length, samples=1, generator=generator, depth=depth, reach=reach)
            for _ in range(min(rows, samples - start))
        ]
        ids, answers, starts = (torch.cat(parts) for parts in list(zip(*drawn, strict=True))[:3])
        yield PasskeyBatch(ids, answers, starts, task.needle_length)


def _count_right(
    model: PreTrainedModel, prompts: PasskeyBatch, chunk: int, bar: tqdm, mesh: Mesh | None
) -> int:
    answers = prompts.answers.to(model.device)
    keep = answers.shape[1]
    logits = last_logits(model, prompts.input_ids, keep=keep, chunk=chunk, on_tokens=bar.update, mesh=mesh)
    return int((logits.argmax(-1) == answers).all(1).sum())


def _check(
    task: PasskeyTask,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    reach: int,
    batch_tokens: int,
) -> None:
    """All that could otherwise fail after hours."""
    for name, values in (("lengths", lengths), ("depths", depths)):
        if not values:
            raise ValueError(f"{name} must hold at least one number, got none")
    for length in lengths:
        task.last_start(length, reach)
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"depths must lie between 0 and 1, got {depth}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if batch_tokens < task.key_length:
        raise ValueError(f"batch_tokens must be at least {task.key_length}, got {batch_tokens}")
