"""Work beside the caller's: what waits for a neighbour, while the caller computes what needs none."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Found = TypeVar("Found")


def beside(work: Callable[[], Found], device: torch.device, *, waits: bool) -> Callable[[], Found]:
    """Begin ``work`` on ``device``, and return what waits for its result.

    Work that waits for nobody is done at once. Other work runs in a thread, or on an accelerator in a stream
    of its own that goes before the caller's, so that ranks behind this one get their message as early as can
    be. The caller holds what the work uses until it has its result.
    """
    if not waits:
        found = work()
        return lambda: found
    return _in_thread(work) if device.type == "cpu" else _in_stream(work, device)


def _in_thread(work: Callable[[], Found]) -> Callable[[], Found]:
    def run() -> Found:
        # A thread begins with gradients on.
        with torch.no_grad():
            return work()

    pool = ThreadPoolExecutor(1)
    future = pool.submit(run)
    pool.shutdown(wait=False)
    return future.result


@cache
def _own_stream(device: torch.device) -> Any:
    """One for all work: what a stream has freed is used again in that stream alone."""
    return torch.get_device_module(device).Stream(device, priority=-1)


def _in_stream(work: Callable[[], Found], device: torch.device) -> Callable[[], Found]:
    module = torch.get_device_module(device)
    caller, own = module.current_stream(device), _own_stream(device)
    own.wait_stream(caller)
    with module.stream(own):
        found = work()

    def result() -> Found:
        caller.wait_stream(own)
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                # Its memory is of the other stream, which may not use it again before the caller has.
                leaf.record_stream(caller)
        return found

    return result
