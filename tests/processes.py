"""Processes of tests: forked from one server that has imported what they need, so that they begin at once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PRELOADED = ["tests.sequence_ranks", "tests.sequence_models", "newllm.cli.train", "newllm.training.trainer"]
Processes = torch.multiprocessing.ProcessContext


def started(worker: Callable[..., None], size: int, *args: Any) -> Processes:
    """``worker(rank, *args)`` in ``size`` processes, which go on while the caller does."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    found = torch.multiprocessing.start_processes(worker, args, size, join=False, start_method="forkserver")
    assert found is not None
    return found


def joined(processes: Processes) -> None:
    """Wait for all; the first that fails ends the others and raises its traceback."""
    while not processes.join():
        pass


def spawned(worker: Callable[..., None], size: int, folder: Path, *args: Any) -> list[Any]:
    """What ``worker(rank, size, folder, *args)`` leaves in ``<rank>.pt``, in ``size`` processes."""
    joined(started(worker, size, size, str(folder), *args))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def command(words: list[str], size: int, folder: Path) -> Processes:
    """``newllm`` with ``words`` in ``size`` processes, as torchrun does; output in ``said`` and ``log``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return started(_command, size, words, size, port, str(folder))


def succeeded(processes: Processes, folder: Path) -> None:
    """Wait for a :func:`command` that must succeed."""
    codes = exit_codes(processes)
    assert codes == [0] * len(codes), (folder / "log").read_text()[-3000:]


def exit_codes(processes: Processes) -> list[int | None]:
    """Of all, when they have ended."""
    for process in processes.processes:
        process.join(300)
    return [process.exitcode for process in processes.processes]


def _command(rank: int, words: list[str], size: int, port: int, folder: str) -> None:
    from newllm.cli import main

    for stream, name in ((1, "said"), (2, "log")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    if size > 1:
        os.environ |= {name: str(value) for name, value in place.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
    torch.set_num_threads(1)
    raise SystemExit(main(words))


def wait_for(path: Path, processes: Processes) -> None:
    """Until there is ``path``; the processes must not end before."""
    while not path.exists():
        assert all(process.is_alive() for process in processes.processes)
        time.sleep(0.01)
