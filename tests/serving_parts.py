"""A server of a tiny model on this machine, for the tests of serving."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import uvicorn
from openai import OpenAI

from newllm.data.tokenizer import byte_tokenizer
from newllm.models.senri import SenriForCausalLM
from newllm.serving.app import Limits, make_app
from newllm.serving.engine import Engine
from newllm.serving.store import SessionStore
from tests.tiny_models import tiny_senri

NAME = "tiny"
KEY = "a key"
GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0}


def user(text: str) -> list[Any]:
    """One message."""
    return [{"role": "user", "content": text}]


def session(name: str) -> dict[str, Any]:
    """What the client is told to send beyond OpenAI's interface."""
    return {"extra_body": {"session": name}}


class Served(NamedTuple):
    """A running server and what it serves."""

    url: str
    engine: Engine
    model: SenriForCausalLM
    tokenizer: Any

    def client(self, **options: Any) -> OpenAI:
        """OpenAI's own client, which asks once."""
        return OpenAI(base_url=f"{self.url}/v1", **{"api_key": KEY, "max_retries": 0, **options})

    def idle(self) -> None:
        """Wait until nobody speaks and nothing is being saved."""
        end = time.monotonic() + 30
        while self.engine._speaking or self.engine._in_use or self.engine._reading:
            assert time.monotonic() < end, "the server is still busy"
            time.sleep(0.01)


def talker(**options: Any) -> tuple[SenriForCausalLM, Any]:
    """A tiny model in float64 that never ends by itself, and its tokenizer of bytes."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    return tiny_senri(**{"vocab_size": len(tokenizer), **options}).double(), tokenizer


@contextmanager
def serving(
    folder: Path, *, limits: Limits | None = None, model: Any = None, most: int = 100, **options: Any
) -> Iterator[Served]:
    """A server in a thread of this process."""
    made, tokenizer = talker() if model is None else model
    engine = Engine(made, tokenizer, SessionStore(folder, made, most=most), **options)
    app = make_app(engine, NAME, limits or Limits())
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive() and time.monotonic() < end, "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Served(f"http://127.0.0.1:{port}", engine, made, tokenizer)
    finally:
        server.should_exit = True
        thread.join(30)
