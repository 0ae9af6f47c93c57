"""Times of calls that take turns on one device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]
# Written before each timed call on a GPU: larger than any L2 cache, and enough to keep the device busy while
# the host issues the call, as in a training step, where the host runs ahead.
_LEAD_BYTES, _LEAD_FILLS = 2**28, 64


class Timed(NamedTuple):
    """Milliseconds of a call on the device: median and quartiles; ``host_ms`` is the median to issue it."""

    ms: float
    low: float
    high: float
    host_ms: float
    rounds: int


class Clock:
    """Times calls on ``device``: CUDA events on a GPU, the wall clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lead = torch.empty(_LEAD_BYTES, dtype=torch.uint8, device=device) if self._cuda else None

    @property
    def _cuda(self) -> bool:
        return self.device.type == "cuda"

    def synchronise(self) -> None:
        """Wait for the device."""
        if self._cuda:
            torch.cuda.synchronize(self.device)

    def once(self, call: Call) -> tuple[float, float]:
        """Milliseconds of one ``call`` on the device and on the host; the device is idle afterwards."""
        if self._lead is None:
            start = time.perf_counter()
            call()
            elapsed = 1e3 * (time.perf_counter() - start)
            return elapsed, elapsed
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.synchronise()
        for _ in range(_LEAD_FILLS):
            self._lead.zero_()
        begin.record()
        start = time.perf_counter()
        call()
        host = 1e3 * (time.perf_counter() - start)
        end.record()
        self.synchronise()
        return begin.elapsed_time(end), host

    def race(
        self, calls: Mapping[str, Call], *, seconds: float, rounds: tuple[int, int] = (5, 50)
    ) -> dict[str, Timed]:
        """Time ``calls`` in turns: a round calls each once, so that all meet the same clocks and heat.

        As many rounds, within the least and the most of ``rounds``, as fit into ``seconds``. The calls
        must be warm.
        """
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        for _ in turns(seconds, rounds):
            for name, call in calls.items():
                taken[name].append(self.once(call))
        return {name: summary(samples) for name, samples in taken.items()}

    def extra_gib(self, call: Call) -> float | None:
        """Peak device memory of ``call`` beyond what was allocated before it; None on a CPU."""
        if not self._cuda:
            return None
        self.synchronise()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.synchronise()
        return float(torch.cuda.max_memory_allocated(self.device) - before) / 2**30


def turns(seconds: float, rounds: tuple[int, int]) -> Iterator[int]:
    """The numbers of as many rounds, within the least and the most of ``rounds``, as begin in ``seconds``."""
    least, most = rounds
    end = time.perf_counter() + seconds
    for number in range(most):
        if number >= least and time.perf_counter() > end:
            return
        yield number


def summary(samples: list[tuple[float, float]]) -> Timed:
    """What :meth:`Clock.once` told, put together."""
    times = [ms for ms, _ in samples]
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else 3 * times
    host = statistics.median(host for _, host in samples)
    return Timed(statistics.median(times), low, high, host, len(times))
