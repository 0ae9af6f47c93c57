"""What is counted, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from newllm.serving.engine import Engine

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
    """Counts of an engine and of the requests to it."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self.requests = Counter("newllm_requests", "Requests", ["path", "status"], registry=self._registry)
        self.seconds = Histogram(
            "newllm_request_seconds",
            "Seconds from a request to the end of its answer, of a streamed one to the beginning",
            ["path"],
            buckets=(0.01, 0.1, 0.5, 1, 5, 15, 60, 300),
            registry=self._registry,
        )

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        for name, (grows, what) in _COUNTS.items():
            kind = CounterMetricFamily if grows else GaugeMetricFamily
            yield kind(f"newllm_{name}", what, value=getattr(self._engine.counts, name))
        yield GaugeMetricFamily("newllm_sessions", "Sessions kept", value=len(self._engine.store.names()))
