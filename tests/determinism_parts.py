"""The part ``determinism`` of ``python -m benchmarks.reliability``: a call a thousand times, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from torch import Tensor

from newllm.testing import Inputs
from tests.reliability_parts import Options, in_parts
from tests.row_families import FAMILIES, Sizes

RUNS = 1000
# Runs of which the device is asked for the verdicts at once: until then it always has something to do.
_BUNCH = 20
# Processes that use the GPU at the same time, and seconds until they must have begun.
NEIGHBOURS, _PATIENCE = 2, 120.0
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


class Configuration(NamedTuple):
    """A call that is repeated: its sizes on a GPU, and so many threads of a CPU."""

    family: str
    option: str
    dtype: torch.dtype
    sizes: Sizes
    threads: int = 2

    @property
    def name(self) -> str:
        return f"{self.family} [{self.option}] {str(self.dtype).removeprefix('torch.')} {self.sizes}"

    def inputs(self, device: str) -> Inputs:
        """On a CPU of smaller sizes, where the reference takes its time."""
        sizes = (
            self.sizes if device == "cuda" else {name: min(n, _MOST[name]) for name, n in self.sizes.items()}
        )
        case = FAMILIES[self.family].case(self.option)
        return case.inputs("changed", self.dtype, device=device, **sizes)


_MOST = {"batch": 9, "heads": 4, "kv_heads": 2, "tokens": 40, "key": 32, "value": 32, "window": 20,
         "segment": 10, "before": 25, "input": 16, "width": 200, "hidden": 130, "layers": 3,
         "query": 40}  # fmt: skip
_HEADS = {"batch": 2, "heads": 8, "kv_heads": 4, "key": 128, "value": 128}
_LONG = {**_HEADS, "tokens": 2000, "window": 512, "segment": 500, "before": 700}
_SHORT = {**_HEADS, "key": 64, "value": 96, "tokens": 131, "window": 70, "segment": 67, "before": 150}
_WRITE = {**_HEADS, "tokens": 5000, "segment": 512}
_STEP = {**_HEADS, "tokens": 1026, "window": 1024, "segment": 512}
_ROWS = {"width": 1536, "query": 577, "key": 960, "value": 1}
_SWEEP = {"batch": 1, "tokens": 64, "input": 16, "width": 768, "layers": 1}
CONFIGURATIONS = (
    Configuration("layer", "learned", BF16, _LONG),
    Configuration("layer", "learned delta padded stream", BF16, _LONG),
    Configuration("layer", "two stream weights", F32, _SHORT),
    Configuration("layer", "local padded", F16, {**_SHORT, "tokens": 60}),
    Configuration("layer", "delta tanh learned", F32, _LONG),
    Configuration("window", "", BF16, _LONG),
    Configuration("window", "apart padded by-row", F32, _SHORT),
    Configuration("memory_update", "1/(B*T), delta", BF16, _WRITE),
    Configuration("memory_update", "strides", F32, _WRITE),
    Configuration("memory_scan", "weights", BF16, _WRITE),
    Configuration("memory_scan", "delta", F32, _WRITE),
    Configuration("memory_retrieve", "learned", F32, _WRITE),
    Configuration("decode", "linear/tanh", BF16, _STEP),
    Configuration("decode", "delta/bias", F32, _STEP),
    Configuration("decode", "active/rope by row", F16, {**_STEP, "tokens": 64, "window": 60, "segment": 60}),
    Configuration("gemv", "normed", BF16, {**_ROWS, "batch": 1}),
    Configuration("gemv", "swiglu", F16, {**_ROWS, "batch": 9}),
    Configuration("context_sweep", "context", F32, _SWEEP, threads=3),
    Configuration("context_sweep", "context", BF16, {**_SWEEP, "batch": 30}, threads=4),
    Configuration("context_sweep", "context", F32, {**_SWEEP, "batch": 9, "layers": 3}),
    Configuration("context_sweep", "gated", F32, {**_SWEEP, "hidden": 1536, "layers": 2}, threads=3),
    Configuration(
        "context_sweep", "gated", BF16, {**_SWEEP, "batch": 70, "hidden": 300, "width": 257}, threads=1
    ),
)


def differing(run: Callable[[], dict[str, Tensor]], runs: int) -> list[str]:
    """Which results of ``runs`` identical calls are not those of the first, bit for bit, and when."""
    first = {name: bits(x) for name, x in run().items()}
    found = []
    for start in range(2, runs + 1, _BUNCH):
        other: dict[str, Tensor] = {}
        for number in range(start, min(start + _BUNCH, runs + 1)):
            again = run()
            other |= {f"{name} in run {number}": (bits(again[name]) != x).any() for name, x in first.items()}
        found += [
            name
            for name, differs in zip(other, torch.stack([*other.values()]).tolist(), strict=True)
            if differs
        ]
    return found


def bits(x: Tensor) -> Tensor:
    """The bytes of ``x``: two NaNs of one pattern are equal, 0 and -0 are not."""
    return x.contiguous().flatten().view(torch.uint8)


def repeated(configuration: Configuration, device: str, runs: int) -> list[str]:
    """What of a configuration's results and gradients differs between runs of the default path."""
    case, inputs = FAMILIES[configuration.family].case(configuration.option), configuration.inputs(device)
    threads = torch.get_num_threads()
    torch.set_num_threads(configuration.threads)
    try:
        return differing(partial(case.results, case.call, inputs), runs)
    finally:
        torch.set_num_threads(threads)


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes keep the GPU busy meanwhile: it then changes between them amid its kernels."""
    context = get_context("spawn")
    begun = context.Semaphore(0)
    processes = [context.Process(target=_occupy, args=(begun,), daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        for _ in processes:
            assert begun.acquire(timeout=_PATIENCE), "a neighbour did not begin"
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _occupy(begun: Any) -> None:
    configuration = CONFIGURATIONS[0]
    case, inputs = FAMILIES[configuration.family].case(configuration.option), configuration.inputs("cuda")
    case.results(case.call, inputs)
    begun.release()
    while True:
        case.results(case.call, inputs)


def determinism(options: Options) -> bool:
    """Every configuration so many times; several at once and beside other processes where it is a GPU."""
    runs, named = options.count or RUNS, {each.name: each for each in CONFIGURATIONS}
    on_gpu = options.device == "cuda"
    jobs = options.jobs if on_gpu else 1
    with neighbours(NEIGHBOURS if on_gpu else 0), ProcessPoolExecutor(jobs, get_context("spawn")) as pool:

        def run(part: str) -> dict[str, object]:
            found = pool.submit(repeated, named[part], options.device, runs).result()
            return {"runs": runs, "threads": named[part].threads, "failures": found[:20]}

        parts = [options.part] if options.part else [*named]
        return in_parts("determinism", parts, run, options, at_once=jobs)
