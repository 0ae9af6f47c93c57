"""All suites of prompts by name, and names that stand for several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING

from newllm.data.passkey import PasskeyTask, byte_passkey, text_passkey
from newllm.data.recall.counting import COUNTING, counting_suite
from newllm.data.recall.drafts import Drafting, Solving, drafted_suite, language
from newllm.data.recall.needles import RULER, SETTINGS, needle_drafting
from newllm.data.recall.passkeys import passkey_suite
from newllm.data.recall.prompts import Suite
from newllm.data.recall.stories import STORIES, story_drafting
from newllm.data.recall.tracing import tracking_drafting
from newllm.data.tokenizer import is_byte_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GROUPS = {
    "passkey": ("passkey", "passkey_border"),
    "niah": tuple(SETTINGS),
    "ruler": (*RULER, "vt", *COUNTING),
    "babilong": STORIES,
}
"""Names of several suites at once."""
NAMES = tuple(dict.fromkeys(name for names in GROUPS.values() for name in names))


def suite_names(asked: str) -> tuple[str, ...]:
    """The suites that ``asked`` stands for: a group, or names with commas between them.

    Raises ``ValueError`` for an unknown name.
    """
    found: list[str] = []
    for name in asked.split(","):
        if name not in GROUPS and name not in NAMES:
            known = ", ".join(dict.fromkeys((*GROUPS, *NAMES)))
            raise ValueError(f"suite must be one or several of {known}, got {name!r}")
        found += GROUPS.get(name, (name,))
    return tuple(dict.fromkeys(found))


def make_suite(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    segment: int,
    key_length: int = 5,
) -> Suite:
    """The suite ``name`` of ``NAMES`` for ``tokenizer``, hidden in ``text``.

    ``segment`` is that of the model, whose borders ``passkey_border`` crosses; ``key_length`` the digits of a
    passkey.

    Raises:
        ValueError: for an empty text, or a passkey in a tokenizer that joins digits.
    """
    makers: dict[str, Callable[[], Suite]] = {
        "passkey": lambda: passkey_suite(_passkey(tokenizer, text, key_length)),
        "passkey_border": lambda: passkey_suite(_passkey(tokenizer, text, key_length), segment),
    }
    if name not in makers:
        words = language(tokenizer, text)
        if name in COUNTING:
            return counting_suite(name, words)
        return drafted_suite(name, words, *drafting(name))
    return makers[name]()


def drafting(name: str) -> tuple[Drafting, Solving]:
    """How prompts of the suite ``name`` are planned and answered.

    Raises ``ValueError`` for passkeys and lists of words, which have no draft.
    """
    if name in SETTINGS:
        return needle_drafting(name)
    if name not in (*STORIES, "vt"):
        raise ValueError(f"suites must be of {', '.join((*SETTINGS, 'vt', *STORIES))}, got {name!r}")
    return tracking_drafting() if name == "vt" else story_drafting(name)


def examples(names: Sequence[str], count: int = 1000) -> list[str]:
    """``count`` answered prompts of each suite, without filler: what a vocabulary should know, too.

    Raises ``ValueError`` as :func:`drafting` does.
    """
    random = Random(0)
    drafts = [drafting(name)[0](None, random) for name in names for _ in range(count)]
    return [
        f"{draft.head}{''.join(draft.needles)}{draft.question} {draft.glue.join(draft.answer)}"
        for draft in drafts
    ]


def _passkey(tokenizer: PreTrainedTokenizerBase, text: str, key_length: int) -> PasskeyTask:
    if is_byte_tokenizer(tokenizer):
        return byte_passkey(text, key_length)
    return text_passkey(tokenizer, text, key_length)
