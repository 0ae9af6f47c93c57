"""``python -m newllm.measuring.steps``: the kernels of a decoding step, ours and a Llama's, by time."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from newllm import backend as backends
from newllm.measuring import serving, shapes
from newllm.measuring.ours import Site
from newllm.measuring.session import DTYPES
from newllm.measuring.timing import Clock

_WAYS: dict[str, Callable[[Any, Site], Any]] = {
    "full": lambda shape, site: serving._session_steps(shape, site, "full"),
    "graph": lambda shape, site: serving._session_steps(shape, site, "graph"),
    "llama": serving._llama_steps,
}


def main(argv: list[str] | None = None) -> None:
    """Print, for each way that is asked for, milliseconds a step and the kernels that it takes most with."""
    parser = argparse.ArgumentParser(prog="python -m newllm.measuring.steps")
    parser.add_argument("ways", nargs="*", choices=[[], *_WAYS], default=["full", "graph", "llama"])
    parser.add_argument("--shape", default="B1 4K")
    parser.add_argument("--rows", type=int, default=25)
    options = parser.parse_args(argv)
    device = backends.devices()[-1]
    site, clock = Site(device, DTYPES[device.type]), Clock(device)
    shape = next(each for each in shapes.SERVES[device.type] if each.name == options.shape)
    for way in options.ways:
        ready = _WAYS[way](shape, site)
        for _ in range(2):
            ready.call()
        times = sorted(clock.once(ready.call)[0] / ready.repeats for _ in range(5))
        print(f"{way}, {shape.name}: {times[2]:.4f} ms a step ({times[0]:.4f} to {times[-1]:.4f})")
        _kernels(ready.call, ready.repeats, options.rows)
        del ready


def _kernels(call: Callable[[], Any], steps: int, rows: int) -> None:
    """On a GPU the kernels themselves, not the calls that launch them."""
    gpu = torch.cuda.device_count() > 0
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=kinds) as record:
        call()
    wanted = "CUDA" if gpu else "CPU"
    found = [
        (float(event.self_device_time_total if gpu else event.self_cpu_time_total), event.count, event.key)
        for event in record.key_averages()
        if event.device_type.name == wanted
    ]
    total, calls = sum(time for time, _, _ in found), sum(count for _, count, _ in found)
    print(f"  {calls / steps:.1f} kernels and {total / steps:.1f} us a step")
    for time, count, name in sorted(found, reverse=True)[:rows]:
        print(f"  {time / steps:8.2f} us  {count / steps:6.2f} x {time / count:7.2f} us  {name[:90]}")


if __name__ == "__main__":
    main()
