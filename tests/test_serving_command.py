"""``newllm serve`` as a process: killed in mid-stream, it goes on from the last saved session."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import httpx2
from openai import OpenAI

from newllm import Session
from newllm.cli import main
from newllm.models.files import save_model
from tests.processes import command
from tests.serving_parts import talker


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk."""
    model, tokenizer = talker()
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model(model.float(), tokenizer, path)
    return path


@contextmanager
def process(folder: Path, sessions: Path, *options: str) -> Iterator[tuple[BaseProcess, OpenAI]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", str(folder), "--port", str(port), "--sessions", str(sessions), *options]
    (server,) = command(words, 1, folder.parent).processes
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(server, url)
        yield server, OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    finally:
        server.kill()
        server.join()


def wait_for(server: BaseProcess, url: str) -> None:
    end = time.monotonic() + 120
    while True:
        assert server.is_alive() and time.monotonic() < end, "the server did not start"
        try:
            if httpx2.get(f"{url}/health").status_code == 200:
                return
        except httpx2.TransportError:
            time.sleep(0.1)


def test_killed_server_goes_on_from_the_last_saved_session(folder: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"model": "tiny", "temperature": 0, "extra_body": {"session": "one"}}
    options = ("--save-every", "5", "--max-tokens", "100000")
    with process(folder, tmp_path, *options) as (server, client):
        stream = client.completions.create(prompt="Hello there", stream=True, max_tokens=100_000, **asked)
        heard = ""
        for piece in stream:
            heard += piece.choices[0].text
            if piece.model_extra["newllm"]["tokens"] > 100:
                break
        server.kill()
        server.join(30)
        assert server.exitcode == -signal.SIGKILL
    names = [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert names == ["one.safetensors"]
    from newllm.models.files import load_senri, load_tokenizer

    model, tokenizer = load_senri(folder), load_tokenizer(folder)
    kept = Session(model, tokenizer)
    kept.load(tmp_path / "one.safetensors")
    # A few saves may have been on their way.
    assert 100 - 25 < kept.tokens[0] <= 100_000
    assert (kept.tokens[0] - 11) % 5 == 0
    expected = kept.generate(max_new_tokens=9)
    with process(folder, tmp_path) as (_, client):
        made = client.completions.create(prompt="", max_tokens=9, **asked)
        assert made.choices[0].text == expected
    whole = Session(model, tokenizer).generate("Hello there", max_new_tokens=kept.tokens[0] + 9)
    assert isinstance(whole, str) and isinstance(expected, str)
    assert whole.startswith(heard[:60]) and expected in whole


def test_interrupted_server_keeps_what_was_begun(folder: Path, tmp_path: Path) -> None:
    with process(folder, tmp_path, "--max-tokens", "100000") as (server, client):
        asked: dict[str, Any] = {"model": "tiny", "temperature": 0, "extra_body": {"session": "one"}}
        stream = client.completions.create(prompt="Hello", stream=True, max_tokens=100_000, **asked)
        next(stream)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGINT)
        server.join(60)
        assert not server.is_alive()
    assert [path.name for path in tmp_path.iterdir()] == ["one.safetensors"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "host 0.0.0.0 can be reached by others: give --api-key-file"),
        (["--api-key-file", "EMPTY"], "must hold a key in its first line, got none"),
        (["--device", "tpu"], "device must be auto or one of cpu"),
        (["--compile", "graph"], "compile='graph' needs a CUDA device, got a model on cpu"),
        (["--slots", "0"], "slots must be at least 1, got 0"),
        (["--chunk", "0"], "chunk must be at least 1, got 0"),
    ],
    ids=str,
)
def test_options_that_cannot_be(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    (tmp_path / "EMPTY").write_text("\n")
    words = [str(tmp_path / word) if word == "EMPTY" else word for word in options]
    assert main(["serve", str(folder), "--sessions", str(tmp_path / "sessions"), *words]) == 2
    assert message in capsys.readouterr().err


def test_missing_packages_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from newllm import backend

    monkeypatch.setattr(backend, "installed", lambda module: module == "fastapi")
    assert main(["serve", str(folder)]) == 2
    assert "serving needs uvicorn, prometheus-client: pip install 'newllm[serve]'" in capsys.readouterr().err
