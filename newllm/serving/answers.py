"""Answers, whole or as server-sent events, from what the engine tells of a job."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NamedTuple

from newllm.serving.engine import Engine
from newllm.serving.jobs import Event, Job
from newllm.serving.protocol import failure, usage

# Seconds between two looks whether a client that waits for a whole answer is still there.
_LOOK = 1.0


class Failed(RuntimeError):
    """The engine could not answer."""


class Style(NamedTuple):
    """How an answer looks: prefix of its id, object of a whole one and of a piece, and a text in a choice."""

    prefix: str
    whole: str
    piece: str
    choice: Callable[[str], dict[str, Any]]
    delta: Callable[[str], dict[str, Any]]


COMPLETION = Style(
    "cmpl",
    "text_completion",
    "text_completion",
    lambda text: {"text": text, "logprobs": None},
    lambda text: {"text": text, "logprobs": None},
)
CHAT = Style(
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    lambda text: {"message": {"role": "assistant", "content": text}, "logprobs": None},
    lambda text: {"delta": {"role": "assistant", "content": text}, "logprobs": None},
)


class Answer:
    """The answer to one job, which it submits.

    Args:
        engine: answers.
        job: what is asked; its ``tell`` is set here.
        style: the kind of answer.
        model: name under which the model is served.
        window: tokens of the model's window, None without one.

    Raises:
        Busy: where too many wait already.
    """

    def __init__(self, engine: Engine, job: Job, style: Style, model: str, window: int | None) -> None:
        loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        job.tell = lambda event: loop.call_soon_threadsafe(self._events.put_nowait, event)
        self._engine, self._job, self._style, self._window = engine, job, style, window
        self._shared = {
            "id": f"{style.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        engine.submit(job)

    async def whole(self, gone: Callable[[], Awaitable[bool]]) -> dict[str, Any]:
        """The answer at once; the job is cancelled when the client is ``gone``. Raises ``Failed``."""
        parts = []
        async with aclosing(self._told(gone)) as events:
            async for event in events:
                parts.append(event.text)
        choice = {"index": 0, "finish_reason": event.finish, **self._style.choice("".join(parts))}
        about = {"usage": usage(event.read, event.written), "newllm": self._about(event)}
        return {**self._shared, "object": self._style.whole, "choices": [choice], **about}

    async def stream(self, *, include_usage: bool) -> AsyncGenerator[str]:
        """The answer as server-sent events; a client that goes away cancels the job."""
        try:
            async with aclosing(self._told()) as events:
                async for event in events:
                    if event.kind == "reading":
                        yield f": {event.read} of {event.to_read} tokens read\n\n"
                    else:
                        yield self._piece(event)
        except Failed as error:
            yield _sent(failure(str(error), "server_error"))
            return
        if include_usage:
            counts = usage(event.read, event.written)
            yield _sent({**self._shared, "object": self._style.piece, "choices": [], "usage": counts})
        yield "data: [DONE]\n\n"

    async def _told(self, gone: Callable[[], Awaitable[bool]] | None = None) -> AsyncGenerator[Event]:
        """Events up to the end. Raises ``Failed``; whoever stops listening cancels the job."""
        ended, looked = False, time.monotonic()
        try:
            while not ended:
                if gone is not None and time.monotonic() - looked > _LOOK:
                    if await gone():
                        raise Failed("the client has gone away")
                    looked = time.monotonic()
                try:
                    event = await asyncio.wait_for(self._events.get(), _LOOK)
                except TimeoutError:
                    continue
                ended = event.kind in ("done", "failed")
                if event.kind == "failed":
                    raise Failed(event.text)
                yield event
        finally:
            if not ended:
                self._engine.cancel(self._job)

    def _piece(self, event: Event) -> str:
        finish = event.finish if event.kind == "done" else None
        choice = {"index": 0, "finish_reason": finish, **self._style.delta(event.text)}
        about = self._about(event)
        return _sent({**self._shared, "object": self._style.piece, "choices": [choice], "newllm": about})

    def _about(self, event: Event) -> dict[str, Any]:
        """What the page shows while text comes."""
        return {
            "tokens": event.tokens,
            "unread": event.to_read - event.read,
            "in_window": event.tokens if self._window is None else min(event.tokens, self._window),
            "state_bytes": self._engine.counts.state_bytes,
            "session": self._job.name,
        }


def _sent(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
