"""Prompts and the turns of a chat, as what a session is fed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from newllm.files import reading

# Turns for models without a chat template of their own.
_NAMES = {"user": "Human:", "assistant": "Assistant:", "system": "System:"}
# Stands for the reply that the session has already read, while a template sets the turns around it.
_REPLY = "[the reply]"


class Turn(NamedTuple):
    """One message of a chat; ``role`` is ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


def text_ids(tokenizer: Any, text: str, *, begins: bool = True) -> torch.Tensor:
    """Ids ``[T]`` of ``text``; where that begins a stream, for many tokenizers behind a special token."""
    ids = tokenizer(text, add_special_tokens=begins, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def opening(tokenizer: Any, turns: Sequence[Turn]) -> torch.Tensor:
    """Ids ``[T]`` of ``turns`` that open a chat, up to where the assistant answers."""
    if tokenizer.chat_template is None:
        return text_ids(tokenizer, _plain(turns))
    return text_ids(tokenizer, _templated(tokenizer, turns), begins=False)


def following(tokenizer: Any, turns: Sequence[Turn], *, closed: bool) -> str:
    """``turns`` behind a reply; ``closed`` when the reply ended with its end-of-turn token."""
    if tokenizer.chat_template is None:
        return f"\n\n{_plain(turns)}"
    around = [Turn("user", ""), Turn("assistant", _REPLY), *turns]
    after = _templated(tokenizer, around).partition(_REPLY)[2]
    return after.removeprefix(tokenizer.eos_token) if closed else after


def stop_of(tokenizer: Any) -> str | None:
    """What a model without a chat template writes when its reply is over: the human's next message."""
    return _NAMES["user"] if tokenizer.chat_template is None else None


def _plain(turns: Sequence[Turn]) -> str:
    said = [f"{_NAMES[turn.role]} {turn.content}" for turn in turns]
    return "\n\n".join([*said, _NAMES["assistant"]])


def _templated(tokenizer: Any, turns: Sequence[Turn]) -> str:
    messages = [turn._asdict() for turn in turns]
    # A template is a program of the checkpoint's, run in a sandbox; it may refuse some orders of turns.
    with reading("the chat template of", tokenizer.name_or_path):
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
