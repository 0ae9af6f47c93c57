"""Many sessions in one model: each comes and goes on its own, all speak in the same step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from newllm.models.sampling import Sampling, choose, controls, ends_of, generator
from newllm.models.streams import Compile, Fetched, Model, Snapshot, Streams


class _Speaker(NamedTuple):
    """How the session in a slot goes on."""

    sampling: Sampling
    random: torch.Generator


class SessionBatch:
    """Up to ``slots`` sessions that generate side by side, a token each per step.

    A session is admitted as a snapshot of one row (``Session.snapshot``) and leaves as one; what it says does
    not depend on who else is there. Whatever the number of sessions, shapes and addresses stay the same.

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
        self._speakers: list[_Speaker | None] = [None] * slots
        self._ends = ends_of(model)
        self._speaking = torch.zeros(slots, dtype=torch.bool, device=model.device)
        self._logits: torch.Tensor | None = None
        self._controls = controls([Sampling()] * slots, self._streams.logits())

    @property
    def free(self) -> list[int]:
        """Slots without a session."""
        return [slot for slot, speaker in enumerate(self._speakers) if speaker is None]

    @property
    def state_bytes(self) -> int:
        """Bytes of one session's states; zero before the first was admitted."""
        held = sum(state.nbytes() for state in self._streams.states if state is not None)
        return held // len(self._speakers)

    def admit(self, snapshot: Snapshot, sampling: Sampling | None = None, seed: int | None = None) -> int:
        """Let the session of ``snapshot`` speak from the next step on; its slot.

        Nothing may be pending in it: feed it an empty text before. ``seed`` None takes another one each time.

        Raises ``ValueError`` where no slot is free, for a pending token, and where the snapshot does not fit.
        """
        if not self.free:
            raise ValueError(f"at most {len(self._speakers)} sessions can speak at a time: evict one first")
        if int(snapshot.pending[0]) >= 0:
            raise ValueError(f"snapshot must have no pending token, got {int(snapshot.pending[0])}")
        slot = self.free[0]
        self._streams.put(slot, snapshot)
        self._speakers[slot] = _Speaker(sampling or Sampling(), generator(seed, torch.device("cpu")))
        self._speaking[slot] = True
        self._settle(slot)
        return slot

    def evict(self, slot: int) -> Snapshot:
        """The session in ``slot`` as it is now; the slot is free.

        Raises ``ValueError`` for a slot without a session.
        """
        self._at(slot)
        self._speakers[slot] = None
        self._speaking[slot] = False
        return self._streams.take(slot)

    def snapshot(self, slot: int) -> Snapshot:
        """A copy of the session in ``slot``, which goes on. Raises ``ValueError`` as ``evict``."""
        self._at(slot)
        return self._streams.take(slot)

    def step(self, last: Mapping[int, bool] | None = None) -> dict[int, int]:
        """One token of each session that has not ended: slot -> token, the end-of-text token included.

        A session that said its end-of-text token, or whose slot is True in ``last``, says no more until it is
        admitted again: that token stays pending.
        """
        last = last or {}
        slots = [slot for slot, speaker in enumerate(self._speakers) if speaker is not None]
        if not slots:
            return {}
        streams = self._streams
        logits = streams.logits() if self._logits is None else self._logits
        speaking = self._speaking
        tokens = torch.where(speaking, self._chosen(logits), -1)
        said = Fetched(tokens)
        streams.pending.copy_(torch.where(speaking, tokens, streams.pending))
        silent = torch.tensor([last.get(slot, False) for slot in range(len(self._speakers))])
        going = speaking & ~(tokens[:, None] == self._ends).any(1) & ~silent.to(speaking.device)
        self._logits = streams.step(tokens.clamp(min=0), going)
        streams.pending.masked_fill_(going, -1)
        self._speaking = going
        heard = said.get().tolist()
        return {slot: heard[slot] for slot in slots if heard[slot] >= 0}

    def _chosen(self, logits: torch.Tensor) -> torch.Tensor:
        if all(speaker is None or speaker.sampling == Sampling() for speaker in self._speakers):
            return logits.argmax(-1)
        uniform = torch.tensor(
            [
                0.0 if speaker is None else float(torch.rand(1, generator=speaker.random))
                for speaker in self._speakers
            ]
        )
        return choose(logits, self._streams.recent, self._controls, uniform.to(logits))

    def _settle(self, slot: int) -> None:
        """Take a newcomer's logits and sampling in."""
        rows = [Sampling() if speaker is None else speaker.sampling for speaker in self._speakers]
        fresh = self._streams.logits(self._streams.hidden[slot])
        if self._logits is None:
            self._logits = self._streams.logits()
        self._logits[slot] = fresh
        self._controls = controls(rows, fresh)

    def _at(self, slot: int) -> _Speaker:
        speaker = self._speakers[slot] if 0 <= slot < len(self._speakers) else None
        if speaker is None:
            raise ValueError(f"slot must hold a session, got {slot}")
        return speaker
