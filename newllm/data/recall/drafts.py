"""From drafts of prompts in words to prompts of exactly so many tokens.

A draft says what is hidden, where, and how it is asked for; filler text makes up the length. Every piece is
tokenised on its own, so that no piece changes another's tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from newllm.data.recall.prompts import GIVEN, Prompts, Suite, Written, cell_seed, gathered
from newllm.data.tokenizer import byte_ids, encode, is_byte_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Pieces of prompts whose token ids are kept: facts of stories are some hundred.
_KEPT = 4096
_SENTENCE_END = re.compile(r"[.!?\n]\s*$")


class Language(NamedTuple):
    """What prompts are made of: token ids of words and back, and ``filler [N]`` (int64).

    ``breaks [N]`` (bool) are the tokens after which a sentence may be put in.
    """

    encode: Callable[[str], Tensor]
    decode: Callable[[Tensor], str]
    filler: Tensor
    breaks: Tensor


class Draft(NamedTuple):
    """A prompt in words: ``head``, filler with ``needles`` at ``places`` (rising, 0 to 1), ``question``.

    The answer's parts are ``answer``, with ``glue`` between them. ``hay`` writes a sentence of the filler,
    None for the language's own text. ``more`` are further questions with an answer each, for training.
    """

    head: str
    needles: Sequence[str]
    places: Sequence[float]
    question: str
    answer: Sequence[str]
    glue: str = ","
    hay: Callable[[Random], str] | None = None
    more: Sequence[tuple[str, str]] = ()


class Encoded(NamedTuple):
    """A draft as token ids, each text on its own; the answer as ``Written`` has it."""

    draft: Draft
    head: Tensor
    needles: Sequence[Tensor]
    question: Tensor
    pieces: Sequence[Sequence[int]]
    parts: Sequence[int]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt without any filler."""
        return sum(map(len, (self.head, *self.needles, self.question)))

    @property
    def answer_tokens(self) -> int:
        """Tokens of the answer."""
        return sum(map(len, self.pieces))


Drafting = Callable[[float | None, Random], Draft]
Solving = Callable[[str, Random], list[str]]


def language(tokenizer: PreTrainedTokenizerBase, text: str) -> Language:
    """The language of ``tokenizer`` with ``text`` as filler, whose digits become ``#``.

    Raises ``ValueError`` for an empty text.
    """
    # Asking each time whether a tokenizer is one of bytes would take longer than to encode by it; others take
    # longer than all else that a prompt needs, and stories repeat their facts.
    bytewise = is_byte_tokenizer(tokenizer)
    to_ids = byte_ids if bytewise else lru_cache(_KEPT)(partial(encode, tokenizer))
    filler = to_ids(re.sub(r"\d", "#", text))
    if len(filler) == 0:
        raise ValueError("text is empty, expected some words to hide things in")
    kinds = torch.unique(filler)
    ends = [bool(_SENTENCE_END.search(tokenizer.decode([token]))) for token in kinds.tolist()]
    breaks = torch.isin(filler, kinds[torch.tensor(ends, dtype=torch.bool)])
    return Language(to_ids, lambda ids: str(tokenizer.decode(ids)), filler, breaks)


def drafted_suite(name: str, words: Language, draft: Drafting, solve: Solving) -> Suite:
    """The suite ``name`` of prompts that ``draft`` plans and ``solve`` can answer by reading them."""

    def prompts(length: int, depth: float | None, samples: Sequence[int], seed: int) -> Prompts:
        rows = []
        for number in samples:
            random = Random(cell_seed(name, seed, length, depth, number))
            rows.append(written(words, encoded(words, draft(depth, random)), length, random))
        return gathered(rows)

    def solved(ids: Tensor, random: Random) -> list[tuple[int, ...]]:
        return [tuple(words.encode(f" {part}").tolist()) for part in solve(words.decode(ids), random)]

    return Suite(name, prompts, solved)


def encoded(words: Language, draft: Draft, questions: int = 1) -> Encoded:
    """``draft`` in the tokens of ``words``; of its ``questions`` those behind the first are given pieces."""
    needles = [words.encode(needle) for needle in draft.needles]
    head, question = words.encode(draft.head), words.encode(draft.question)
    return Encoded(draft, head, needles, question, *_answer_pieces(words, draft, questions))


def written(words: Language, plan: Encoded, length: int, random: Random) -> Written:
    """The prompt of ``length`` tokens that the draft of ``plan`` describes, with its answer.

    Raises ``ValueError`` for a length too short for what has to stand in it.
    """
    draft, room = plan.draft, length - plan.prompt_tokens
    if room < 0:
        raise ValueError(
            f"length {length} is too short for its prompt, which needs {plan.prompt_tokens} tokens"
        )
    if draft.hay is None:
        start = random.randrange(len(words.filler))
        index = (start + torch.arange(room)) % len(words.filler)
        hay, breaks = words.filler[index], words.breaks[index]
    else:
        hay, breaks = _written_hay(words, draft.hay, room, random)
    parts, before, total, spans = [plan.head], 0, len(plan.head), []
    for needle, place in zip(plan.needles, draft.places, strict=True):
        spot = max(before, _spot(breaks, place))
        parts += [hay[before:spot], needle]
        total += spot - before
        spans.append((total, total + len(needle)))
        total, before = total + len(needle), spot
    prompt = torch.cat([*parts, hay[before:], plan.question])
    return Written(prompt, plan.pieces, plan.parts, len(plan.question), spans)


def _answer_pieces(words: Language, draft: Draft, questions: int) -> tuple[list[list[int]], list[int]]:
    """The answer's token ids piece by piece, and which part each piece belongs to."""
    pieces: list[list[int]] = []
    numbers: list[int] = []
    more = draft.more[: questions - 1]
    between = [*[draft.glue] * (len(draft.answer) - 1), *(question for question, _ in more)]
    for number, part in enumerate([*draft.answer, *(answer for _, answer in more)]):
        if number:
            pieces.append(words.encode(between[number - 1]).tolist())
            numbers.append(GIVEN)
        pieces.append(words.encode(f" {part}").tolist())
        numbers.append(number)
    return pieces, numbers


def _written_hay(
    words: Language, hay: Callable[[Random], str], room: int, random: Random
) -> tuple[Tensor, Tensor]:
    """``room`` tokens of sentences, the last cut short, and where each ends."""
    known: dict[str, Tensor] = {}
    parts, ends, total = [torch.zeros(0, dtype=torch.int64)], [], 0
    while total < room:
        sentence = hay(random)
        if sentence not in known:
            known[sentence] = words.encode(sentence)
        parts.append(known[sentence])
        total += len(known[sentence])
        ends.append(total - 1)
    breaks = torch.zeros(total, dtype=torch.bool)
    breaks[ends] = True
    return torch.cat(parts)[:room], breaks[:room]


def _spot(breaks: Tensor, place: float) -> int:
    """How many tokens stand before a needle: the nearest end of a sentence, both ends of the filler too."""
    wanted = round(place * len(breaks))
    reach = 512
    low = max(0, wanted - reach)
    near = (breaks[low : wanted + reach].nonzero()[:, 0] + low + 1).tolist()
    ends = [spot for spot in (0, len(breaks)) if abs(spot - wanted) < reach]
    return min([*near, *ends], key=lambda spot: (abs(spot - wanted), spot), default=wanted)
