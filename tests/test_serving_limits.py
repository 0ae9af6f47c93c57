"""What ``newllm serve`` refuses, and how it says so."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import httpx2
import openai

from newllm import Session
from newllm.serving.app import Limits
from tests.serving_parts import GREEDY, KEY, NAME, Served, serving, session, user


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for most tests."""
    with serving(tmp_path_factory.mktemp("sessions")) as server:
        yield server


@pytest.mark.parametrize(
    ("route", "body", "status", "message"),
    [
        ("completions", {"model": "other"}, 404, "model must be 'tiny', got 'other'"),
        ("completions", {}, 400, "model: Field required"),
        ("completions", {"model": NAME, "prompt": ["a", "b"]}, 400, "prompt must be one text, got 2"),
        ("completions", {"model": NAME, "prompt": [5, 999]}, 400, "prompt must hold token ids from 0 to 263"),
        ("completions", {"model": NAME, "prompt": "a", "n": 2}, 400, "n is not offered, got 2: leave it out"),
        (
            "completions",
            {"model": NAME, "prompt": "a", "temperature": -1},
            400,
            "temperature: Input should be",
        ),
        ("completions", {"model": NAME, "prompt": "a", "stop": list("abcde")}, 400, "stop: List should have"),
        (
            "completions",
            {"model": NAME, "prompt": "a", "session": "../x"},
            400,
            "session must be 1 to 64 letters",
        ),
        ("chat/completions", {"model": NAME, "messages": []}, 400, "messages: List should have at least 1"),
        (
            "chat/completions",
            {"model": NAME, "messages": [{"role": "x", "content": ""}]},
            400,
            "messages.0.role",
        ),
        (
            "chat/completions",
            {"model": NAME, "messages": user("a"), "tools": [{}]},
            400,
            "tools is not offered",
        ),
        ("completions", {"model": NAME, "prompt": ""}, 400, "prompt must hold a token"),
        ("nothing", {}, 404, "Not Found"),
    ],
    ids=str,
)
def test_bad_requests_are_told_what_is_wrong(
    served: Served, route: str, body: dict[str, Any], status: int, message: str
) -> None:
    answer = httpx2.post(f"{served.url}/v1/{route}", json=body)
    assert answer.status_code == status
    assert answer.json()["error"]["message"].startswith(message)


def test_kept_session_that_has_read_nothing_is_as_none(served: Served) -> None:
    Session(served.model).save(served.engine.store.folder / "empty.safetensors")
    client = served.client()
    with pytest.raises(openai.BadRequestError, match="prompt must hold a token"):
        client.completions.create(prompt="", max_tokens=3, **GREEDY, **session("empty"))
    begun = client.completions.create(prompt="Hello", max_tokens=3, **GREEDY, **session("empty"))
    assert begun.model_extra["newllm"]["tokens"] == 8


def test_openai_s_client_raises_its_own_errors(served: Served) -> None:
    client = served.client()
    with pytest.raises(openai.BadRequestError, match="logprobs is not offered"):
        client.chat.completions.create(messages=user("Hi"), logprobs=True, **GREEDY)
    with pytest.raises(openai.NotFoundError, match="model must be 'tiny'"):
        client.completions.create(model="gpt", prompt="a")
    text = b"this is no JSON"
    headers = {"content-type": "application/json"}
    answer = httpx2.post(f"{client.base_url}completions", content=text, headers=headers)
    assert answer.status_code == 400


def test_only_those_with_the_key_are_answered(tmp_path: Path) -> None:
    with serving(tmp_path, limits=Limits(key=KEY)) as server:
        assert server.client().completions.create(prompt="a", max_tokens=1, **GREEDY).choices
        with pytest.raises(openai.AuthenticationError, match="a valid API key is needed"):
            server.client(api_key="another").completions.create(prompt="a", **GREEDY)
        for path, status in (
            ("/", 200),
            ("/health", 200),
            ("/metrics", 401),
            ("/v1/models", 401),
            ("/x", 401),
        ):
            assert httpx2.get(server.url + path).status_code == status


def test_bodies_are_bounded(tmp_path: Path) -> None:
    limits = Limits(body_bytes=1000, body_seconds=0.3)
    with serving(tmp_path, limits=limits) as server:
        url = f"{server.url}/v1/completions"
        headers = {"content-type": "application/json"}

        def endless() -> Iterator[bytes]:
            for _ in range(100):
                yield b" " * 100

        def slow() -> Iterator[bytes]:
            yield b"{"
            time.sleep(1)
            yield b"}"

        for content, status, message in (
            (b" " * 1001, 413, "the body must have at most 1000 bytes"),
            (endless(), 413, "the body must have at most 1000 bytes"),
            (slow(), 408, "the body must arrive within 0.3 seconds"),
        ):
            answer = httpx2.post(url, content=content, headers=headers)
            assert (answer.status_code, answer.json()["error"]["message"]) == (status, message)


def test_answers_are_bounded(tmp_path: Path) -> None:
    with serving(tmp_path, limits=Limits(max_tokens=7)) as server:
        for tokens in (None, 50):
            made = server.client().completions.create(prompt="a", max_tokens=tokens, **GREEDY)
            assert made.usage is not None and made.usage.completion_tokens == 7
    with serving(tmp_path, limits=Limits(max_tokens=10**6, seconds=0.5)) as server:
        made = server.client().completions.create(prompt="a", **GREEDY)
        assert made.usage is not None
        assert 0 < made.usage.completion_tokens < 10**6
        assert made.choices[0].finish_reason == "length"
    with serving(tmp_path, chunk=1, limits=Limits(seconds=1.5)) as server:
        book = {"prompt": "a" * 50_000, "max_tokens": 0}
        made = server.client().completions.create(**book, **GREEDY, **session("book"))
        assert made.usage is not None and made.model_extra is not None
        read, about = made.usage.prompt_tokens, made.model_extra["newllm"]
        assert 0 < read < 50_000
        assert (read, 50_000 - read) == (about["tokens"], about["unread"])
        assert server.engine.store.about("book").tokens == read


def test_too_many_are_sent_away(tmp_path: Path) -> None:
    with serving(tmp_path, slots=1, waiting=1, limits=Limits(max_tokens=10**6)) as server:
        first = server.client().completions.create(prompt="a", stream=True, **GREEDY, **session("one"))
        next(first)
        with pytest.raises(openai.ConflictError, match="session 'one' is answering another request"):
            server.client().completions.create(prompt="a", **GREEDY, **session("one"))
        waits = threading.Thread(
            target=lambda: server.client().completions.create(prompt="b", max_tokens=2, **GREEDY)
        )
        waits.start()
        while server.engine.counts.waiting == 0:
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError, match="1 requests wait already"):
            server.client().completions.create(prompt="a", **GREEDY, **session("two"))
        first.close()
        waits.join(30)
        server.idle()
        assert (
            server.client().completions.create(prompt="a", max_tokens=1, **GREEDY, **session("two")).choices
        )


def test_names_of_other_machines_are_refused(served: Served) -> None:
    answer = httpx2.get(f"{served.url}/v1/models", headers={"host": "elsewhere.example"})
    assert answer.status_code == 400
