"""Documents: texts that keep their borders, and what may be done to them without crossing one."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Container, Iterable
from typing import NamedTuple

SEPARATOR = "\n\n"
_HELD_OUT = 0.1
_SEED = 42


class Documents(NamedTuple):
    """Texts in order: the ``name`` they were read by, a title and a text per document, and their ``sha256``.

    The hash covers the texts and their borders, not the titles.
    """

    name: str
    titles: tuple[str, ...]
    texts: tuple[str, ...]
    sha256: str

    @property
    def characters(self) -> int:
        """Characters of all texts."""
        return sum(map(len, self.texts))

    def joined(self) -> str:
        """All texts, an empty line between two."""
        return SEPARATOR.join(self.texts)

    def chosen(self, places: Iterable[int]) -> Documents:
        """The documents at ``places``, in that order."""
        places = list(places)
        return documents(self.name, [self.titles[i] for i in places], [self.texts[i] for i in places])

    def first(self, count: int | None) -> Documents:
        """At most ``count`` documents from the beginning (None: all)."""
        return self if count is None else self.chosen(range(min(count, len(self.texts))))

    def shuffled(self, seed: int) -> Documents:
        """The same documents in an order drawn from ``seed``; their texts stay whole."""
        places = list(range(len(self.texts)))
        random.Random(seed).shuffle(places)
        return self.chosen(places)

    def every(self, index: int, count: int) -> Documents:
        """The documents whose number modulo ``count`` is ``index``.

        Raises ``ValueError`` for an index that is not below ``count``.
        """
        if not 0 <= index < count:
            raise ValueError(f"index must be from 0 to {count - 1}, got {index}")
        return self.chosen(range(index, len(self.texts), count))


def documents(name: str, titles: Iterable[str], texts: Iterable[str]) -> Documents:
    """``Documents`` with their hash."""
    titles, texts = tuple(titles), tuple(texts)
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8")
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return Documents(name, titles, texts, digest.hexdigest())


def numbered(name: str, texts: Iterable[str]) -> Documents:
    """``Documents`` titled by their numbers."""
    texts = tuple(texts)
    return documents(name, map(str, range(len(texts))), texts)


def together(name: str, parts: Iterable[Documents]) -> Documents:
    """The documents of all ``parts``, one after another, under one name."""
    parts = tuple(parts)
    titles = [title for part in parts for title in part.titles]
    return documents(name, titles, [text for part in parts for text in part.texts])


def split(
    whole: Documents, validation: Container[str] = (), test: Container[str] = ()
) -> tuple[Documents, Documents]:
    """Training and validation documents, never the same text in both.

    Titles in ``validation`` are held out, those in ``test`` belong to neither. Where none are named, a
    document is held out when the hash of its text says so, one in ten: the choice stays the same however
    many documents are read, and copies fall on one side; but neither side is left without a document. A
    single document is cut after nine tenths, at the end of a line unless that is the text's own.
    """
    if len(whole.texts) == 1:
        return _cut(whole)
    named = [title in validation for title in whole.titles]
    held = named if any(named) else [_is_held_out(text) for text in whole.texts]
    if all(held) or not any(held):
        held[-1] = not held[-1]
    kept = [place for place, title in enumerate(whole.titles) if not held[place] and title not in test]
    validating = whole.chosen(place for place, out in enumerate(held) if out)
    return without(whole.chosen(kept), validating), validating


def without(whole: Documents, others: Documents) -> Documents:
    """``whole`` but for the texts that also stand in ``others``."""
    known = set(others.texts)
    if known.isdisjoint(whole.texts):
        return whole
    return whole.chosen(place for place, text in enumerate(whole.texts) if text not in known)


def _is_held_out(text: str) -> bool:
    digest = hashlib.sha256(f"{_SEED}:{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < _HELD_OUT * 2**64


def _cut(whole: Documents) -> tuple[Documents, Documents]:
    (text,) = whole.texts
    place = int(len(text) * (1 - _HELD_OUT))
    border = text.find("\n", place) + 1
    border = border if 0 < border < len(text) else place
    return numbered(whole.name, [text[:border]]), numbered(whole.name, [text[border:]])
