"""Calls that live in processes of their own: prepared side by side, run in turns, each failure its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from newllm.measuring.entries import Attempt

Wait = Callable[[], None]
Prepare = Callable[..., tuple[Any, Mapping[str, Callable[[], Any]]]]
# Seconds for a process to end by itself.
_PATIENCE = 2.0


class Worker:
    """A process that runs ``prepare(wait, *arguments)`` and then, whenever asked, one of the calls it made.

    ``prepare`` is a function of a module. It calls ``wait`` once before it needs the device for itself, and
    returns facts and calls by name, whose results can be pickled. The first failure ends the worker, be it
    an exception, the end of its process, or silence: ``error`` says which, and all later answers are None.
    """

    def __init__(self, prepare: Prepare, *arguments: Any) -> None:
        self.error: str | None = None
        self._waits = False
        # A process that has used CUDA must not be forked.
        context = get_context("spawn")
        self._pipe, end = context.Pipe()
        self._process = context.Process(target=_serve, args=(end, prepare, arguments), daemon=True)
        self._process.start()
        # With the other end in one process alone, its death is heard here.
        end.close()

    def waits(self) -> bool:
        """Whether it has come to its ``wait``, or has failed."""
        if not self._waits and self.error is None and self._pipe.poll():
            self._answer(0)
            self._waits = True
        return self._waits or self.error is not None

    def prepared(self, until: float) -> Any:
        """Let it go on as soon as it waits; its facts, or None where they do not come ``until`` then."""
        if not self._waits and self.error is None:
            self._answer(until)
            self._waits = True
        return self._ask("", until)

    def call(self, name: str, until: float) -> Any:
        """What the call ``name`` gave; ``until`` is a time of ``time.monotonic``."""
        return self._ask(name, until)

    def end(self, why: str | None = None, patience: float = _PATIENCE) -> None:
        """End the process, by force after so many seconds; as a failure if there is a ``why``."""
        self.error = self.error or why
        # Whatever it says or waits for next finds nobody, which ends it unless it is busy.
        self._pipe.close()
        self._process.join(patience)
        self._process.kill()
        self._process.join()

    def _ask(self, what: str, until: float) -> Any:
        if self.error is not None:
            return None
        # Of one that is gone, the last words may still be there to read.
        with suppress(OSError):
            self._pipe.send(what)
        return self._answer(until)

    def _answer(self, until: float) -> Any:
        try:
            if not self._pipe.poll(max(0.0, until - time.monotonic())):
                return self.end("no answer in time", patience=0)
            error, answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(1)
            return self.end(f"its process ended with code {self._process.exitcode}")
        if error is not None:
            self.end(error)
        return answer


def _serve(pipe: Connection, prepare: Prepare, arguments: tuple[Any, ...]) -> None:
    """The life of a worker's process."""

    def wait() -> None:
        pipe.send((None, None))
        pipe.recv()

    with Attempt() as attempt:
        facts, calls = prepare(wait, *arguments)
        pipe.send((None, facts))
        while True:
            pipe.send((None, calls[pipe.recv()]()))
    with suppress(OSError):
        pipe.send((attempt.error, None))
