"""500 generated sentences of six kinds: a tiny corpus that every machine has."""

from __future__ import annotations

import random

KINDS = {"simple": 80, "time": 100, "location": 100, "subordinate": 120, "compound": 60, "full": 40}
"""Kind of sentence -> how many of them."""

_WHO = ("The cat", "A teacher", "My brother", "The old farmer", "Her friend", "The captain", "A young bird")
_DOES = ("reads a letter", "sings a song", "watches the rain", "opens the door", "carries a basket",
         "finds a key", "paints the wall", "waits for news")  # fmt: skip
_WHEN = ("in the morning", "after lunch", "at night", "on Sundays", "before the storm", "every spring")
_WHERE = ("in the garden", "by the river", "near the station", "on the hill", "under the bridge", "at home")
_LINK = ("because", "while", "although", "when", "before")
_JOIN = ("and", "but", "so")


def sentences(seed: int = 42) -> list[tuple[str, str]]:
    """``(kind, sentence)`` 500 times, kinds in the numbers of :data:`KINDS`, shuffled by ``seed``."""
    source = random.Random(seed)
    made = [(kind, _sentence(kind, source)) for kind, count in KINDS.items() for _ in range(count)]
    source.shuffle(made)
    return made


def _sentence(kind: str, source: random.Random) -> str:
    def clause() -> str:
        return f"{source.choice(_WHO)} {source.choice(_DOES)}"

    def inner() -> str:
        made = clause()
        return made[0].lower() + made[1:]

    ends = {
        "simple": lambda: "",
        "time": lambda: f" {source.choice(_WHEN)}",
        "location": lambda: f" {source.choice(_WHERE)}",
        "subordinate": lambda: f" {source.choice(_LINK)} {inner()}",
        "compound": lambda: f", {source.choice(_JOIN)} {inner()}",
        "full": lambda: f" {source.choice(_WHERE)} {source.choice(_WHEN)} {source.choice(_LINK)} {inner()}",
    }
    return f"{clause()}{ends[kind]()}."
