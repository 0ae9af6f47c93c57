"""Questions about small stories, hidden fact by fact in text: the format of BABILong, QA1 to QA5.

The stories are made here after the rules of bAbI (Weston et al. 2015, arXiv 1502.05698); scattering their
facts over long text is BABILong's way to ask (Kuratov et al. 2024, arXiv 2406.10149).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from random import Random
from typing import NamedTuple

from newllm.data.recall.drafts import Draft, Drafting, Solving

PEOPLE = ("Daniel", "John", "Mary", "Sandra")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
GIVERS = ("Bill", "Fred", "Jeff", "Mary")
_MOVES = ("moved to", "went to", "journeyed to", "travelled to")
_SIDES = {"north": "south", "south": "north", "east": "west", "west": "east"}


class Story(NamedTuple):
    """``facts`` in order, ``decisive`` the one that is put at a depth, ``question`` and ``answer``.

    ``more`` are further questions that the facts answer, with the answers.
    """

    facts: list[str]
    decisive: int
    question: str
    answer: str
    more: tuple[tuple[str, str], ...] = ()


def story_drafting(name: str) -> tuple[Drafting, Solving]:
    """``qa1`` to ``qa5``."""
    tell, options = _TELLERS[name]
    return partial(_draft, tell), partial(_solve, options)


def _draft(tell: Callable[[Random], Story], depth: float | None, random: Random) -> Draft:
    """Facts in order at random places, the decisive one at ``depth``."""
    story = tell(random)
    before, after = story.decisive, len(story.facts) - story.decisive - 1
    if depth is None:
        places = sorted(random.random() for _ in story.facts)
    else:
        places = [*sorted(depth * random.random() for _ in range(before)), depth]
        places += sorted(depth + (1 - depth) * random.random() for _ in range(after))
    ask = "\nQuestion: {} Answer:".format
    more = [(ask(question), answer) for question, answer in story.more]
    facts = [f"{fact}\n" for fact in story.facts]
    return Draft("", facts, places, ask(story.question), [story.answer], more=more)


def _move(person: str, place: str, random: Random) -> str:
    return f"{person} {random.choice(_MOVES)} the {place}."


def _qa1(random: Random) -> Story:
    """Where is a person: the last move decides."""
    facts = [
        _move(random.choice(PEOPLE), random.choice(PLACES), random) for _ in range(random.randint(2, 10))
    ]
    person = random.choice(facts).split()[0]
    decisive = max(number for number, fact in enumerate(facts) if fact.startswith(person))
    at = {fact.split()[0]: _place_of(fact) for fact in facts}
    answer = at.pop(person)
    more = tuple((f"Where is {other}?", place) for other, place in at.items())
    return Story(facts, decisive, f"Where is {person}?", answer, more)


def _place_of(fact: str) -> str:
    return fact.rstrip(".").split()[-1]


def _journey(random: Random, steps: int) -> list[str]:
    """People move, and take and drop things where they are."""
    facts: list[str] = []
    at: dict[str, str] = {}
    held: dict[str, str] = {}
    lying: dict[str, str] = {}
    for _ in range(steps):
        person = random.choice(PEOPLE)
        mine = [thing for thing, owner in held.items() if owner == person]
        here = [
            thing
            for thing in THINGS
            if thing not in held and person in at and lying.get(thing, at[person]) == at[person]
        ]
        lot = random.random()
        if here and lot < 0.35:
            thing = random.choice(here)
            held[thing] = person
            facts.append(f"{person} took the {thing} there.")
        elif mine and lot < 0.5:
            thing = random.choice(mine)
            del held[thing]
            lying[thing] = at[person]
            facts.append(f"{person} dropped the {thing} there.")
        else:
            at[person] = random.choice([place for place in PLACES if place != at.get(person)])
            facts.append(_move(person, at[person], random))
    return facts


def _traces(facts: list[str]) -> dict[str, list[tuple[str, int]]]:
    """Where each thing was known to be, one place after another, and the fact that brought it there."""
    at: dict[str, tuple[str, int]] = {}
    held: dict[str, str] = {}
    traces: dict[str, list[tuple[str, int]]] = {}

    def add(thing: str, place: tuple[str, int]) -> None:
        trace = traces.setdefault(thing, [])
        if not trace or trace[-1][0] != place[0]:
            trace.append(place)

    for number, fact in enumerate(facts):
        person, verb, *_ = fact.split()
        if verb in ("took", "dropped"):
            thing = fact.split()[3]
            if person in at:
                add(thing, at[person])
            if verb == "took":
                held[thing] = person
            else:
                held.pop(thing, None)
            continue
        at[person] = (_place_of(fact), number)
        for thing, owner in held.items():
            if owner == person:
                add(thing, at[person])
    return traces


def _qa2(random: Random) -> Story:
    """Where is a thing: who has it, and where they are."""
    while True:
        facts = _journey(random, random.randint(6, 20))
        traces = _traces(facts)
        if traces:
            thing = random.choice(sorted(traces))
            place, decisive = traces[thing][-1]
            return Story(facts, decisive, f"Where is the {thing}?", place)


def _qa3(random: Random) -> Story:
    """Where was a thing before it was somewhere."""
    while True:
        facts = _journey(random, random.randint(10, 30))
        long = {thing: trace for thing, trace in sorted(_traces(facts).items()) if len(trace) > 1}
        if long:
            thing = random.choice(list(long))
            (before, decisive), (last, _) = long[thing][-2:]
            return Story(facts, decisive, f"Where was the {thing} before the {last}?", before)


def _qa4(random: Random) -> Story:
    """Which place lies on a side of another."""
    first, second, third = random.sample(PLACES, 3)
    # Two facts about the middle place on different axes or opposite sides, as in bAbI.
    one, other = random.sample(sorted(_SIDES), 2)
    facts = [f"The {first} is {one} of the {second}.", f"The {third} is {other} of the {second}."]
    random.shuffle(facts)
    decisive = random.randrange(2)
    left, side, right = re.findall(r"The (\w+) is (\w+) of the (\w+)", facts[decisive])[0]
    if random.random() < 0.5:
        return Story(facts, decisive, f"What is {side} of the {right}?", left)
    return Story(facts, decisive, f"What is the {left} {side} of?", right)


def _qa5(random: Random) -> Story:
    """Who gave what to whom: the last such gift decides."""
    facts = []
    for _ in range(random.randint(2, 10)):
        if random.random() < 0.5:
            facts.append(_move(random.choice(GIVERS), random.choice(PLACES), random))
        giver, taker = random.sample(GIVERS, 2)
        facts.append(f"{giver} gave the {random.choice(THINGS)} to {taker}.")
    gift = random.choice([fact for fact in facts if " gave " in fact])
    giver, thing, taker = _GIFT.findall(gift)[0]
    question, answer = random.choice(
        [
            (f"Who gave the {thing} to {taker}?", 0),
            (f"Who did {giver} give the {thing} to?", 2),
            (f"What did {giver} give to {taker}?", 1),
            (f"Who gave the {thing}?", 0),
            (f"Who received the {thing}?", 2),
        ]
    )
    asked = [bool(re.search(rf"\b{part}\b", question)) for part in (giver, thing, taker)]
    same = [
        number
        for number, fact in enumerate(facts)
        for parts in _GIFT.findall(fact)
        if all(
            not is_asked or mine == theirs
            for is_asked, mine, theirs in zip(asked, (giver, thing, taker), parts, strict=True)
        )
    ]
    return Story(facts, same[-1], question, _GIFT.findall(facts[same[-1]])[0][answer])


_GIFT = re.compile(r"(\w+) gave the (\w+) to (\w+)\.")
_WHO = "|".join(dict.fromkeys((*PEOPLE, *GIVERS)))
_FACT = re.compile(
    rf"(?:{_WHO}) (?:(?:{'|'.join(_MOVES)}) the \w+|(?:took|dropped) the \w+ there|gave the \w+ to \w+)\."
    rf"|The \w+ is (?:{'|'.join(_SIDES)}) of the \w+\."
)


def _solve(options: tuple[str, ...], text: str, random: Random) -> list[str]:
    """Read the facts, then answer the question; a guess among ``options`` where they do not say."""
    story, _, question = text.rpartition("\nQuestion: ")
    answer = _answer(_FACT.findall(story), question.removesuffix(" Answer:"))
    return [answer or random.choice(options)]


def _answer(facts: list[str], question: str) -> str | None:
    for pattern, look in _QUESTIONS:
        asked = re.fullmatch(pattern, question)
        if asked:
            return look(facts, *asked.groups())
    return None


def _where(facts: list[str], person: str) -> str | None:
    moves = [fact for fact in facts if fact.startswith(f"{person} ") and " the " in fact]
    moves = [fact for fact in moves if any(f" {verb} " in fact for verb in _MOVES)]
    return _place_of(moves[-1]) if moves else None


def _where_thing(facts: list[str], thing: str) -> str | None:
    trace = _traces(facts).get(thing)
    return trace[-1][0] if trace else None


def _where_before(facts: list[str], thing: str, place: str) -> str | None:
    trace = [name for name, _ in _traces(facts).get(thing, [])]
    later = [number for number, name in enumerate(trace) if name == place and number]
    return trace[later[-1] - 1] if later else None


def _related(facts: list[str], pattern: str) -> str | None:
    found = [match for fact in facts for match in re.findall(pattern, fact)]
    return found[-1] if found else None


_QUESTIONS: tuple[tuple[str, Callable[..., str | None]], ...] = (
    (r"Where is the (\w+)\?", _where_thing),
    (r"Where is (\w+)\?", _where),
    (r"Where was the (\w+) before the (\w+)\?", _where_before),
    (
        r"What is (\w+) of the (\w+)\?",
        lambda f, side, right: _related(f, rf"The (\w+) is {side} of the {right}\."),
    ),
    (
        r"What is the (\w+) (\w+) of\?",
        lambda f, left, side: _related(f, rf"The {left} is {side} of the (\w+)\."),
    ),
    (r"Who gave the (\w+) to (\w+)\?", lambda f, what, to: _related(f, rf"(\w+) gave the {what} to {to}\.")),
    (
        r"Who did (\w+) give the (\w+) to\?",
        lambda f, who, what: _related(f, rf"{who} gave the {what} to (\w+)\."),
    ),
    (r"What did (\w+) give to (\w+)\?", lambda f, who, to: _related(f, rf"{who} gave the (\w+) to {to}\.")),
    (r"Who gave the (\w+)\?", lambda f, what: _related(f, rf"(\w+) gave the {what} to \w+\.")),
    (r"Who received the (\w+)\?", lambda f, what: _related(f, rf"gave the {what} to (\w+)\.")),
)
_TELLERS: dict[str, tuple[Callable[[Random], Story], tuple[str, ...]]] = {
    "qa1": (_qa1, PLACES),
    "qa2": (_qa2, PLACES),
    "qa3": (_qa3, PLACES),
    "qa4": (_qa4, PLACES),
    "qa5": (_qa5, (*GIVERS, *THINGS)),
}
STORIES = tuple(_TELLERS)
