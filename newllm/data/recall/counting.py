"""Which words are frequent: RULER's common-words and frequent-words extraction (arXiv 2404.06654).

What is asked for is spread over the whole list, so these suites have no depth; and it may be named in any
order, so the answer is written freely and searched for each word, as RULER scores it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from math import pi
from random import Random
from string import ascii_lowercase
from typing import NamedTuple

import torch
from torch import Tensor

from newllm.data.recall.drafts import Language
from newllm.data.recall.prompts import GIVEN, Prompts, Suite, Written, cell_seed, gathered
from newllm.data.recall.words import different

_COMMON, _FREQUENT = 10, 3
# Prompts shorter than this repeat words less often.
_LONG = 4096
_TRIES = 8


class Counting(NamedTuple):
    """``listed(words, length, random)`` is a list of about so many words, and those that are asked for.

    ``first`` writes the example before a prompt of ``length``, ``items`` finds the words of a list.
    """

    head: str
    question: str
    asked: int
    listed: Callable[[int, int, Random], tuple[str, list[str]]]
    items: re.Pattern[str]
    first: Callable[[int, Random], str]


def counting_suite(name: str, words: Language) -> Suite:
    """``cwe``, the ten words that a list repeats most, or ``fwe``, the three most frequent coded words.

    ``cwe`` shows a short solved list first. Lists are as long as the prompt allows; what is left, less than a
    few words, is filler before the head.
    """
    task = COUNTING[name]

    def prompts(length: int, depth: float | None, samples: Sequence[int], seed: int) -> Prompts:
        rows = [_written(words, task, length, cell_seed(name, seed, length, depth, n)) for n in samples]
        made = gathered(rows)
        return made._replace(written=2 * made.answers.shape[1])

    def solve(ids: Tensor, random: Random) -> list[tuple[int, ...]]:
        shown = words.decode(ids).rpartition(task.head)[2].rpartition(task.question)[0]
        ranked = sorted(Counter(task.items.findall(shown)).items(), key=lambda item: (-item[1], item[0]))
        found = [word for word, _ in ranked[: task.asked]]
        found += different(_coded, task.asked - len(found), random)
        return [tuple(words.encode(f" {word}").tolist()) for word in found]

    return Suite(name, prompts, solve, placed=False)


def _written(words: Language, task: Counting, length: int, seed: int) -> Written:
    head = words.encode(task.first(length, Random(seed)) + task.head)
    question = words.encode(task.question)
    room = length - len(head) - len(question)
    listed, wanted = _fitting(words, task, length, room, seed)
    start = Random(seed).randrange(len(words.filler))
    index = (start + torch.arange(room - len(listed))) % len(words.filler)
    prompt = torch.cat([words.filler[index], head, listed, question])
    pieces, parts = [], []
    for number, word in enumerate(wanted):
        pieces += [words.encode(f" {number + 1}.").tolist(), words.encode(f" {word}").tolist()]
        parts += [GIVEN, number]
    return Written(prompt, pieces, parts, len(question))


def _fitting(words: Language, task: Counting, length: int, room: int, seed: int) -> tuple[Tensor, list[str]]:
    """The longest list found that fits in ``room`` tokens.

    Raises ``ValueError`` where none does.
    """
    best, wanted, count = None, [""], max(1, room // 6)
    for _ in range(_TRIES):
        text, asked = task.listed(count, length, Random(seed))
        ids = words.encode(text)
        if len(ids) <= room and (best is None or len(ids) > len(best)):
            best, wanted = ids, asked
        if 0 <= room - len(ids) < room // 64:
            break
        # Numbers grow with the list, so the share is taken a little short.
        count = max(1, int(count * room / len(ids) * 0.998))
    if best is None or len(wanted) < task.asked:
        raise ValueError(f"length {length} is too short for a list of words with {task.asked} to be found")
    return best, wanted


def _syllables(random: Random) -> str:
    return "".join(random.choice("bdfghjklmnprstvwz") + random.choice("aeiou") for _ in range(3))


def _coded(random: Random) -> str:
    return "".join(random.choices(ascii_lowercase, k=6))


def _numbered(common: int, often: int, others: int, seldom: int, random: Random) -> tuple[str, list[str]]:
    """``common`` words ``often``, ``others`` ``seldom``, in any order with numbers; and the common ones."""
    drawn = different(_syllables, common + others, random)
    listed = drawn[:common] * often + drawn[common:] * seldom
    random.shuffle(listed)
    return " ".join(f"{n}. {word}" for n, word in enumerate(listed, 1)), sorted(drawn[:common])


def _common_words(count: int, length: int, random: Random) -> tuple[str, list[str]]:
    often, seldom = (6, 1) if length < _LONG else (30, 3)
    return _numbered(_COMMON, often, max(0, count - _COMMON * often) // seldom, seldom, random)


def _example(length: int, random: Random) -> str:
    sizes = (3, _COMMON, 1) if length < _LONG else (10, 3 * _COMMON, 3)
    shown, answer = _numbered(_COMMON, *sizes, random)
    solved = " ".join(f"{n}. {word}" for n, word in enumerate(answer, 1))
    return f"{_COMMON_HEAD}{shown}{_COMMON_QUESTION} {solved}\n"


def _coded_words(count: int, length: int, random: Random) -> tuple[str, list[str]]:
    """Words of rank r stand in ``count`` words r^-2 / zeta(2) times; the first rank is dots."""
    vocabulary = ["...", *different(_coded, max(_FREQUENT, length // 50 - 1), random)]
    times = [int(count * 6 / pi**2 / rank**2) for rank in range(1, len(vocabulary) + 1)]
    listed = [word for word, often in zip(vocabulary, times, strict=True) for _ in range(often)]
    random.shuffle(listed)
    asked = [word for word, often in zip(vocabulary, times, strict=True) if often][1 : 1 + _FREQUENT]
    return " ".join(listed), asked


_COMMON_HEAD = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
_COMMON_QUESTION = (
    "\nQuestion: What are the 10 most common words in the above list? "
    "Answer: The top 10 words that appear most often in the list are:"
)
COUNTING = {
    "cwe": Counting(
        _COMMON_HEAD, _COMMON_QUESTION, _COMMON, _common_words, re.compile(r"\d\. ([a-z]+)"), _example
    ),
    "fwe": Counting(
        "Read the following coded text and track the frequency of each coded word. Find the three most "
        "frequently appeared coded words. ",
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
        "frequently appeared words in the above coded text? Answer: According to the coded text above, the "
        "three most frequently appeared words are:",
        _FREQUENT,
        _coded_words,
        re.compile(r"\b[a-z]{6}\b"),
        lambda length, random: "",
    ),
}
"""RULER's two tasks of aggregation, with its settings: 30 times against 3, and a zeta distribution of 2."""
