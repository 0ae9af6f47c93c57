"""Endless training batches from token ids: each is a function of its number alone, so any can come next.

A batch is a dict of ``input_ids [B, T]`` (int64) and ``targets [B, T]``: what comes after each token, or
``IGNORED``. Ordered batches also have ``attention_mask [B, T]`` (False: padding) and ``reset [B]`` (True: a
document begins, so the row's state starts empty).
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from typing import NamedTuple

import torch
from torch import Tensor

from newllm.data.passkey import PasskeyTask, training_batch
from newllm.data.token_cache import Tokens

IGNORED = -100
Batch = dict[str, Tensor]


class Needles(NamedTuple):
    """Passkey samples mixed into a stream: a share ``ratio`` of its rows (packed) or documents (ordered).

    ``answer_only`` takes the loss on the answer alone; ``segment`` is what keys are put across at times;
    ``blocks`` is how many blocks an ordered sample is long.
    """

    task: PasskeyTask
    ratio: float = 0.01
    answer_only: bool = False
    segment: int = 64
    blocks: int = 4

    def sample(self, length: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``input_ids`` and ``targets`` ``[rows, length]``: a key in real text, asked for at the end."""
        answer = self.task.key_length
        made = training_batch(
            self.task, length=length + 1 - answer, samples=rows, segment=self.segment, generator=generator,
            edge=0.15, straddle=0.15 if length > 2 * self.segment else 0.0,
        )  # fmt: skip
        targets = torch.cat([made.input_ids[:, 1:], made.answers[:, -1:]], 1)
        if self.answer_only:
            targets[:, :-answer] = IGNORED
        return made.input_ids, targets


