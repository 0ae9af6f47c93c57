"""Where the time of a call goes: kernels on the device, functions on the host."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from newllm.measuring.entries import Entry, call_of
from newllm.measuring.session import release, select
from newllm.measuring.tables import Grid
from newllm.measuring.timing import Call, turns

# Of each profile: seconds, and between how many calls; lines of a table.
_SECONDS, _CALLS, _SHOWN = 3.0, (2, 20), 16


class Taken(NamedTuple):
    """What ran, how often, and the microseconds that it took itself."""

    name: str
    times: int
    us: float


def profiles(
    suite: str,
    *,
    peers: str = "all",
    shapes: Collection[str] = (),
    variants: Collection[str] = (),
    device: str | None = None,
) -> Iterator[Grid]:
    """Two tables for each computation of ``suite`` and each direction, as they come.

    One has its kernels (on a CPU its operators), one the Python functions that called them; figures are of
    one call. Nothing is judged, and no row is written. Arguments and ValueError as those of ``session.run``.
    """
    chosen = select(suite, peers, shapes, variants, device)
    for direction, group in chosen.groups:
        for entry in group:
            yield from _profile(entry, direction, chosen.suite.warm_calls, chosen.site.device)
            release()


def _profile(entry: Entry, direction: str, warm_calls: int, device: torch.device) -> Iterator[Grid]:
    ready = entry.prepare()
    call = call_of(ready, direction)
    for _ in range(1 + warm_calls):
        call()
    whole = f"{entry.name}, {direction}"
    for what, measure in (("kernel", _kernels), ("function", _functions)):
        calls, taken = measure(call, device)
        lines = _lines(taken, calls * ready.repeats)
        yield Grid(f"{whole}: every {what}", (what, "times", "us each", "us"), lines, words=1)


def _kernels(call: Call, device: torch.device) -> tuple[int, list[Taken]]:
    """How many calls there were, and what ran on the device in all of them."""
    kinds = torch.profiler.ProfilerActivity
    on_gpu = device.type == "cuda"
    with torch.profiler.profile(activities=[kinds.CUDA if on_gpu else kinds.CPU]) as profiler:
        calls = _repeat(call)
        torch.get_device_module(device).synchronize()
    events: Any = profiler.key_averages()
    spent = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return calls, [Taken(event.key, event.count, getattr(event, spent)) for event in events]


def _functions(call: Call, device: torch.device) -> tuple[int, list[Taken]]:
    """The same of Python's functions, with what the profiler itself costs each."""
    profiler = cProfile.Profile()
    profiler.enable()
    calls = _repeat(call)
    profiler.disable()
    torch.get_device_module(device).synchronize()
    stats: Any = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    return calls, [Taken(_place(*key), count, 1e6 * own) for key, (_, count, own, *_) in stats.items()]


def _repeat(call: Call) -> int:
    """Call a few times; how often."""
    calls = 0
    for _ in turns(_SECONDS, _CALLS):
        call()
        calls += 1
    return calls


def _place(file: str, line: int, name: str) -> str:
    return name if file == "~" else f"{'/'.join(Path(file).parts[-2:])}:{line} {name}"


def _lines(taken: list[Taken], calls: int) -> list[tuple[str, ...]]:
    """The longest, and the sum of all."""
    ranked = sorted((one for one in taken if one.times), key=lambda one: -one.us)
    shown = [
        (one.name[:90], f"{one.times / calls:.4g}", f"{one.us / one.times:.1f}", f"{one.us / calls:.1f}")
        for one in ranked[:_SHOWN]
    ]
    count, us = sum(one.times for one in ranked), sum(one.us for one in ranked)
    return [*shown, ("all", f"{count / calls:.4g}", "", f"{us / calls:.1f}")]
