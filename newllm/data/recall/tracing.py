"""Variable tracking after RULER's template (Hsieh et al. 2024, arXiv 2404.06654)."""

from __future__ import annotations

import re
from functools import partial
from itertools import pairwise
from random import Random
from string import ascii_uppercase

from newllm.data.recall.drafts import Draft, Drafting, Solving
from newllm.data.recall.needles import noise
from newllm.data.recall.words import different

HOPS = 4
_HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
# The spelling of "assgined" is the template's own.
_QUESTION = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According "
    "to the chain(s) of variable assignment in the text above, {count} variables are assgined the value "
    "{value}, they are:"
)
_STATEMENT = re.compile(r"VAR ([A-Z]{5}) = (?:VAR )?([A-Z]{5}|\d{5})\b")
_ASKED = re.compile(r"variables are assgined the value (\d{5}), they are:")


def tracking_drafting(hops: int = HOPS) -> tuple[Drafting, Solving]:
    """``vt``: ``VAR A = 12345``, ``VAR B = VAR A``, ... over ``hops`` hops; all variables of the value.

    The answer names them in the chain's order. At a depth the chain begins there.
    """
    return partial(_draft, hops), partial(_solve, hops)


def _name(random: Random) -> str:
    return "".join(random.choices(ascii_uppercase, k=5))


def _draft(hops: int, depth: float | None, random: Random) -> Draft:
    names = different(_name, hops + 1, random)
    value = str(random.randrange(10**4, 10**5))
    statements = [f"VAR {names[0]} = {value}\n"]
    statements += [f"VAR {new} = VAR {old}\n" for old, new in pairwise(names)]
    first = random.random() if depth is None else depth
    rest = sorted(first + (1 - first) * random.random() for _ in range(hops))
    question = _QUESTION.format(value=value, count=hops + 1)
    return Draft(_HEAD, statements, [first, *rest], question, names, hay=noise)


def _solve(hops: int, text: str, random: Random) -> list[str]:
    value = _ASKED.findall(text)[-1]
    known: dict[str, str] = {}
    for name, right in _STATEMENT.findall(text):
        known[name] = known.get(right, right)
    found = [name for name, held in known.items() if held == value]
    return (found + [_name(random) for _ in range(hops + 1)])[: hops + 1]
