"""The OpenAI interface over an engine: routes, errors, the chat page."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from newllm.models.sampling import Sampling
from newllm.serving.answers import CHAT, COMPLETION, Answer, Failed, Style
from newllm.serving.engine import Engine
from newllm.serving.guard import Guard
from newllm.serving.jobs import Busy, InUse
from newllm.serving.metrics import Counting, Metrics
from newllm.serving.prepare import prepared
from newllm.serving.protocol import ChatRequest, CompletionRequest, Fork, failure

_PAGE = Path(__file__).with_name("page.html")
_LOOPBACK = ["127.0.0.1", "localhost", "[::1]"]


@dataclass(frozen=True)
class Limits:
    """What is allowed.

    ``body_bytes`` of a request that must arrive within ``body_seconds``; ``seconds`` until an answer is
    ended; ``max_tokens`` of an answer, also where a request asks for more. ``sampling`` where none is asked.
    ``key`` None lets anyone ask; ``loopback`` refuses names of the server that are not this machine's.
    """

    body_bytes: int = 8 * 2**20
    body_seconds: float = 60.0
    seconds: float = 600.0
    max_tokens: int = 1024
    sampling: Sampling = field(default_factory=Sampling)
    key: str | None = None
    loopback: bool = True


def make_app(engine: Engine, name: str, limits: Limits) -> FastAPI:
    """The application that serves ``engine``'s model as ``name``; it starts and stops the engine."""
    metrics = Metrics(engine)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.stop)

    app = FastAPI(title="newllm", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    _guard(app, limits)
    app.add_middleware(Counting, metrics=metrics)
    _explain_errors(app)
    _add_answers(app, engine, name, limits)
    _add_sessions(app, engine)
    _add_about(app, engine, name, metrics)
    return app


def _guard(app: FastAPI, limits: Limits) -> None:
    app.add_middleware(Guard, key=limits.key, most=limits.body_bytes, seconds=limits.body_seconds)
    if limits.loopback:
        # A web page elsewhere may let its own name point to this machine.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=_LOOPBACK)


def _explain_errors(app: FastAPI) -> None:
    """Errors as the interface has them: what is wrong with a request in one sentence."""

    def answer(status: int, kind: str) -> Callable[[HttpRequest, Any], Awaitable[Response]]:
        async def explained(_: HttpRequest, error: Any) -> Response:
            param = getattr(error, "param", None)
            return JSONResponse(failure(str(error), kind, param), status, getattr(error, "headers", None))

        return explained

    async def invalid(_: HttpRequest, error: Any) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
        return JSONResponse(failure(f"{where}: {first['msg']}", "invalid_request_error", where), 400)

    async def http(_: HttpRequest, error: Any) -> Response:
        return JSONResponse(failure(str(error.detail), "invalid_request_error"), error.status_code)

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ValueError, answer(400, "invalid_request_error"))
    app.add_exception_handler(InUse, answer(409, "conflict_error"))
    app.add_exception_handler(Busy, answer(429, "rate_limit_error"))
    app.add_exception_handler(Failed, answer(500, "server_error"))


def _add_answers(app: FastAPI, engine: Engine, name: str, limits: Limits) -> None:
    async def answered(asked: CompletionRequest | ChatRequest, http: HttpRequest, style: Style) -> Response:
        if asked.model != name:
            raise HTTPException(404, f"model must be {name!r}, got {asked.model!r}")
        asked.check()
        deadline = time.monotonic() + limits.seconds
        job = await asyncio.to_thread(prepared, engine, asked, limits.sampling, limits.max_tokens, deadline)
        try:
            answer = Answer(engine, job, style, name, window_of(engine.model))
        except Busy:
            engine.release(job.name)
            raise
        if not asked.stream:
            return JSONResponse(await answer.whole(http.is_disconnected))
        counted = asked.stream_options is not None and asked.stream_options.include_usage
        return StreamingResponse(answer.stream(include_usage=counted), media_type="text/event-stream")

    @app.post("/v1/completions")
    async def complete(asked: CompletionRequest, http: HttpRequest) -> Response:
        return await answered(asked, http, COMPLETION)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, http: HttpRequest) -> Response:
        return await answered(asked, http, CHAT)


def _add_sessions(app: FastAPI, engine: Engine) -> None:
    store = engine.store

    def existing(error: KeyError) -> HTTPException:
        return HTTPException(404, f"there is no session {error.args[0]!r}")

    @app.get("/v1/sessions")
    def sessions() -> dict[str, Any]:
        return {"object": "list", "data": [store.about(each)._asdict() for each in store.names()]}

    @app.get("/v1/sessions/{session}")
    def session(session: str) -> dict[str, Any]:
        try:
            return store.about(session)._asdict()
        except KeyError as error:
            raise existing(error) from error

    @app.delete("/v1/sessions/{session}")
    def delete(session: str) -> dict[str, Any]:
        with engine.holding(session):
            try:
                store.delete(session)
            except KeyError as error:
                raise existing(error) from error
        return {"id": session, "object": "session.deleted", "deleted": True}

    @app.post("/v1/sessions/{session}/fork")
    def fork(session: str, asked: Fork) -> dict[str, Any]:
        with engine.holding(asked.to):
            try:
                store.copy(session, asked.to)
            except KeyError as error:
                raise existing(error) from error
            return store.about(asked.to)._asdict()


def _add_about(app: FastAPI, engine: Engine, name: str, metrics: Metrics) -> None:
    created = int(time.time())

    @app.get("/")
    def page() -> Response:
        return FileResponse(_PAGE, media_type="text/html")

    @app.get("/health")
    def health() -> Response:
        return JSONResponse({"status": "ok" if engine.alive else "stopped"}, 200 if engine.alive else 503)

    @app.get("/metrics")
    def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        about = {"id": name, "object": "model", "created": created, "owned_by": "newllm"}
        return {"object": "list", "data": [{**about, "newllm": described(engine.model)}]}


def window_of(model: Any) -> int | None:
    """Tokens of the model's window; None without one."""
    window: int | None = getattr(model.config, "sliding_window", None)
    return window


def described(model: Any) -> dict[str, Any]:
    """What the page shows of a model: window, segment, and per memory layer how far its gates are open."""
    gates = {}
    for index, layer in enumerate(getattr(model.model, "layers", [])):
        gate = layer.self_attn.memory_gate
        if gate is not None:
            weight = gate.weight.detach().float().cpu()
            gates[index] = (weight.tanh() if gate.kind == "tanh" else weight.sigmoid()).tolist()
    segment = getattr(model.config, "segment", None)
    return {"window": window_of(model), "segment": segment, "gates": gates}
