"""The thread that owns the model: reads prompts in chunks, lets all sessions speak, keeps them in files."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from newllm.models.sampling import ends_of
from newllm.models.session import Session
from newllm.models.session_batch import SessionBatch
from newllm.models.streams import Compile, Model, Snapshot
from newllm.serving.jobs import Busy, Counts, Event, Finish, InUse, Job
from newllm.serving.store import SessionStore
from newllm.serving.text import TextStream


@dataclass
class _Reading:
    job: Job
    session: Session
    read: int = 0


@dataclass
class _Speaking:
    job: Job
    text: TextStream
    before: int
    written: int = 0


class Engine:
    """Answers jobs side by side.

    Args:
        model, tokenizer: what answers.
        store: where named sessions are kept.
        slots: jobs that speak at a time.
        waiting: jobs that may wait for a slot.
        chunk: tokens that are read between two steps of those who speak.
        save_every: a named session that speaks is saved after so many tokens, and at its end.
        compile: how a step is run, see ``Streams``.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Any,
        store: SessionStore,
        *,
        slots: int = 8,
        waiting: int = 64,
        chunk: int = 1024,
        save_every: int = 64,
        compile: Compile = "none",
    ) -> None:
        for name, value in (("waiting", waiting), ("chunk", chunk), ("save_every", save_every)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.model, self.tokenizer, self.store = model, tokenizer, store
        self.counts = Counts()
        self._chunk, self._most_waiting, self._save_every = chunk, waiting, save_every
        self._batch = SessionBatch(model, slots, compile=compile)
        self._ends = set(ends_of(model).tolist())
        # Submitted and neither ended nor handed to the writer, wherever they are.
        self._jobs: set[Job] = set()
        self._waiting: deque[Job] = deque()
        self._reading: _Reading | None = None
        self._ready: deque[tuple[Job, Snapshot]] = deque()
        self._speaking: dict[int, _Speaking] = {}
        self._in_use: set[str] = set()
        self._work = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="newllm-engine", daemon=True)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="newllm-writer")

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """End all jobs where they are, and keep their sessions."""
        with self._work:
            self._stopping = True
            self._work.notify()
        self._thread.join()
        self._writer.shutdown()

    @property
    def alive(self) -> bool:
        """Whether jobs are being worked on."""
        return self._thread.is_alive()

    def claim(self, name: str) -> Snapshot | None:
        """The kept session ``name``, from now on this request's alone; ``release`` or a job gives it back.

        Raises ``InUse``, and ``ValueError`` as the store's ``check`` and ``load``.
        """
        self._hold(name)
        try:
            self.store.check(name)
            return self.store.load(name)
        except BaseException:
            self.release(name)
            raise

    def release(self, name: str | None) -> None:
        """Let others have the session again."""
        with self._work:
            self._in_use.discard(name or "")

    @contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """Have the session to oneself. Raises ``InUse``."""
        self._hold(name)
        try:
            yield
        finally:
            self.release(name)

    def _hold(self, name: str) -> None:
        with self._work:
            if name in self._in_use:
                raise InUse(f"session {name!r} is answering another request")
            self._in_use.add(name)

    def submit(self, job: Job) -> None:
        """Answer ``job`` when its turn comes. Raises ``Busy``; the job then keeps its claim."""
        with self._work:
            if self._stopping or not self.alive or len(self._waiting) >= self._most_waiting:
                raise Busy(f"{len(self._waiting)} requests wait already")
            self._jobs.add(job)
            self._waiting.append(job)
            self.counts.waiting = len(self._waiting)
            self._work.notify()

    def cancel(self, job: Job) -> None:
        """End ``job`` where it is; its session is kept."""
        with self._work:
            job.cancelled = True
            self._work.notify()

    # The engine's thread

    def _run(self) -> None:
        try:
            while self._next():
                self._read()
                self._admit()
                self._step()
        finally:
            self._end_all()

    def _next(self) -> bool:
        """Wait for work; False when there will be none."""
        with self._work:
            while not (self._stopping or self._waiting or self._reading or self._ready or self._speaking):
                self._work.wait()
            if self._stopping:
                return False
            if self._reading is None and not self._ready and self._waiting and self._batch.free:
                job = self._waiting.popleft()
                with self._alone(job):
                    self._reading = _Reading(job, Session(self.model, chunk=self._chunk))
            self.counts.waiting = len(self._waiting)
        if self._reading and self._reading.read == 0 and self._over(self._reading.job):
            self._failed(self._reading.job, "the time was over before its turn came")
            self._reading = None
        return True

    def _read(self) -> None:
        """One chunk of the prompt whose turn it is."""
        reading = self._reading
        if reading is None:
            return
        job, session, over = reading.job, reading.session, True
        with self._alone(job):
            if reading.read == 0 and job.start is not None:
                session.restore(job.start)
                job.start = None
            part = job.ids[reading.read : reading.read + self._chunk]
            session.feed(part)
            reading.read += len(part)
            self.counts.tokens_read += len(part)
            told = self._told("reading", reading)
            job.tell(told)
            over = told.read == told.to_read or self._over(job)
            if over:
                self._after_reading(job, session.snapshot(), told)
        if over:
            self._reading = None

    def _after_reading(self, job: Job, snapshot: Snapshot, told: Event) -> None:
        if told.read == told.to_read and job.max_tokens > 0 and not self._over(job):
            self._keep(job, snapshot)
            self._ready.append((job, snapshot))
        else:
            self._end(job, replace(told, kind="done", finish="length"), snapshot)

    def _admit(self) -> None:
        while self._ready and self._batch.free:
            job, snapshot = self._ready.popleft()
            with self._alone(job):
                speaker = _Speaking(job, TextStream(self.tokenizer, job.stops), int(_tokens(snapshot)))
                self._speaking[self._batch.admit(snapshot, job.sampling, job.seed)] = speaker
            self.counts.state_bytes = self._batch.state_bytes

    def _step(self) -> None:
        """One token of everyone who speaks."""
        for ticket, speaker in list(self._speaking.items()):
            if self._over(speaker.job):
                self._leave(ticket, "length")
        last = {ticket for ticket, one in self._speaking.items() if one.written + 1 >= one.job.max_tokens}
        heard = self._batch.step(last)
        self.counts.steps += bool(heard)
        self.counts.tokens_written += len(heard)
        for ticket, token in heard.items():
            self._hear(ticket, token, ticket in last)
        self.counts.speaking = len(self._speaking)

    def _hear(self, ticket: int, token: int, last: bool) -> None:
        speaker = self._speaking[ticket]
        speaker.written += 1
        if token in self._ends:
            self._leave(ticket, "stop")
            return
        if text := speaker.text.add(token):
            self._tell(speaker, "text", text)
        if speaker.text.stopped or last:
            self._leave(ticket, "stop" if speaker.text.stopped else "length")
        elif speaker.job.name is not None and speaker.written % self._save_every == 0:
            # As with what cannot be written: the end will say.
            with suppress(RuntimeError):
                self._keep(speaker.job, self._batch.snapshot(ticket))

    def _leave(self, ticket: int, finish: Finish) -> None:
        speaker = self._speaking.pop(ticket)
        with self._alone(speaker.job):
            if text := speaker.text.finish():
                self._tell(speaker, "text", text)
            snapshot = self._batch.snapshot(ticket)
            self._end(speaker.job, self._event(speaker, "done", finish=finish), snapshot)
        self._batch.drop(ticket)

    def _over(self, job: Job) -> bool:
        return job.cancelled or time.monotonic() > job.deadline

    def _end_all(self) -> None:
        """Nobody waits for ever, whatever ended the thread."""
        try:
            for ticket in list(self._speaking):
                # What ended the thread may be that the device does not answer any more.
                with suppress(RuntimeError):
                    self._leave(ticket, "length")
        finally:
            with self._work:
                self._stopping = True
                self._waiting.clear()
                left = list(self._jobs)
            for job in left:
                self._failed(job, "the server has stopped")

    # Endings and files

    def _end(self, job: Job, event: Event, snapshot: Snapshot | None = None) -> None:
        """Tell the end once the session is safe: kept as ``snapshot``, or as it was kept on the way."""

        def close() -> None:
            said = Event("failed", text="the session could not be kept")
            try:
                if job.name is not None and snapshot is not None and snapshot.hidden is not None:
                    self.store.save(job.name, snapshot)
                said = event
            except (OSError, ValueError, RuntimeError) as error:
                said = replace(said, text=f"{said.text}: {error}")
            finally:
                self.release(job.name)
                job.tell(said)

        if job.name is None:
            close()
        else:
            self._writer.submit(close)
        with self._work:
            self._jobs.discard(job)

    def _keep(self, job: Job, snapshot: Snapshot) -> None:
        """Save on the way; the end will say whether saving works."""
        name = job.name
        if name is not None:
            self._writer.submit(self.store.save, name, snapshot)

    @contextmanager
    def _alone(self, job: Job) -> Iterator[None]:
        """What cannot be done for ``job`` ends it, and nobody else."""
        try:
            yield
        except (ValueError, RuntimeError) as error:
            self._failed(job, str(error))

    def _failed(self, job: Job, why: str) -> None:
        self._end(job, Event("failed", text=why))

    def _tell(self, speaker: _Speaking, kind: Literal["text"], text: str) -> None:
        speaker.job.tell(self._event(speaker, kind, text=text))

    def _event(self, speaker: _Speaking, kind: Literal["text", "done"], **more: Any) -> Event:
        read = len(speaker.job.ids)
        tokens = speaker.before + speaker.written
        return Event(kind, read=read, to_read=read, written=speaker.written, tokens=tokens, **more)

    def _told(self, kind: Literal["reading"], reading: _Reading) -> Event:
        return Event(kind, read=reading.read, to_read=len(reading.job.ids), tokens=reading.session.tokens[0])


def _tokens(snapshot: Snapshot) -> torch.Tensor:
    state = snapshot.states[0]
    assert state is not None
    return state.position[0]
