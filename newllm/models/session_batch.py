"""Many sessions in one model: each comes and goes on its own, all speak in the same step."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import NamedTuple

import torch

from newllm.models.sampling import Controls, Sampling, choose, controls, generator
from newllm.models.stepping import Fetched, going_on
from newllm.models.streams import Compile, Model, Snapshot, Streams


class _Speaker(NamedTuple):
    """Who speaks in a row, and how."""

    ticket: int
    sampling: Sampling
    random: torch.Generator


class SessionBatch:
    """Up to ``slots`` sessions that generate side by side, a token each per step.

    A session is admitted as a snapshot of one row (``Session.snapshot``), known by a ticket, and leaves as a
    snapshot; what it says does not depend on who else is there, but for rounding where a step is not compiled
    and a GPU's kernels differ by the number of rows. Sessions stand in the first rows, so that a
    step that is not compiled takes no longer than they need; one that is always has the same shape.

    Args:
        model: a Senri, Context LM or Context-KV model.
        slots: most sessions at a time.
        compile: how a step is run, see ``Streams``.

    Raises:
        TypeError, ValueError: as ``Streams``.
    """

    def __init__(self, model: Model, slots: int, *, compile: Compile = "none") -> None:
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        self._streams = Streams(model, slots, compile=compile)
        self._speakers: list[_Speaker] = []
        self._tickets = itertools.count()
        self._speaking = torch.zeros(slots, dtype=torch.bool, device=model.device)
        self._logits = self._streams.logits()
        self._controls = controls([], self._logits)

    @property
    def free(self) -> int:
        """Sessions that can still be admitted."""
        return self._streams.rows - len(self._speakers)

    @property
    def state_bytes(self) -> int:
        """Bytes of one session's states; zero before the first was admitted."""
        return self._streams.nbytes() // self._streams.rows

    def admit(self, snapshot: Snapshot, sampling: Sampling | None = None, seed: int | None = None) -> int:
        """Let the session of ``snapshot`` speak from the next step on; its ticket.

        Nothing may be pending in it: feed it an empty text before. ``seed`` None takes another one each time.

        Raises ``ValueError`` where no slot is free, for a pending token, and where the snapshot does not fit;
        whatever it raises, the session is not there then.
        """
        if not self.free:
            raise ValueError(f"at most {self._streams.rows} sessions can speak at a time: evict one first")
        if int(snapshot.pending[0]) >= 0:
            raise ValueError(f"snapshot must have no pending token, got {int(snapshot.pending[0])}")
        row, random = len(self._speakers), generator(seed, torch.device("cpu"))
        speakers = [*self._speakers, _Speaker(next(self._tickets), sampling or Sampling(), random)]
        ways = self._ways(speakers)
        self._streams.put(row, snapshot)
        self._logits[row] = self._streams.logits(self._streams.hidden[row])
        self._speaking[row] = True
        # Who speaks is said last, when nothing can fail any more.
        self._controls, self._speakers = ways, speakers
        return speakers[row].ticket

    def evict(self, ticket: int) -> Snapshot:
        """The session as it is now; its slot is free.

        Raises ``ValueError`` for a ticket of nobody.
        """
        snapshot = self.snapshot(ticket)
        self.drop(ticket)
        return snapshot

    def drop(self, ticket: int) -> None:
        """Free the slot of a session that nobody keeps. Raises ``ValueError`` as ``evict``."""
        row, last = self._row(ticket), len(self._speakers) - 1
        if row != last:
            # The last one takes its place.
            self._streams.put(row, self._streams.take(last))
            for rows in (self._logits, self._speaking):
                rows[row] = rows[last]
            self._speakers[row] = self._speakers[last]
        self._speakers.pop()
        self._speaking[last] = False
        self._controls = self._ways(self._speakers)

    def snapshot(self, ticket: int) -> Snapshot:
        """A copy of a session that goes on. Raises ``ValueError`` as ``evict``."""
        return self._streams.take(self._row(ticket))

    def step(self, last: Collection[int] = ()) -> dict[int, int]:
        """One token of each session that has not ended: ticket -> token, the end-of-text token included.

        A session that said its end-of-text token, or whose ticket is in ``last``, says no more until it is
        admitted again: that token stays pending.
        """
        if not self._speakers:
            return {}
        streams = self._streams
        rows = streams.rows if streams.whole_steps else len(self._speakers)
        speaking, pending = self._speaking[:rows], streams.pending[:rows]
        tokens = torch.where(speaking, self._chosen(rows), -1)
        said = Fetched(tokens)
        pending.copy_(torch.where(speaking, tokens, pending))
        going = going_on(tokens, speaking, streams.ends)
        for row, speaker in enumerate(self._speakers):
            if speaker.ticket in last:
                going[row] = False
        self._logits[:rows] = streams.step(tokens.clamp(min=0), going)
        pending.masked_fill_(going, -1)
        speaking.copy_(going)
        heard = zip(self._speakers, said.get().tolist(), strict=False)
        return {speaker.ticket: token for speaker, token in heard if token >= 0}

    def _chosen(self, rows: int) -> torch.Tensor:
        logits = self._logits[:rows]
        if all(speaker.sampling == Sampling() for speaker in self._speakers):
            return logits.argmax(-1)
        drawn = [float(torch.rand(1, generator=speaker.random)) for speaker in self._speakers]
        # Without waiting for the step that the device is at.
        uniform = torch.tensor(drawn + [0.0] * (rows - len(drawn))).to(logits, non_blocking=True)
        chosen = Controls(*(control[:rows] for control in self._controls))
        return choose(logits, self._streams.recent[:rows], chosen, uniform)

    def _ways(self, speakers: list[_Speaker]) -> Controls:
        """The sampling of all rows, the first of which are of ``speakers``."""
        ways = [speaker.sampling for speaker in speakers]
        return controls(ways + [Sampling()] * (self._streams.rows - len(ways)), self._logits)

    def _row(self, ticket: int) -> int:
        for row, speaker in enumerate(self._speakers):
            if speaker.ticket == ticket:
                return row
        raise ValueError(f"ticket must be of a session that is here, got {ticket}")
