"""What is counted, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from newllm.serving.engine import Engine

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Field of the engine's counts -> whether it only grows, and what it is.
_COUNTS = {
    "tokens_read": (True, "Prompt tokens read"),
    "tokens_written": (True, "Tokens written"),
    "steps": (True, "Steps of the model, each a token of every speaking session"),
    "speaking": (False, "Sessions that are writing"),
    "waiting": (False, "Requests that wait for a slot"),
    "state_bytes": (False, "Bytes of one session's state, the same at every length"),
}


class Metrics:
    """Counts of an engine and of the requests to it, and what the process takes."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        ProcessCollector(registry=self._registry)
        self.requests = Counter("newllm_requests", "Requests", ["path", "status"], registry=self._registry)
        self.seconds = Histogram(
            "newllm_request_seconds",
            "Seconds from a request to the end of its answer",
            ["path"],
            buckets=(0.01, 0.1, 0.5, 1, 5, 15, 60, 300),
            registry=self._registry,
        )

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)


class Counting:
    """Counts requests by route and status, and the seconds to the last byte of their answers.

    As plain ASGI: behind Starlette's own class for middleware a route cannot see that its client has gone.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and count it at its end."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            route = scope.get("route")
            path = "unknown" if route is None else route.path
            self._metrics.requests.labels(path, status).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - started)


class _EngineCollector(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        for name, (grows, what) in _COUNTS.items():
            kind = CounterMetricFamily if grows else GaugeMetricFamily
            yield kind(f"newllm_{name}", what, value=getattr(self._engine.counts, name))
        yield GaugeMetricFamily("newllm_sessions", "Sessions kept", value=len(self._engine.store.names()))
