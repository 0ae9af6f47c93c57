"""What is fed to a session so that a model answers: prompts, the turns of a chat, and its reply as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from newllm.models.history import HistorySession
    from newllm.models.sampling import Sampling
    from newllm.models.session import Session

    Stream = Session | HistorySession

# Turns for models without a chat template of their own.
_HUMAN, _ASSISTANT = "Human:", "Assistant:"
# Stands for the reply that the session has already read, while a template sets the turns around it.
_REPLY = "[the reply]"
_SHOWN_AT_ONCE = 1024


def prompt_ids(tokenizer: Any, text: str, *, raw: bool) -> torch.Tensor:
    """Ids ``[T]`` of a prompt: as a chat's first message if the model has a template, unless ``raw``.

    Text alone begins as the tokenizer begins a text, which for many is a special token.
    """
    import torch

    templated = not raw and tokenizer.chat_template is not None
    if templated:
        text = _templated(tokenizer, [("user", text)])
    ids = tokenizer(text, add_special_tokens=not templated, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def first_turn(tokenizer: Any, text: str) -> torch.Tensor:
    """Ids ``[T]`` of ``text`` as the opening message of a chat."""
    if tokenizer.chat_template is None:
        text = f"{_HUMAN} {text}\n\n{_ASSISTANT}"
    return prompt_ids(tokenizer, text, raw=False)


def next_turn(tokenizer: Any, text: str, *, closed: bool) -> str:
    """``text`` as the message after a reply; ``closed`` when the reply ended with its end-of-turn token."""
    if tokenizer.chat_template is None:
        return f"\n\n{_HUMAN} {text}\n\n{_ASSISTANT}"
    turns = _templated(tokenizer, [("user", ""), ("assistant", _REPLY), ("user", text)])
    after = turns.partition(_REPLY)[2]
    return after.removeprefix(tokenizer.eos_token) if closed else after


def _templated(tokenizer: Any, turns: list[tuple[str, str]]) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def feed_with_progress(session: Stream, ids: torch.Tensor) -> None:
    """Read ``ids``, with a bar when they are many."""
    from tqdm import tqdm

    with tqdm(total=len(ids), desc="reading", unit="token", disable=len(ids) <= _SHOWN_AT_ONCE) as bar:
        for part in ids.split(_SHOWN_AT_ONCE):
            session.feed(part)
            bar.update(len(part))


def reply(session: Stream, *, tokens: int, sampling: Sampling, generator: torch.Generator) -> Iterator[int]:
    """The tokens of a reply: until the model ends it, or writes the human's next message itself."""
    tokenizer: Any = session.tokenizer
    stop = _HUMAN if tokenizer.chat_template is None else ""
    held: list[int] = []
    for step in session.stream(max_new_tokens=tokens, sampling=sampling, generator=generator):
        if (token := int(step)) >= 0:
            held.append(token)
        begun = tokenizer.decode(held).strip()
        if stop and begun == stop:
            return
        # What may become the stop is kept back until it does or does not.
        if not (stop and stop.startswith(begun)):
            yield from held
            held = []
    yield from held


def show(tokenizer: Any, tokens: Iterable[int]) -> int:
    """Print ``tokens`` as text while they come; their number."""
    import torch
    from transformers import TextStreamer

    streamer, count = TextStreamer(tokenizer, skip_special_tokens=True), 0
    for token in tokens:
        streamer.put(torch.tensor([token]))
        count += 1
    streamer.end()
    return count
