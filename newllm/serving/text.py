"""Tokens as text while they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# What a tokenizer makes of the bytes of a character that is not complete.
_INCOMPLETE = "\ufffd"


class TextStream:
    """Text of a reply, character by complete character, up to the first of ``stops``.

    Args:
        tokenizer: decodes the tokens; special ones are left out.
        stops: strings that end the reply and do not belong to it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stop for stop in stops if stop)
        # Tokens since the last place where the text was complete, and how many of them have been shown: words
        # are decoded behind their neighbours, for some tokenizers drop a space that begins a text.
        self._ids: list[int] = []
        self._shown = 0
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What can be shown now that ``token`` has come: perhaps nothing yet."""
        if self.stopped:
            return ""
        self._ids.append(token)
        whole = self._decoded(self._ids)
        if whole.endswith(_INCOMPLETE):
            return ""
        fresh = whole[len(self._decoded(self._ids[: self._shown])) :]
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return self._passed(fresh)

    def finish(self) -> str:
        """What was held back, now that no more tokens come."""
        if self.stopped:
            return ""
        rest = self._decoded(self._ids)[len(self._decoded(self._ids[: self._shown])) :]
        shown = self._passed(rest)
        if not self.stopped:
            shown, self._held = shown + self._held, ""
        return shown

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _passed(self, fresh: str) -> str:
        """``fresh`` behind what is held, without what is or may become a stop."""
        text = self._held + fresh
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        kept = max((_begun(text, stop) for stop in self._stops), default=0)
        cut = len(text) - kept
        self._held = text[cut:]
        return text[:cut]


def _begun(text: str, stop: str) -> int:
    """How many of the last characters of ``text`` begin ``stop``."""
    most = min(len(text), len(stop) - 1)
    return next((count for count in range(most, 0, -1) if text.endswith(stop[:count])), 0)
