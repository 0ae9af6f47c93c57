"""Calls in processes of their own: they answer when asked, and what fails fails alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from newllm.measuring.workers import Worker

HERE = os.getpid()


def fine(wait: Callable[[], None], factor: int) -> tuple[Any, Any]:
    wait()

    def fail() -> None:
        raise RuntimeError("no\n  luck")

    return {"pid": os.getpid()}, {"six": lambda: 6 * factor, "fail": fail, "die": lambda: os._exit(3)}


def refuses(wait: Callable[[], None]) -> tuple[Any, Any]:
    raise ValueError("will not")


def sleeps(wait: Callable[[], None]) -> tuple[Any, Any]:
    time.sleep(600)
    return None, {}


def soon() -> float:
    return time.monotonic() + 120


def met(worker: Worker) -> Worker:
    until = soon()
    while not worker.waits() and time.monotonic() < until:
        time.sleep(0.01)
    return worker


def test_each_failure_is_its_own() -> None:
    """At once: two that answer until they raise and die, one that refuses to begin, one that is silent."""
    raising, dying, refusing, silent = (
        Worker(fine, 2), Worker(fine, 3), Worker(refuses), Worker(sleeps)
    )  # fmt: skip
    # Whoever does not ask whether it waits is told no less.
    assert met(raising).error is None
    facts = [raising.prepared(soon()), dying.prepared(soon())]
    assert len({HERE, *(fact["pid"] for fact in facts)}) == 3
    assert [worker.call("six", soon()) for worker in (raising, dying, raising)] == [12, 18, 12]

    assert raising.call("fail", soon()) is None
    assert raising.error == "RuntimeError: no luck"
    assert (raising.call("six", soon()), dying.call("six", soon())) == (None, 18)
    assert dying.call("die", soon()) is None
    assert dying.error == "its process ended with code 3"

    assert met(refusing).error == "ValueError: will not"
    assert refusing.prepared(soon()) is None
    assert not silent.waits()
    assert silent.prepared(time.monotonic() + 0.1) is None
    assert (silent.error, silent.waits()) == ("no answer in time", True)


def test_end_is_no_failure_without_a_reason() -> None:
    worker = Worker(sleeps)
    process = worker._process
    worker.end()
    assert (worker.error, process.is_alive()) == (None, False)
