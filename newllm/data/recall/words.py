"""Words, numbers and identifiers to be kept in mind."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

_ADJECTIVES = """
able amber ancient bitter blunt bold brave brisk calm careful cheap clever cold coral crisp curious
daring dark deep dull eager early fair faint famous fierce firm fond frail fresh gentle giant glad golden
grand grave happy harsh heavy honest humble icy jolly keen kind large lazy little lively lone loud lucky
mellow merry mild modest narrow neat noble odd old pale patient plain polite proud quick quiet rapid rare
rough rural sharp shy silent silver slow small smooth sober solid stern strong subtle sunny swift tall
tame tidy tiny tough vast vivid warm wary weary wild wise young
"""
_NOUNS = """
anchor apple arrow badge barrel basket beacon bell bird blanket boat bottle bridge broom bucket butter
cabin candle canyon carpet castle chain chair cherry circle clock cloud coat comet copper cradle curtain
desert door dragon drum eagle engine falcon feather fence field flag flute forest fountain garden glove
hammer harbor hill horse island jacket jewel kettle key ladder lamp lantern lemon letter lion lock market
meadow mirror moon mountain needle ocean orange oven palace paper pearl pebble pencil piano pillow planet
plum pocket pond potato prairie pumpkin rabbit raven ribbon river road rocket sail saddle shadow shell
ship silk spoon stone storm table temple thunder ticket tiger tower train tunnel valley violin wagon
walnut wheel whistle window wolf
"""

ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())


def word(random: Random) -> str:
    """A key such as ``quiet-lantern``."""
    return f"{random.choice(ADJECTIVES)}-{random.choice(NOUNS)}"


def number(random: Random) -> str:
    """Seven digits, the first of them not 0."""
    return str(random.randrange(10**6, 10**7))


def identifier(random: Random) -> str:
    """32 hexadecimal digits in the groups of a UUID."""
    digits = f"{random.getrandbits(128):032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def different(
    draw: Callable[[Random], str], count: int, random: Random, besides: tuple[str, ...] = ()
) -> list[str]:
    """``count`` values of ``draw(random)``, no two alike and none of ``besides``."""
    found = dict.fromkeys(besides)
    while len(found) < count + len(besides):
        found[draw(random)] = None
    return list(found)[len(besides) :]
