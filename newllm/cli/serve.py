"""``newllm serve``: a model over HTTP, as OpenAI's clients ask."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from newllm.cli.loading import CompileOption, Dtype

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_NEEDED = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}


@dataclass
class Options:
    """Serve completions and chats, many at a time, each conversation a state of constant size.

    Args:
        model: folder or hub id of a Senri, Context LM or Context-KV model.
        host: address to listen on; other than this machine's own only with an API key.
        port: port to listen on.
        name: name that requests give (null: the folder's).
        sessions: folder where named sessions are kept.
        max_sessions: sessions kept at most.
        save_every: tokens of an answer after which its session is saved on the way.
        slots: requests that are answered side by side.
        waiting: requests that may wait for that; more are refused.
        chunk: tokens of a prompt that are read between two steps of the answers.
        max_tokens: tokens of an answer at most.
        seconds: after which an answer is ended.
        body_bytes: bytes of a request at most.
        api_key_file: file whose first line requests must give as their API key.
        temperature: where a request does not say; 0 always takes the likeliest token.
        compile: how a step is run; auto is a CUDA graph on a GPU and plain on a CPU, full compiles it.
        dtype: dtype of the weights.
        device: a device as PyTorch names it (auto: the first accelerator, else the CPU).
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    sessions: Path = Path("runs/serve/sessions")
    max_sessions: int = 1000
    save_every: int = 64
    slots: int = 16
    waiting: int = 256
    chunk: int = 1024
    max_tokens: int = 1024
    seconds: float = 600.0
    body_bytes: int = 8 * 2**20
    api_key_file: Path | None = None
    temperature: float = 1.0
    compile: CompileOption = "auto"
    dtype: Dtype = "auto"
    device: str = "auto"


def run(options: Options) -> None:
    """Serve until interrupted; what was begun is kept then."""
    key = _key(options.api_key_file)
    loopback = options.host in _LOOPBACK
    if not loopback and key is None:
        raise ValueError(
            f"host {options.host} can be reached by others: give --api-key-file, or listen on 127.0.0.1"
        )
    _check_installed()
    import uvicorn

    from newllm.cli.loading import load_streaming, step_mode
    from newllm.models.sampling import Sampling
    from newllm.serving.app import Limits, make_app
    from newllm.serving.engine import Engine
    from newllm.serving.store import SessionStore

    model, tokenizer = load_streaming(options.model, dtype=options.dtype, device=options.device)
    engine = Engine(
        model,
        tokenizer,
        SessionStore(options.sessions, model, most=options.max_sessions),
        slots=options.slots,
        waiting=options.waiting,
        chunk=options.chunk,
        save_every=options.save_every,
        compile=step_mode(options.compile, model),
    )
    limits = Limits(
        body_bytes=options.body_bytes,
        seconds=options.seconds,
        max_tokens=options.max_tokens,
        sampling=Sampling(temperature=options.temperature),
        key=key,
        loopback=loopback,
    )
    name = options.name or Path(options.model).name
    print(f"{name} on http://{options.host}:{options.port}/", file=sys.stderr)
    uvicorn.run(
        make_app(engine, name, limits),
        host=options.host,
        port=options.port,
        log_level="warning",
        limit_concurrency=options.slots + options.waiting + 64,
        timeout_graceful_shutdown=10,
        server_header=False,
    )


def _key(path: Path | None) -> str | None:
    if path is None:
        return None
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines or not lines[0].strip():
        raise ValueError(f"api_key_file {path} must hold a key in its first line, got none")
    return lines[0].strip()


def _check_installed() -> None:
    from newllm.backend import installed

    missing = [package for module, package in _NEEDED.items() if not installed(module)]
    if missing:
        raise ValueError(f"serving needs {', '.join(missing)}: pip install 'newllm[serve]'")
