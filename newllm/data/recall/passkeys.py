"""Passkeys as suites: anywhere, and on purpose across the borders of segments."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

from newllm.data.passkey import PasskeyTask, batch
from newllm.data.recall.prompts import Prompts, Suite, cell_seed


def passkey_suite(task: PasskeyTask, segment: int | None = None) -> Suite:
    """The passkey ``task`` at exact depths; with ``segment``, across the segment border nearest to the depth.

    Across borders, prompt i has 1 + i mod (needle - 1) tokens of its needle before the border, so that every
    way to cut the needle comes in turn.
    """
    name = "passkey" if segment is None else "passkey_border"

    def prompts(length: int, depth: float | None, samples: Sequence[int], seed: int) -> Prompts:
        made = []
        for number in samples:
            generator = torch.Generator().manual_seed(cell_seed(name, seed, length, depth, number))
            place = _place(task, length, depth, number, segment, generator)
            made.append(
                batch(task, length=length, samples=1, generator=generator, depth=torch.tensor([place]))
            )
        ids, answers = (torch.cat(rows) for rows in list(zip(*made, strict=True))[:2])
        question = torch.full((len(ids),), len(task.question))
        return Prompts(ids, answers, torch.zeros_like(answers), question)

    return Suite(name, prompts, lambda ids, random: [_read(task, ids, random)])


def _place(
    task: PasskeyTask,
    length: int,
    depth: float | None,
    number: int,
    segment: int | None,
    generator: torch.Generator,
) -> int:
    last = task.last_start(length)
    place = int(torch.randint(last + 1, (1,), generator=generator)) if depth is None else round(depth * last)
    if segment is None:
        return place
    before = 1 + number % (task.needle_length - 1)
    border = min(max(1, round(place / segment)), (last + before) // segment) * segment
    if border == 0:
        raise ValueError(f"length {length} has no border of segments of {segment} tokens for a key to cross")
    return border - before


def _read(task: PasskeyTask, ids: Tensor, random: Random) -> tuple[int, ...]:
    """The digits behind the needle's prefix, guesses where it does not stand before the question."""
    text = ids[: len(ids) - len(task.question)] if len(ids) > len(task.question) else ids[:0]
    prefix = torch.tensor(task.prefix)
    if len(text) >= task.needle_length:
        found = (text.unfold(0, len(prefix), 1) == prefix).all(1).nonzero()
        for start in (found[:, 0] + len(prefix)).tolist():
            digits = text[start : start + task.key_length].tolist()
            if len(digits) == task.key_length and set(digits) <= set(task.symbols):
                return tuple(digits)
    return tuple(random.choice(task.symbols) for _ in range(task.key_length))
