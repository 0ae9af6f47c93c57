"""Where a trainer's batches come from, and which of them a process reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from traceback import format_exc
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback

from newllm.data.streams import Batch


class Batches(Protocol):
    """Batches as a function of their number."""

    def batch(self, index: int) -> Batch:
        """Batch ``index``."""


class Place(NamedTuple):
    """Where a process stands: batches it has read, its number, and how many processes there are."""

    read: int
    rank: int
    processes: int


class Feed(IterableDataset[Batch]):
    """The batches of one process: of every ``processes`` in a row, the one of its number.

    Args:
        batches: all of them.
        count: how many this process reads in all.
        place: where it stands when reading begins.
    """

    def __init__(self, batches: Batches, count: int, place: Callable[[], Place]) -> None:
        self.batches, self.count, self.place = batches, count, place

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        read, rank, processes = self.place()
        for number in range(read, self.count):
            yield self.batches.batch(number * processes + rank)


class _Ahead(IterableDataset[Any]):
    """A feed as the process that makes batches ahead reads it: a user's error comes as a value."""

    def __init__(self, feed: Feed) -> None:
        self.feed = feed

    def __len__(self) -> int:
        return len(self.feed)

    def __iter__(self) -> Iterator[Batch | Exception]:
        try:
            yield from self.feed
        except (ValueError, OSError, RuntimeError) as failure:
            failure.add_note(format_exc())
            yield failure


class _AheadLoader(DataLoader[Any]):
    """Raises what went wrong in the other process, as it was raised there."""

    def __iter__(self) -> Any:
        for made in super().__iter__():
            if isinstance(made, Exception):
                raise made
            yield made


def loader(feed: Feed, *, ahead: bool) -> DataLoader[Batch]:
    """The batches of ``feed``; ``ahead``: made by a process of their own while one is trained on."""
    # A generator of its own: the loader draws a seed, which must not disturb the model's numbers.
    generator = torch.Generator()
    if not ahead:
        return DataLoader(feed, batch_size=None, generator=generator)
    # Forked, so that what makes the batches need not be pickled, and in a session of its own: a signal to the
    # training's whole group is for the training to obey, which still needs its batches to the step's end.
    return _AheadLoader(
        _Ahead(feed), batch_size=None, generator=generator, num_workers=1,
        multiprocessing_context="fork", worker_init_fn=lambda _: os.setsid(),
    )  # fmt: skip


class AtStart(TrainerCallback):
    """Calls ``begin`` when transformers has restored its own state and training is about to begin."""

    def __init__(self, begin: Callable[[], None]) -> None:
        self.begin = begin

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Call it."""
        self.begin()
