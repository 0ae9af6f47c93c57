"""What the rows have to reach, as data, and what they reached."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

from newllm.measuring.entries import FUSED
from newllm.measuring.rows import Row
from newllm.measuring.work import BOTH, FORWARD

Key = tuple[str, str, str, str, str]


class Measure(NamedTuple):
    """A figure of a row, beside another row or alone; ``unit`` follows the number."""

    unit: str
    at_least: bool
    of: Callable[[Row, Row], float | None]


def _quotient(over: float | None, under: float | None) -> float | None:
    return None if over is None or not under else over / under


MEASURES = {
    "time": Measure("x the time", False, lambda own, other: _quotient(own.ms, other.ms)),
    "speed": Measure("x faster", True, lambda own, other: _quotient(other.ms, own.ms)),
    "memory": Measure("x the memory", False, lambda own, other: _quotient(own.gib, other.gib)),
    "bandwidth": Measure(
        "x the bandwidth",
        True,
        lambda own, other: _quotient(_quotient(own.bytes, own.ms), _quotient(other.bytes, other.ms)),
    ),
    "compute": Measure(
        "x the rate of a product",
        True,
        lambda own, other: _quotient(_quotient(own.flops, own.ms), own.peak_tflops * 1e9),
    ),
    "step": Measure("us a step", False, lambda own, other: _quotient(own.ms, own.tokens / 1e3)),
    "seconds": Measure("s", False, lambda own, other: _quotient(own.ms, 1e3)),
    "ms": Measure("ms", False, lambda own, other: own.ms),
    "gib": Measure("GiB", False, lambda own, other: own.gib),
    "us": Measure("us", False, lambda own, other: _quotient(own.ms, 1e-3)),
}


class Bar(NamedTuple):
    """``own``'s ``measure`` beside ``other`` must reach ``must`` and should reach ``aim``."""

    measure: str
    own: Key
    other: Key
    must: float | None = None
    aim: float | None = None

    def value(self, rows: Mapping[Key, Row]) -> float | None:
        """The figure; None while a row is missing or has no time."""
        own, other = rows.get(self.own), rows.get(self.other)
        return None if own is None or other is None else MEASURES[self.measure].of(own, other)

    def met(self, value: float, bar: float) -> bool:
        """Whether ``value`` reaches ``bar``."""
        return value >= bar if MEASURES[self.measure].at_least else value <= bar


def _own(op: str, variant: str, shape: str, direction: str) -> Key:
    return op, FUSED, variant, shape, direction


def _peer(impl: str, shape: str, direction: str) -> Key:
    return {
        "FlexAttention": ("window_attention", impl, "window", shape, direction),
        "FA4": ("window_attention", impl, "window", shape, direction),
        "SDPA": ("full attention", impl, "causal", shape, direction),
    }.get(impl, ("infini_attention", impl, "linear", shape, direction))


def _layer() -> Iterator[Bar]:
    for shape in ("8B", "SmolLM"):
        for direction in (FORWARD, BOTH):
            for variant in ("linear", "linear continued"):
                own = _own("infini_attention", variant, shape, direction)
                yield Bar("time", own, _peer("FlexAttention", shape, direction), must=1.0)
                yield Bar("time", own, _peer("FA4", shape, direction), aim=1.0)
        own = _own("infini_attention", "linear", shape, BOTH)
        yield Bar("memory", own, _peer("FlexAttention", shape, BOTH), must=1.2, aim=1.0)
        own, linear = (_own("infini_attention", rule, shape, FORWARD) for rule in ("delta", "linear"))
        yield Bar("time", own, linear, must=1.35, aim=1.15)
    own = _own("infini_attention", "linear", "8B", BOTH)
    yield Bar("speed", own, _peer("segment loop", "8B", BOTH), must=9, aim=13)
    yield Bar("speed", own, _peer("compiled segment loop", "8B", BOTH), must=4.5, aim=6)
    yield Bar("speed", own, _peer("SDPA", "8B", BOTH), must=8, aim=11)


def _window() -> Iterator[Bar]:
    for shape in ("8B", "SmolLM"):
        for direction in (FORWARD, BOTH):
            own = _own("window_attention", "window", shape, direction)
            yield Bar("time", own, _peer("FlexAttention", shape, direction), must=1.0)
            yield Bar("time", own, _peer("FA4", shape, direction), aim=1.1)


def _decode() -> Iterator[Bar]:
    near, far = (_own("infini_decode", "linear", f"8B {length}", FORWARD) for length in ("4K", "1M"))
    yield Bar("us", near, near, must=8, aim=5)
    yield Bar("time", far, near, must=1.02)


