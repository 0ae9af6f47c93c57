"""Needles in a haystack after RULER's templates (Hsieh et al. 2024, arXiv 2404.06654)."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Literal, NamedTuple

from newllm.data.recall.drafts import Draft, Drafting, Solving
from newllm.data.recall.words import different, identifier, number, word

_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_HEAD = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
_QUESTION = (
    "\nWhat are all the special magic {kind} for {keys} mentioned in the provided text? "
    "The special magic {kind} for {keys} mentioned in the provided text are"
)
_ONE_HEAD = (
    "A special magic {one} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {one} afterwards.\n"
)
_ONE_QUESTION = (
    "\nWhat is the special magic {one} for {keys} mentioned in the provided text? "
    "The special magic {one} for {keys} mentioned in the provided text is"
)
_FOUND = re.compile(r"One of the special magic \w+ for (\S+) is: (\S+)\.")
_ASKED = re.compile(r"special magic \w+ for ([^?:]+?) mentioned in the provided text (?:is|are)")
_KINDS: dict[str, Callable[[Random], str]] = {"words": word, "numbers": number, "uuids": identifier}
_ONE = {"numbers": "number", "uuids": "uuid"}

Kind = Literal["words", "numbers", "uuids"]


class Setting(NamedTuple):
    """``keys`` in the text with ``values`` each, ``asked`` of them; filler is ``hay``."""

    hay: Literal["noise", "text", "needles"] = "text"
    key: Kind = "words"
    value: Kind = "numbers"
    keys: int = 1
    values: int = 1
    asked: int = 1


RULER = {
    "niah_single_1": Setting("noise"),
    "niah_single_2": Setting(),
    "niah_single_3": Setting(value="uuids"),
    "niah_multikey_1": Setting(keys=4),
    "niah_multikey_2": Setting("needles"),
    "niah_multikey_3": Setting("needles", key="uuids", value="uuids"),
    "niah_multivalue": Setting(values=4),
    "niah_multiquery": Setting(keys=4, asked=4),
}
"""RULER's eight tasks of this family."""
SETTINGS = {**RULER, "niah_number_key": Setting(key="numbers")}
"""These, and a number that another number is kept under."""


def needle_drafting(name: str) -> tuple[Drafting, Solving]:
    """The task ``name`` of ``SETTINGS``; where several answers are asked for, in the order of the text."""
    setting = SETTINGS[name]
    return partial(_draft, setting), partial(_solve, setting)


def noise(random: Random) -> str:
    """A line of RULER's repeated filler."""
    return _NOISE


def _draft(setting: Setting, depth: float | None, random: Random) -> Draft:
    """Needles at random places, that of the first asked key at ``depth``."""
    keys = different(_KINDS[setting.key], setting.keys, random)
    values = different(_KINDS[setting.value], setting.keys * setting.values, random)
    hidden = [(keys[place // setting.values], value) for place, value in enumerate(values)]
    places = [random.random() for _ in hidden]
    if depth is not None:
        places[0] = depth
    order = sorted(range(len(hidden)), key=places.__getitem__)
    asked = keys[: setting.asked]
    answer = [hidden[place][1] for place in order if hidden[place][0] in asked]
    asked = list(dict.fromkeys(hidden[place][0] for place in order if hidden[place][0] in asked))
    head, question = (_ONE_HEAD, _ONE_QUESTION) if len(answer) == 1 else (_HEAD, _QUESTION)
    listed = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    names = {"kind": setting.value, "one": _ONE[setting.value], "keys": listed}

    def distractor(random: Random) -> str:
        (key,) = different(_KINDS[setting.key], 1, random, tuple(keys))
        return _NEEDLE.format(kind=setting.value, key=key, value=_KINDS[setting.value](random)) + "\n"

    hay = {"noise": noise, "text": None, "needles": distractor}[setting.hay]
    return Draft(
        head=head.format(**names),
        needles=[
            f"{_NEEDLE.format(kind=setting.value, key=hidden[i][0], value=hidden[i][1])}\n" for i in order
        ],
        places=[places[i] for i in order],
        question=question.format(**names),
        answer=answer,
        hay=hay,
    )


def _solve(setting: Setting, text: str, random: Random) -> list[str]:
    asked = re.split(r", (?:and )?", _ASKED.findall(text)[-1])
    found = [value for key, value in _FOUND.findall(text) if key in asked]
    wanted = setting.values * setting.asked
    return (found + [_KINDS[setting.value](random) for _ in range(wanted)])[:wanted]
