"""Prompts of one length with answers that are known to the token, and how answers are scored.

Sizes: B prompts of T tokens, A tokens of the longest answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

GIVEN = -1
"""The part of answer tokens that are not scored: punctuation between parts, and padding."""


class Prompts(NamedTuple):
    """``input_ids [B, T + A - 1]``, ``answers [B, A]`` and ``parts [B, A]``, all int64.

    The inputs are the prompts and their answers but the last token, so that the last A logits predict
    ``answers``: the answer is forced, and right where each token is the likeliest given those before it.
    ``parts`` says which part of the answer a token belongs to, ``GIVEN`` for none; ``question [B]`` how many
    tokens at the end of a prompt ask. With ``written`` above 0 the answer is not forced: so many tokens are
    written freely, and a part is right where its tokens come among them, in any order of parts.
    """

    input_ids: Tensor
    answers: Tensor
    parts: Tensor
    question: Tensor
    written: int = 0

    @property
    def length(self) -> int:
        """Tokens of a prompt, T."""
        return self.input_ids.shape[1] - self.answers.shape[1] + 1


class Suite(NamedTuple):
    """A way to ask: ``prompts(length, depth, samples, seed)`` makes those of the given numbers.

    ``depth`` from 0 (first token) to 1 is where what is asked for stands, None anywhere. A prompt depends on
    the suite, seed, length, depth and its number alone. ``solve(ids, random)`` answers from the ids ``[N]``
    of the end of a prompt as one who reads it would, and guesses where it does not say: the parts' token ids.
    Suites that are not ``placed`` have no depth.
    """

    name: str
    prompts: Callable[[int, float | None, Sequence[int], int], Prompts]
    solve: Callable[[Tensor, Random], list[tuple[int, ...]]]
    placed: bool = True


def part_ids(prompts: Prompts, row: int) -> list[tuple[int, ...]]:
    """The token ids of each part of the answer to prompt ``row``."""
    parts = prompts.parts[row]
    return [tuple(prompts.answers[row, parts == n].tolist()) for n in range(int(parts.max()) + 1)]


def share_written(written: Sequence[int], parts: Sequence[tuple[int, ...]]) -> float:
    """Share of ``parts`` whose tokens stand somewhere in ``written``."""
    found = [any(tuple(written[at : at + len(part)]) == part for at in range(len(written))) for part in parts]
    return sum(found) / len(found)


def scores(right: Tensor, parts: Tensor) -> Tensor:
    """Share of each answer's parts that are right in all their tokens: ``[B]`` from bool ``[B, A]``."""
    numbers = torch.arange(int(parts.max()) + 1, device=parts.device)
    own = parts[:, None] == numbers[:, None]
    whole = (right[:, None] | ~own).all(2) & own.any(2)
    return whole.sum(1) / own.any(2).sum(1)


class Written(NamedTuple):
    """One prompt: ids ``[T]``, the answer as ``pieces`` of ids, their ``parts``, tokens of the question.

    ``spans`` are where the needles stand: first token and the one behind the last.
    """

    prompt: Tensor
    pieces: Sequence[Sequence[int]]
    parts: Sequence[int]
    question: int
    spans: Sequence[tuple[int, int]] = ()


def gathered(rows: Sequence[Written], pad: int = 0) -> Prompts:
    """Prompts of one length, ``pad`` behind the shorter answers."""
    longest = max(sum(map(len, row.pieces)) for row in rows)
    ids, answers, parts = [], [], []
    for prompt, pieces, numbers, *_ in rows:
        tokens = [token for piece in pieces for token in piece]
        owners = [number for piece, number in zip(pieces, numbers, strict=True) for _ in piece]
        missing = longest - len(tokens)
        answers.append(torch.tensor(tokens + [pad] * missing))
        parts.append(torch.tensor(owners + [GIVEN] * missing))
        ids.append(torch.cat([prompt, answers[-1][:-1]]))
    question = torch.tensor([row.question for row in rows])
    return Prompts(torch.stack(ids), torch.stack(answers), torch.stack(parts), question)


def cell_seed(*identity: object) -> int:
    """A seed of 63 bits for what ``identity`` names."""
    digest = hashlib.sha256(" ".join(map(repr, identity)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
