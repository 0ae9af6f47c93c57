"""Runs of several phases that can be cut off anywhere and go on where they were.

A run is a list of stages. Finished stages leave their result, the one at hand the state of its loop.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from newllm.files import reading, writing
from newllm.training.checkpoints import Checkpoints

_FILE = "state.pt"


class Stopped(Exception):
    """A signal asked for the end, and everything is saved; its number is the argument."""


class PhaseCheckpoints:
    """What finished stages left and where the present one is, in a folder of whole checkpoints.

    A loop calls :meth:`reached` after every round. The state goes to the disk at most every ``seconds``, and
    at once when a signal asked for the end, which is then raised as :class:`Stopped`.

    Args:
        folder: of the checkpoints.
        seconds: between them.
        resume: take up the newest intact one; otherwise all that lie there are removed.
    """

    def __init__(self, folder: Path, *, seconds: float = 60.0, resume: bool = False) -> None:
        self.checkpoints, self.seconds = Checkpoints(folder, keep=2), seconds
        self.asked: int | None = None
        self.complaints: list[str] = []
        self._results: dict[str, Any] = {}
        self._stage, self._state, self._round = "", None, 0
        self._saved = time.monotonic()
        if not resume:
            self.checkpoints.clear()
            return
        newest, self.complaints = self.checkpoints.newest()
        if newest is not None:
            with reading("the checkpoint", newest):
                held = torch.load(newest / _FILE, map_location="cpu", weights_only=True)
                self._results, self._stage, self._state, self._round = (
                    held[name] for name in ("results", "stage", "state", "round")
                )

    @property
    def rounds(self) -> int:
        """Rounds of all stages so far."""
        return self._round

    def result(self, stage: str) -> Any:
        """What ``stage`` left, None if it has not been finished."""
        return self._results.get(stage)

    def finish(self, stage: str, result: Any) -> None:
        """Keep the ``result`` of a stage: tensors and plain values."""
        self._results[stage], self._state = result, None

    def begin(self, stage: str) -> Any:
        """Enter ``stage``: the state of its loop where it was cut off, else None."""
        state = self._state if self._stage == stage else None
        self._stage, self._state = stage, None
        return state

    def reached(self, state: Any) -> None:
        """A round is over. ``state`` makes what the loop needs to go on: tensors and plain values."""
        self._round += 1
        if self.asked is None and time.monotonic() - self._saved < self.seconds:
            return
        self.save(state())
        if self.asked is not None:
            raise Stopped(self.asked)

    def save(self, state: Any) -> None:
        """Write everything down."""
        self.checkpoints.clear_staging()
        folder = self.checkpoints.staging / f"checkpoint-{self._round}"
        with writing(self.checkpoints.path(self._round), "the checkpoint"):
            folder.mkdir(parents=True)
            held = {"results": self._results, "stage": self._stage, "state": state, "round": self._round}
            torch.save(held, folder / _FILE)
            self.checkpoints.commit(self._round)
        self._saved = time.monotonic()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Let the first Ctrl-C or SIGTERM wait for the end of the round; a second one acts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {}

        def ask(number: int, _: Any) -> None:
            self.asked = number
            signal.signal(number, before[number])

        before |= {one: signal.signal(one, ask) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
