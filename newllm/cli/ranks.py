"""Commands that share one long text over the processes of torchrun."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from newllm.distributed.line import Line
    from newllm.models.session import Session


def check_ranks(ranks: int) -> None:
    """Raise ``ValueError`` unless ``ranks`` is the number of this launch's processes."""
    from newllm.backend import process

    if ranks != (processes := process()[1]):
        raise ValueError(
            f"sequence_ranks must be the number of processes, {processes}, got {ranks}: "
            f"torchrun --nproc-per-node {max(1, ranks)} -m newllm ..."
        )


def rank_device(device: str, ranks: int) -> str:
    """``auto`` as this process's own accelerator, where there are several processes."""
    from newllm.backend import training_device

    return str(training_device()) if device == "auto" and ranks > 1 else device


def feed_over_ranks(session: Session, ids: Tensor) -> bool:
    """Read ``ids`` in slices, with a bar of the first process; whether this is the first."""
    from tqdm import tqdm

    from newllm.distributed.prefill import prefill

    with (
        meeting(session.model.device) as line,
        tqdm(total=len(ids), desc="reading", unit="token", disable=not line.first) as bar,
    ):
        prefill(session, ids, mesh=line, progress=bar.update)
    return line.first


@contextmanager
def line_over(ranks: int, device: torch.device) -> Iterator[Line | None]:
    """The line of ``ranks`` processes as :func:`meeting` makes it; None of one process."""
    if ranks == 1:
        yield None
    else:
        with meeting(device) as line:
            yield line


@contextmanager
def meeting(device: torch.device) -> Iterator[Line]:
    """The line of all processes of this launch, whose tensors lie on ``device``."""
    import torch
    import torch.distributed as dist

    from newllm.distributed.line import line_of

    if device.type == "cpu":
        dist.init_process_group("gloo")
    else:
        torch.get_device_module(device).set_device(device)
        dist.init_process_group(device_id=device)
    try:
        assert dist.group.WORLD is not None
        yield line_of(dist.group.WORLD)
    finally:
        dist.destroy_process_group()
