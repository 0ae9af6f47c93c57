"""Tasks over symbols without words: associative recall, rewriting, and keeping track of a state.

Sizes: B sequences of T symbols. Targets are what comes after a symbol, ``IGNORED`` where nothing is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor

from newllm.data.streams import IGNORED

# inputs and targets [B, T] of B sequences
Drawing = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


class SymbolTask(NamedTuple):
    """``draw(samples, generator)`` gives inputs and targets ``[B, T]`` of symbols below ``vocabulary``."""

    name: str
    vocabulary: int
    draw: Drawing


def mqar(pairs: int, length: int, vocabulary: int = 8192, power: float = 0.01) -> SymbolTask:
    """Multi-query associative recall in Zoology's settings (Arora et al. 2023, arXiv 2312.04927).

    ``pairs`` of a key and a value come first, keys from the lower half of the vocabulary, values from the
    upper. Each key comes once more in the rest, which else is random: early places are likelier, by the
    density of the power law with exponent ``power``. Its value is the target there.

    Raises ``ValueError`` where the pairs do not fit.
    """
    space = (length - 2 * pairs) // 2
    if pairs < 1 or space < pairs or pairs > vocabulary // 2 - 1:
        raise ValueError(
            f"pairs must be between 1 and a quarter of length ({length}), and below half of vocabulary "
            f"({vocabulary}), got {pairs}"
        )
    density = power * torch.arange(1, space + 1, dtype=torch.float64) ** (power - 1)

    def draw(samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        half = vocabulary // 2
        keys = _distinct(half - 1, samples, pairs, generator) + 1
        values = _distinct(vocabulary - half, samples, pairs, generator) + half
        ids = torch.randint(vocabulary, (samples, length), generator=generator)
        targets = torch.full((samples, length), IGNORED)
        ids[:, 0 : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2] = keys, values
        gaps = torch.multinomial(density.expand(samples, -1), pairs, generator=generator)
        places = 2 * pairs + 2 * gaps
        ids.scatter_(1, places, keys)
        targets.scatter_(1, places, values)
        return ids, targets

    return SymbolTask(f"mqar_{pairs}", vocabulary, draw)


def rewrite(updates: int, keys: int = 8, values: int = 8) -> SymbolTask:
    """Keys that get new values ``updates`` times in all; at the end each key's last value is asked for.

    After Rodkin et al. 2024 (arXiv 2407.04841): who only adds cannot tell the last value from the others.
    Every key is written at least once. Raises ``ValueError`` for fewer updates than keys.
    """
    if updates < keys:
        raise ValueError(f"updates must be at least keys ({keys}), got {updates}")

    def draw(samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        written = torch.randint(keys, (samples, updates), generator=generator)
        # Each key's first update stands at a place of its own.
        written.scatter_(
            1, _distinct(updates, samples, keys, generator), torch.arange(keys).expand(samples, -1)
        )
        given = torch.randint(values, (samples, updates), generator=generator)
        order = torch.arange(updates).expand(samples, -1)
        asked = torch.rand(samples, keys, generator=generator).argsort(1)
        last = torch.where(written[:, None] == asked[..., None], order[:, None], -1).argmax(2)
        answers = given.gather(1, last) + keys
        ids = torch.stack([written, given + keys], 2).flatten(1)
        questions = torch.stack([asked, answers], 2).flatten(1)
        targets = torch.full_like(questions, IGNORED)
        targets[:, ::2] = answers
        return torch.cat([ids, questions], 1), torch.cat([torch.full_like(ids, IGNORED), targets], 1)

    return SymbolTask(f"rewrite_{updates}", keys + values, draw)


def group_word(name: str, length: int) -> SymbolTask:
    """A word of ``length`` elements of a group, the target at each being the product so far.

    ``parity`` is the group of two, ``s3`` the six permutations of three things, ``a5`` the sixty even ones of
    five: no fixed number of layers without recurrence multiplies words of a5 (Merrill et al. 2024, arXiv
    2404.08819). Raises ``ValueError`` for another name.
    """
    if name not in GROUPS:
        raise ValueError(f"task must be one of {', '.join(GROUPS)}, got {name!r}")
    table = _table(name)

    def draw(samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        ids = torch.randint(len(table), (samples, length), generator=generator)
        state = ids[:, 0]
        states = [state]
        for step in range(1, length):
            state = table[state, ids[:, step]]
            states.append(state)
        return ids, torch.stack(states, 1)

    return SymbolTask(f"{name}_{length}", len(table), draw)


GROUPS = {"parity": (2, False), "s3": (3, False), "a5": (5, True)}
"""Permutations of how many things, and whether the even ones alone."""


@cache
def _table(name: str) -> Tensor:
    """``[N, N]``: the number of the product of two elements, the first acting first."""
    things, even = GROUPS[name]
    elements = [one for one in permutations(range(things)) if not even or _sign(one) > 0]
    number = {one: index for index, one in enumerate(elements)}
    return torch.tensor([[number[tuple(b[i] for i in a)] for b in elements] for a in elements])


def _sign(one: tuple[int, ...]) -> int:
    swaps = sum(left > right for i, left in enumerate(one) for right in one[i + 1 :])
    return 1 - 2 * (swaps % 2)


def _distinct(high: int, samples: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` different numbers below ``high`` in every row: ``[samples, count]``."""
    return torch.rand(samples, high, generator=generator).topk(count, largest=False).indices
