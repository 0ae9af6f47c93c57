"""One measurement from beginning to end: gate, ceilings, warm-up, turns, rows."""

from __future__ import annotations

import gc
import platform
import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from newllm import backend as backends
from newllm.measuring.entries import OURS, Attempt, Entry, Prepared, call_of
from newllm.measuring.ours import Site, absent
from newllm.measuring.peers import PEERS, chosen, refusal
from newllm.measuring.rows import Row, read_rows, write_rows
from newllm.measuring.suites import SUITES, Suite, groups
from newllm.measuring.timing import Call, Clock
from newllm.measuring.work import Ceilings, measure_ceilings
from newllm.runs import commit as checkout_commit

# Rows of a GPU are the record that the README shows; those of a CPU are not to take their place.
RESULTS = {"cuda": Path("benchmarks/results"), "cpu": Path("runs/bench")}
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
Say = Callable[[str], object]


class RedGate(RuntimeError):
    """An operator's results are wrong: nothing has been timed."""


class Selection(NamedTuple):
    """What is measured: groups of entries with their direction, and what was asked for and cannot be."""

    suite: Suite
    site: Site
    groups: list[tuple[str, list[Entry]]]
    left_out: list[str]


@dataclass(frozen=True)
class Report:
    """The rows of a run, where they are, and what was asked for and is not among them, with its reason."""

    suite: str
    rows: list[Row]
    left_out: list[str]
    path: Path


def run(
    suite: str,
    *,
    peers: str = "all",
    shapes: Collection[str] = (),
    variants: Collection[str] = (),
    out: Path | str | None = None,
    commit: str | None = None,
    device: str | None = None,
    seconds: float | None = None,
    say: Say = print,
) -> Report:
    """Judge, then time ``suite``, and write ``<out>/<suite>.jsonl`` anew after each group of rows.

    Where ``shapes`` are named, the rows of others stay there.

    Args:
        suite: a name of ``SUITES``.
        peers: ``all``, ``none`` or names of ``PEERS`` with commas.
        shapes, variants: only these of the suite's shapes and of newllm's own variants; empty: all.
        out: folder of the rows (None: ``RESULTS`` of the device).
        commit: recorded in the rows (None: the checkout's).
        device: ``cpu`` or ``cuda`` (None: the first accelerator, or else the CPU).
        seconds: time for the turns of each group (None: the suite's own).
        say: takes a line of progress at a time.

    Raises:
        RedGate: when one of newllm's own results breaks the error rule; no time is taken or told then.
        ValueError: for a name that there is not.
    """
    asked, site, found, left_out = select(suite, peers, shapes, variants, device)
    path = Path(out or RESULTS[site.device.type]) / f"{suite}.jsonl"
    rows = _others(path, found) if shapes else []
    measured: list[Row] = []
    _gate([entry for _, group in found for entry in group], say)
    clock = Clock(site.device)
    ceilings = measure_ceilings(clock, site.dtype)
    shared = _shared(suite, site, ceilings, commit)
    for direction, group in found:
        measured += _group(asked, group, direction, clock, shared, ceilings, seconds, say)
        write_rows(path, rows + measured)
    return Report(suite, measured, left_out, path)


def select(
    suite: str, peers: str, shapes: Collection[str], variants: Collection[str], device: str | None
) -> Selection:
    """What the arguments of :func:`run` ask for; raises ValueError for a name that there is not."""
    if suite not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}; got {suite!r}")
    asked = SUITES[suite]
    place = _device(device)
    site = Site(place, DTYPES[place.type])
    names = chosen(peers, asked.peers)
    refused = {name: why for name in names if (why := refusal(PEERS[name], place)) is not None}
    makers = {name: PEERS[name].entries for name in names if name not in refused}
    left_out = [*(why for op in asked.ops if (why := absent(op, place)) is not None), *refused.values()]
    return Selection(asked, site, _only(groups(asked, site, makers, shapes), variants), left_out)


def _others(path: Path, found: list[tuple[str, list[Entry]]]) -> list[Row]:
    """The rows that ``path`` has of shapes that are not measured now."""
    shapes = {entry.shape.name for _, group in found for entry in group}
    return [row for row in read_rows(path) if row.shape not in shapes] if path.is_file() else []


