"""Where a trainer's batches come from, and which of them a process reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


def loader(feed: Feed, *, ahead: bool) -> DataLoader[Batch]:
    """The batches of ``feed``; ``ahead``: made by a process of their own while one is trained on."""
    # A generator of its own: the loader draws a seed, which must not disturb the model's numbers.
    # The process is forked: what makes the batches need not be pickled.
    return DataLoader(
        feed,
        batch_size=None,
        generator=torch.Generator(),
        num_workers=int(ahead),
        multiprocessing_context="fork" if ahead else None,
    )


class AtStart(TrainerCallback):
    """Calls ``begin`` when transformers has restored its own state and training is about to begin."""

    def __init__(self, begin: Callable[[], None]) -> None:
        self.begin = begin

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Call it."""
        self.begin()