def _sweep() -> Iterator[Bar]:
    """Of a GPU, in which a step is what counts, and of a CPU, in which the loops are."""
    one = partial(_own, "context_sweep", "sequential", "d768 B1")
    for direction, step in ((FORWARD, (1.5, 0.8)), (BOTH, (4, 2))):
        yield Bar("step", one(direction), one(direction), *step)
        for kind in ("LSTM", "GRU"):
            peer = ("recurrent layer", kind, "torch.nn", "d768 B1", direction)
            yield Bar("speed", one(direction), peer, must=1 if direction == FORWARD else None)
    yield Bar("speed", one(FORWARD), _loop("eager loop", "d768 B1", FORWARD), must=35, aim=65)
    yield Bar("speed", one(FORWARD), _loop("compiled hoisted loop", "d768 B1", FORWARD), must=4.5, aim=9)
    for batch, must, aim in ((112, 1.5, 1.1), (128, None, 1.1)):
        own = _own("context_sweep", "sequential", f"d768 B{batch}", FORWARD)
        yield Bar("time", own, one(FORWARD), must=must, aim=aim)
    long = partial(_own, "context_sweep", shape="d768 B1 32K", direction=FORWARD)
    yield Bar("speed", long("block"), long("sequential"), must=20, aim=30)
    for direction, must, aim in ((FORWARD, 0.40, 0.25), (BOTH, 1.4, 0.9)):
        own = _own("context_sweep", "jacobi, a sweep", "d768 B1 100K", direction)
        yield Bar("ms", own, own, must=must, aim=aim)
    small = partial(_own, "context_sweep", shape="CPU d768 B1")
    for direction, must in ((FORWARD, 4), (BOTH, 5)):
        eager = _loop("eager loop", "CPU d768 B1", direction)
        yield Bar("speed", small("sequential", direction=direction), eager, must=must)
    sequential = small("sequential", direction=FORWARD)
    yield Bar("speed", sequential, _loop("hoisted loop", "CPU d768 B1", FORWARD), must=2.5)
    yield Bar("speed", small("block", direction=FORWARD), sequential, must=2)
    wide = _own("context_sweep", "sequential", "CPU d768 B64", FORWARD)
    yield Bar("speed", wide, _loop("eager loop", "CPU d768 B64", FORWARD), must=1)
    yield Bar("compute", wide, wide, must=0.85)


def _loop(impl: str, shape: str, direction: str) -> Key:
    return "context_sweep", impl, "sequential", shape, direction


def _serve() -> Iterator[Bar]:
    def own(shape: str, op: str = "decode", variant: str = "Session") -> Key:
        return _own(op, variant, shape, FORWARD)

    def llama(shape: str, op: str = "decode") -> Key:
        return op, "HF Llama", "static cache", shape, FORWARD

    yield Bar("speed", own("B1 1M"), own("B1 4K"), must=0.98)
    yield Bar("speed", own("B1 4K"), llama("B1 4K"), must=1.0, aim=1.5)
    yield Bar("speed", own("B1 128K"), llama("B1 128K"), must=3, aim=10)
    yield Bar("speed", own("B64 32K"), llama("B64 32K"), must=8, aim=20)
    generated = own("generate 4K", "generate", "static cache")
    yield Bar("speed", generated, llama("generate 4K", "generate"), must=1.0, aim=1.5)
    prefill = own("prefill 1M", "prefill", "Session.feed")
    yield Bar("seconds", prefill, prefill, must=6, aim=3)
    yield Bar("gib", prefill, prefill, must=4)
    kept = own("state", "snapshot and restore", "in memory")
    yield Bar("ms", kept, kept, must=20)


_COPY: Key = ("copy", "device copy", "bytes of memory_update", "8B", FORWARD)

BARS = {
    "layer": (*_layer(),),
    "window": (*_window(),),
    "memory": (Bar("bandwidth", _own("memory_update", "linear", "8B", FORWARD), _COPY, must=0.8, aim=0.9),),
    "decode": (*_decode(),),
    "sweep": (*_sweep(),),
    "serve": (*_serve(),),
    "long": (
        Bar(
            "speed",
            _own("infini_attention", "linear", "8B 1M", FORWARD),
            _peer("SDPA", "8B 1M", FORWARD),
            must=200,
            aim=400,
        ),
    ),
}


class Standing(NamedTuple):
    """A bar with its figure, None where it was not measured."""

    bar: Bar
    value: float | None

    def verdict(self, level: float | None) -> str:
        """``met`` or ``not met``; empty without a figure or a bar."""
        if level is None or self.value is None:
            return ""
        return "met" if self.bar.met(self.value, level) else "not met"


def standings(suite: str, rows: Iterable[Row]) -> list[Standing]:
    """Where the rows of a run stand with the suite's bars, which are those of one GPU."""
    by_key = {row.key: row for row in rows}
    return [Standing(bar, bar.value(by_key)) for bar in BARS[suite]]
