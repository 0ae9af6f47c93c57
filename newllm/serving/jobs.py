"""What the engine is asked, and what it tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from newllm.models.sampling import Sampling
from newllm.models.streams import Snapshot

Finish = Literal["stop", "length"]


class Busy(RuntimeError):
    """Too many requests wait already."""


class InUse(RuntimeError):
    """Another request is speaking with this session."""


@dataclass(frozen=True)
class Event:
    """Something a request is told: text, progress of reading, its end or failure.

    ``read`` of ``to_read`` prompt tokens are read; ``tokens`` is the length of the whole stream, ``written``
    that of the reply.
    """

    kind: Literal["reading", "text", "done", "failed"]
    text: str = ""
    read: int = 0
    to_read: int = 0
    written: int = 0
    tokens: int = 0
    finish: Finish | None = None


@dataclass(eq=False)
class Job:
    """A request: what to read, how to answer, whom to tell (``tell`` is called from the engine's threads).

    ``start`` is the session to go on from (None: an empty one, which ``ids`` must not be), ``name`` where it
    is kept (None: nowhere).
    """

    ids: torch.Tensor
    tell: Callable[[Event], object]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    stops: tuple[str, ...] = ()
    start: Snapshot | None = None
    name: str | None = None
    deadline: float = float("inf")
    cancelled: bool = False


@dataclass
class Counts:
    """What has happened since the start."""

    tokens_read: int = 0
    tokens_written: int = 0
    steps: int = 0
    speaking: int = 0
    waiting: int = 0
    state_bytes: int = 0