class PackedBlocks:
    """Blocks of ``length`` tokens cut anywhere; every epoch cuts elsewhere and shuffles anew.

    Args:
        tokens: the text.
        rows: blocks of a batch.
        length: tokens of a block.
        seed: seed of cuts and order.
        needles: mixed in where given.
        shuffle: False for the blocks in order, always cut alike.

    Raises:
        ValueError: for sizes below 1 or a text shorter than one block and its last target.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        rows: int,
        length: int,
        seed: int = 0,
        needles: Needles | None = None,
        shuffle: bool = True,
    ) -> None:
        _check(tokens, rows, length, needles)
        if len(tokens.ids) < length + 1:
            raise ValueError(f"length {length} needs {length + 1} tokens of text, got {len(tokens.ids)}")
        self.tokens, self.rows, self.length = tokens, rows, length
        self.seed, self.needles, self.shuffle = seed, needles, shuffle
        self.blocks = max(1, (len(tokens.ids) - length) // length)
        self._epoch = -1
        self._order: Tensor = torch.zeros(0)
        self._offset = 0

    def __len__(self) -> int:
        """Whole batches of an epoch, at least one."""
        return max(1, self.blocks // self.rows)

    def batch(self, index: int) -> Batch:
        """Batch ``index``, counted over all epochs."""
        rows = [self._block(index * self.rows + row) for row in range(self.rows)]
        ids = torch.stack(rows)
        made = {"input_ids": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}
        if self.needles is not None:
            generator = _generator(self.seed, index)
            chosen = torch.rand(self.rows, generator=generator) < self.needles.ratio
            sample = self.needles.sample(self.length, int(chosen.sum()), generator)
            made["input_ids"][chosen], made["targets"][chosen] = sample
        return made

    def _block(self, number: int) -> Tensor:
        epoch, place = divmod(number, self.blocks)
        if epoch != self._epoch:
            self._cut(epoch)
        start = self._offset + int(self._order[place]) * self.length
        return _ids(self.tokens.ids[start : start + self.length + 1])

    def _cut(self, epoch: int) -> None:
        self._epoch, generator = epoch, _generator(self.seed, epoch)
        if not self.shuffle:
            self._offset, self._order = 0, torch.arange(self.blocks)
            return
        spare = len(self.tokens.ids) - 1 - self.blocks * self.length
        self._offset = int(torch.randint(spare + 1, (1,), generator=generator))
        self._order = torch.randperm(self.blocks, generator=generator)


class OrderedStreams:
    """Rows that each read document after document in order, block by block, for state that is carried.

    Rows come in ``sets``: batch ``index`` is the next block of set ``index % sets``, so that gradient
    accumulation and several processes each carry states of their own. A row that ends its document gets the
    next one of the shuffled epoch; the end of a document is padded to a whole block.

    Args:
        tokens: the text.
        rows: streams of a set.
        length: tokens of a block.
        sets: groups of rows that take turns.
        seed: seed of the documents' order.
        needles: documents mixed in where given.
        shuffle: False for the documents in order.

    Raises:
        ValueError: for sizes below 1 or a text without a document of two tokens.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        rows: int,
        length: int,
        sets: int = 1,
        seed: int = 0,
        needles: Needles | None = None,
        shuffle: bool = True,
    ) -> None:
        _check(tokens, rows, length, needles)
        if sets < 1:
            raise ValueError(f"sets must be at least 1, got {sets}")
        sizes = torch.from_numpy(tokens.borders).diff()
        self._usable = torch.nonzero(sizes > 1)[:, 0]
        if len(self._usable) == 0:
            raise ValueError("the text has no document of two tokens or more")
        self.tokens, self.rows, self.length, self.sets = tokens, rows, length, sets
        self.seed, self.needles, self.shuffle = seed, needles, shuffle
        blocks = (sizes[self._usable] - 1 + length - 1) // length
        self._blocks = dict(zip(self._usable.tolist(), blocks.tolist(), strict=True))
        # Per stream: when each of its documents begins, and which it is; ~n is the n-th needle sample.
        streams = rows * sets
        self._begins: list[list[int]] = [[] for _ in range(streams)]
        self._which: list[list[int]] = [[] for _ in range(streams)]
        self._free = [(0, stream) for stream in range(streams)]
        self._taken = self._given = 0
        self._order: list[int] = []

    def __len__(self) -> int:
        """Batches of an epoch, about."""
        return max(1, sum(self._blocks.values()) // self.rows)

    def batch(self, index: int) -> Batch:
        """Batch ``index``, counted over all epochs and sets."""
        time, chosen = divmod(index, self.sets)
        while self._free[0][0] <= time:
            self._extend()
        rows = [self._row(chosen * self.rows + row, time) for row in range(self.rows)]
        ids, targets, mask, reset = zip(*rows, strict=True)
        return {
            "input_ids": torch.stack(ids),
            "targets": torch.stack(targets),
            "attention_mask": torch.stack(mask),
            "reset": torch.tensor(reset),
        }

    def _extend(self) -> None:
        """Give the stream that is free first its next document."""
        time, stream = heapq.heappop(self._free)
        lot = _generator(self.seed, self._given)
        self._given += 1
        needle = self.needles is not None and float(torch.rand(1, generator=lot)) < self.needles.ratio
        if needle:
            assert self.needles is not None
            document, blocks = ~(self._given - 1), self.needles.blocks
        else:
            document = self._next_document()
            blocks = self._blocks[document]
        self._begins[stream].append(time)
        self._which[stream].append(document)
        heapq.heappush(self._free, (time + blocks, stream))

    def _next_document(self) -> int:
        epoch, place = divmod(self._taken, len(self._usable))
        if place == 0:
            generator = _generator(self.seed, ~epoch)
            count = len(self._usable)
            order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
            self._order = self._usable[order].tolist()
        self._taken += 1
        return self._order[place]

    def _row(self, stream: int, time: int) -> tuple[Tensor, Tensor, Tensor, bool]:
        place = bisect_right(self._begins[stream], time) - 1
        start = (time - self._begins[stream][place]) * self.length
        inputs, targets = self._document(self._which[stream][place])
        ids, wanted = inputs[start : start + self.length], targets[start : start + self.length]
        missing = self.length - len(ids)
        mask = torch.arange(self.length) < len(ids)
        pad = torch.nn.functional.pad
        return pad(ids, (0, missing)), pad(wanted, (0, missing), value=IGNORED), mask, start == 0

    def _document(self, which: int) -> tuple[Tensor, Tensor]:
        if which >= 0:
            ids = _ids(self.tokens.document(which))
            return ids[:-1], ids[1:]
        assert self.needles is not None
        generator = _generator(self.seed, which)
        ids, targets = self.needles.sample(self.needles.blocks * self.length, 1, generator)
        return ids[0], targets[0]


def _ids(row: object) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.asarray(row).astype(np.int64))


def _generator(seed: int, index: int) -> torch.Generator:
    """Random numbers of a batch, an epoch or (negative) a document, each of its own seed."""
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)


def _check(tokens: Tokens, rows: int, length: int, needles: Needles | None) -> None:
    for name, value in (("rows", rows), ("length", length)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if needles is not None:
        if not 0 <= needles.ratio <= 1:
            raise ValueError(f"needles: ratio must be between 0 and 1, got {needles.ratio}")
        needles.task.last_start(length + 1 - needles.task.key_length)
