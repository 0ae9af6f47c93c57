"""A server whose device or disk fails: every request is told its end, and the others go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import torch
from safetensors import SafetensorError

from newllm import Session
from newllm.models.session_batch import SessionBatch
from newllm.serving import engine as serving_engine
from newllm.serving.engine import Engine
from newllm.serving.jobs import Busy, Event, Job
from newllm.serving.store import SessionStore
from tests.serving_parts import talker


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """Two slots; stopped at the end."""
    model, tokenizer = talker()
    made = Engine(model, tokenizer, SessionStore(tmp_path, model, most=9), slots=2, save_every=4)
    made.start()
    yield made
    made.stop()


class Asked:
    """A request to the engine and what it is told."""

    def __init__(self, engine: Engine, tokens: int, *, name: str | None = None) -> None:
        self._told = Queue[Event]()
        start = None if name is None else engine.claim(name)
        ids = torch.tensor(list(b"Hello"))
        engine.submit(Job(ids, self._told.put, tokens, start=start, name=name))

    def until(self, *kinds: str) -> Event:
        """The next event of one of ``kinds``."""
        while (event := self._told.get(timeout=30)).kind not in kinds:
            pass
        return event

    def end(self) -> Event:
        """How it ends."""
        return self.until("done", "failed")

    @property
    def silent(self) -> bool:
        """Whether it was told no more than what was asked for here."""
        return self._told.empty()


def failing(function: Any, error: Exception, *, call: int = 0) -> Callable[..., Any]:
    """``function``, whose ``call`` (from 0) raises ``error``."""
    calls = iter(range(10**9))

    def called(*given: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise error
        return function(*given, **options)

    return called


@pytest.mark.parametrize(
    ("owner", "name", "kept"),
    [
        (serving_engine, "Session", 0),
        (Session, "feed", 0),
        (Session, "snapshot", 0),
        (SessionBatch, "admit", 5),
        (SessionBatch, "snapshot", 5),
    ],
    ids=str,
)
def test_what_fails_for_one_request_ends_it_alone(
    engine: Engine, owner: Any, name: str, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its session goes on from the tokens that were kept on the way."""
    mate = Asked(engine, 10**6)
    mate.until("text")
    monkeypatch.setattr(owner, name, failing(getattr(owner, name), torch.OutOfMemoryError("no memory")))
    failed = Asked(engine, 3, name="one").end()
    assert (failed.kind, failed.text) == ("failed", "no memory")
    mate.until("text")
    again = Asked(engine, 3, name="one").end()
    assert (again.kind, again.tokens) == ("done", kept + 8)
    assert engine.alive


def test_save_on_the_way_may_fail(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch.OutOfMemoryError("no memory")
    monkeypatch.setattr(SessionBatch, "snapshot", failing(SessionBatch.snapshot, error))
    assert Asked(engine, 6, name="one").end().kind == "done"
    assert engine.store.about("one").tokens == 10


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("name", "call", "error"),
    [
        ("admit", 1, AssertionError("a bug")),
        ("step", 5, AssertionError("a bug")),
        ("step", 5, RuntimeError("no device")),
        ("drop", 0, RuntimeError("no device")),
    ],
    ids=str,
)
def test_whatever_ends_the_engine_ends_every_request(
    engine: Engine, name: str, call: int, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four, two speak and two wait: none of them waits for ever, and no session stays in use."""
    monkeypatch.setattr(SessionBatch, name, failing(getattr(SessionBatch, name), error, call=call))
    with engine._work:
        asked = [Asked(engine, 20 + index, name=f"a-{index}") for index in range(4)]
    ends = [each.end() for each in asked]
    assert {end.text for end in ends if end.kind == "failed"} == {"the server has stopped"}
    engine.stop()
    assert all(each.silent for each in asked)
    for index in range(4):
        engine.claim(f"a-{index}")
    with pytest.raises(Busy):
        Asked(engine, 1)


@pytest.mark.parametrize("error", [SafetensorError("disk full"), RuntimeError("no device")], ids=type)
def test_session_that_cannot_be_kept_is_told(
    engine: Engine, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*_: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(engine.store, "save", save)
        failed = Asked(engine, 3, name="one").end()
    assert failed.kind == "failed"
    assert failed.text.startswith("the session could not be kept")
    assert Asked(engine, 3, name="one").end().kind == "done"
