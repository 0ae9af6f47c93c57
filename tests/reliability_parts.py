"""Long checks in parts of minutes: which are done, who judges them, what is written."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch

from newllm import backend
from newllm.evaluation.rows import Row as Result, RowFile
from newllm.runs import provenance

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


class Options(NamedTuple):
    """What the command was told: how much, where, for how long."""

    device: str
    minutes: float
    jobs: int
    count: int | None
    part: str | None
    out: Path
    resume: bool = False
    k: str | None = None
    commit: str | None = None
    arguments: tuple[str, ...] = ()

    def parts(self, total: int) -> list[str]:
        """The names of ``total`` parts, or the one that was asked for."""
        return [self.part] if self.part else [f"{number}/{total}" for number in range(1, total + 1)]


class Verdict(NamedTuple):
    """What became of one row: the share of its error bar that it took, in how many looks, or why it fails."""

    row: str
    family: str
    share: float
    looks: int
    failure: str | None = None


def prepare(device: str) -> None:
    """Make this process one that judges rows: one thread, and without a GPU the interpreter's kernels.

    To be called before a kernel's file is imported, with TRITON_INTERPRET set where ``device`` is "cpu".
    """
    torch.set_num_threads(1)
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        return
    for op, devices in backend.FUSED.items():
        if op != "context_sweep":
            backend.FUSED[op] = devices | {"cpu"}


def facts(options: Options) -> dict[str, Any]:
    """What every result says of where it comes from."""
    found = provenance(0)
    if options.commit:
        found["commit"] = options.commit
    names = [str(each) for each in backend.devices()]
    gpu = torch.cuda.get_device_name(0) if options.device == "cuda" and len(names) > 1 else "cpu"
    return {"device": gpu, **{key: found[key] for key in ("torch", "triton", "commit", "date")}}


Judge = Callable[[Any], list[Verdict]]
Judged = Callable[[Judge, Iterable[Any]], Iterator[list[Verdict]]]


class _Process:
    """A process that judges; after a task that raised, maybe for a lost device, another takes its place."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._start()

    def _start(self) -> None:
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), prepare, (self._device,))

    def end(self) -> None:
        self._pool.shutdown()

    def judged(self, judge: Judge, task: Any) -> list[Verdict]:
        future = self._pool.submit(judge, task)
        if (error := future.exception()) is None:
            return future.result()
        self.end()
        self._start()
        return [Verdict(str(task), "broken", 0.0, 0, f"{type(error).__name__}: {error}")]


@contextmanager
def judges(device: str, jobs: int) -> Iterator[Judged]:
    """``jobs`` processes that judge tasks as ``judge(task)``; a task that raises is a failure of its own."""
    processes = [_Process(device) for _ in range(jobs)]
    idle = SimpleQueue[_Process]()
    for process in processes:
        idle.put(process)

    def judged(judge: Judge, task: Any) -> list[Verdict]:
        process = idle.get()
        try:
            return process.judged(judge, task)
        finally:
            idle.put(process)

    try:
        with ThreadPoolExecutor(jobs) as threads:
            yield lambda judge, tasks: threads.map(partial(judged, judge), tasks)
    finally:
        for process in processes:
            process.end()


def summary(verdicts: Iterable[Verdict]) -> Result:
    """Counts, the largest share and its row, failures by name."""
    found = list(verdicts)
    worst = max(found, key=lambda each: each.share)
    families = sorted({each.family for each in found})
    return {
        "rows": len(found),
        "families": {name: sum(each.family == name for each in found) for name in families},
        "worst_share": round(worst.share, 4),
        "worst_row": worst.row,
        "second_looks": [each.row for each in found if each.looks > 1],
        "failures": [f"{each.row}: {each.failure}" for each in found if each.failure],
    }


def shown(row: Result) -> str:
    """A result as one line: lists by their lengths, but failures in full."""
    short = {key: len(each) if isinstance(each, list | dict) else each for key, each in row.items()}
    return " ".join([json.dumps(short), *map(str, row.get("failures", []))])


def in_parts(
    suite: str,
    parts: Iterable[str],
    run: Callable[[str], Result],
    options: Options,
    at_once: int = 1,
) -> bool:
    """Run those of ``parts`` that ``suite``'s file lacks for this device, ``at_once`` of them, in time.

    A part is begun when the longest one so far would end in time. Returns whether all that it ran held.
    """
    results = RowFile(options.out / f"{suite}.jsonl")
    where, began, longest = facts(options), time.perf_counter(), 0.0

    def identity(part: str) -> Result:
        return {"suite": suite, "part": part, "device": where["device"], "torch": where["torch"]}

    def timed(part: str) -> Result | None:
        nonlocal longest
        start = time.perf_counter()
        if longest and start - began + longest > 60 * options.minutes:
            return None
        row = run(part)
        took = time.perf_counter() - start
        longest = max(longest, took)
        return {**identity(part), **row, "seconds": round(took, 1), **where}

    def done(part: str) -> bool:
        row = results.find(identity(part))
        return row is not None and not row.get("failures") and not options.part

    left, held = 0, True
    for row in _side_by_side(timed, [part for part in parts if not done(part)], at_once):
        if row is None:
            left += 1
            continue
        results.append(row)
        print(f"{suite} {row['part']}: {shown(row)}", flush=True)
        held &= not row.get("failures")
    print(f"{suite}: {left} parts left; say it again to go on" if left else f"{suite}: all parts are done")
    return held


def _side_by_side(
    run: Callable[[str], Result | None], parts: list[str], at_once: int
) -> Iterator[Result | None]:
    """What ``run`` makes of each part, as they end; once one raises, no other is begun."""
    with ThreadPoolExecutor(at_once) as threads:
        running = [threads.submit(run, part) for part in parts]
        try:
            for future in as_completed(running):
                yield future.result()
        finally:
            threads.shutdown(cancel_futures=True)