def _device(name: str | None) -> torch.device:
    devices = backends.devices()
    if name is None:
        return devices[min(1, len(devices) - 1)]
    for device in devices:
        if name in (device.type, str(device)):
            return device
    raise ValueError(f"device must be one of {', '.join(map(str, devices))}; got {name!r}")


def _only(found: list[tuple[str, list[Entry]]], variants: Collection[str]) -> list[tuple[str, list[Entry]]]:
    own = {entry.variant for _, group in found for entry in group if entry.impl in OURS}
    if unknown := sorted({*variants} - own):
        raise ValueError(f"variants must be some of {', '.join(sorted(own))}; got {', '.join(unknown)}")
    return [
        (direction, [e for e in group if not variants or e.impl not in OURS or e.variant in variants])
        for direction, group in found
    ]


def _gate(entries: list[Entry], say: Say) -> None:
    judges = {entry.name: entry.judge for entry in entries if entry.judge is not None}
    red = []
    for name, judge in judges.items():
        start = time.perf_counter()
        with Attempt() as attempt:
            judge()
        say(f"judged {name} in {time.perf_counter() - start:.1f} s")
        if attempt.error is not None:
            red.append(f"{name}: {attempt.error}")
    release()
    if red:
        raise RedGate(f"results are wrong, so nothing is timed: {'; '.join(red)}")


def _shared(suite: str, site: Site, ceilings: Ceilings, commit: str | None) -> dict[str, Any]:
    """The fields that all rows of a run have in common."""
    info = backends.build_info()
    cpu = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "suite": suite,
        "dtype": str(site.dtype).removeprefix("torch."),
        "peak_tflops": ceilings.flops / 1e12,
        "peak_gbs": ceilings.bandwidth / 1e9,
        "device": cpu if site.device.type == "cpu" else torch.cuda.get_device_name(site.device),
        "torch": info["torch"],
        "triton": info["triton"],
        "commit": commit or checkout_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": uuid.uuid4().hex[:12],
    }


def _group(
    suite: Suite,
    group: list[Entry],
    direction: str,
    clock: Clock,
    shared: dict[str, Any],
    ceilings: Ceilings,
    seconds: float | None,
    say: Say,
) -> list[Row]:
    """Warm each entry up, let them take turns, and release what they hold."""
    prepared: dict[str, Prepared] = {}
    calls: dict[str, Call] = {}
    found: dict[str, dict[str, Any]] = {}
    for entry in group:
        start = time.perf_counter()
        with Attempt() as attempt:
            ready = entry.prepare()
            call = call_of(ready, direction)
            for _ in range(suite.warm_calls):
                call()
            found[entry.name] = {"gib": clock.extra_gib(call)}
            prepared[entry.name], calls[entry.name] = ready, call
        if attempt.error is not None:
            found[entry.name] = {"error": attempt.error}
            release()
        say(
            f"{'warm' if attempt.error is None else 'failed'} after {time.perf_counter() - start:.1f} s: "
            f"{entry.name}, {direction}"
        )
    timed = clock.race(calls, seconds=suite.seconds if seconds is None else seconds, rounds=suite.rounds)
    for name, took in timed.items():
        times = {"ms": took.ms, "ms_low": took.low, "ms_high": took.high, "host_ms": took.host_ms}
        once = {field: ms / prepared[name].repeats for field, ms in times.items()}
        found[name] |= {**once, "rounds": took.rounds, "detail": prepared[name].detail()}
    rows = [_row(entry, direction, ceilings, {**shared, **found[entry.name]}) for entry in group]
    prepared.clear()
    calls.clear()
    release()
    return rows


def _row(entry: Entry, direction: str, ceilings: Ceilings, measured: dict[str, Any]) -> Row:
    least = entry.work(direction)
    sizes = {name: size for name, size in entry.shape._asdict().items() if name != "name"}
    nothing = dict.fromkeys(("ms", "ms_low", "ms_high", "host_ms", "gib", "detail", "error"))
    what = {"op": entry.op, "impl": entry.impl, "variant": entry.variant, "direction": direction}
    floor = {"floor_ms": ceilings.floor_ms(least), "flops": least.flops, "bytes": least.bytes}
    return Row(**{**nothing, "rounds": 0, **what, "shape": entry.shape.name, **sizes, **floor, **measured})


def release() -> None:
    """Give memory back between groups: a failure's traceback or a cycle may still hold tensors."""
    gc.collect()
    torch.cuda.empty_cache()
