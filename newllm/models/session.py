"""Streams of unlimited length: a model, its state of constant size, and nothing else to keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from newllm.models.sampling import Chooser, Sampling
from newllm.models.session_input import Input, pieces, token_rows
from newllm.models.stepping import Fetched
from newllm.models.streams import Compile, Model, Snapshot, Streams, check_model
from newllm.ops.checks import kind, whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Logits of a large vocabulary are made for so many tokens at a time.
_SCORED_AT_ONCE = 256
# Most tokens of one pass where nothing else is said: of each row on a CPU, of all together elsewhere.
_CHUNK, _CHUNK_ELSEWHERE = 1024, 16384


class Session:
    """One stream per row, read and continued call after call.

    The state is of constant size and positions are relative, so a stream may go on for ever. (That of a
    Context-KV model is only with its ``max_contexts``.) Rows of a batch are independent: each stops on its
    own and is not disturbed by its mates.

    Args:
        model: a Senri, Context LM or Context-KV model.
        tokenizer: needed for text; ids go without.
        batch_size: streams side by side.
        chunk: most tokens of one pass, per row (None: 1,024 on a CPU, elsewhere 16,384 shared by the rows).
        compile: how a step is run, see ``Streams``.

    Raises:
        TypeError: for another kind of argument. ValueError: for sizes below 1, and as ``Streams``.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        batch_size: int = 1,
        chunk: int | None = None,
        compile: Compile = "none",
    ) -> None:
        check_model(model)
        if tokenizer is not None and not hasattr(tokenizer, "decode"):
            got = type(tokenizer).__name__
            raise TypeError(f"tokenizer must be a tokenizer of transformers, got {got}")
        for name, value in (("batch_size", batch_size), ("chunk", 1 if chunk is None else chunk)):
            whole(name, value)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if chunk is None:
            shared = model.device.type != "cpu"
            chunk = max(1, _CHUNK_ELSEWHERE // batch_size) if shared else _CHUNK
        self._streams = Streams(model, batch_size, compile=compile)
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.chunk = batch_size, chunk

    def reset(self) -> None:
        """Forget everything."""
        self._streams.reset()

    @property
    def tokens(self) -> list[int]:
        """Tokens read so far, per row."""
        return self._streams.positions()

    @property
    def pending(self) -> list[int]:
        """Per row, the token that was generated last and is read by the next call; -1 where there is none."""
        return list(self._streams.pending.tolist())

    @property
    def state_bytes(self) -> int:
        """Bytes of all layers' states; the same at every length, zero before the first token."""
        return self._streams.nbytes()

    def feed(self, text: Input | Iterator[str], *, progress: Callable[[int], object] | None = None) -> None:
        """Read ``text``: a string, token ids, or one of either per row (``[B, T]`` tensors too).

        For a session of one row also an iterator of strings, such as an open file, which is never in memory
        as a whole; its words must not be cut. ``progress`` is told how many tokens each pass has read.

        Raises ``ValueError`` for another number of rows, ids outside the vocabulary, text without a tokenizer
        or with half characters, ``TypeError`` for what is neither text nor ids; nothing has been read then
        (of an iterator: nothing of that string).
        """
        for part in pieces(text) if isinstance(text, Iterator) else (text,):
            rows = self._rows(part)
            for ids, _, _ in self._read(self._behind_pending(rows)):
                # Read with the first tokens; a pass that failed has read none.
                self._streams.pending.fill_(-1)
                if progress is not None:
                    progress(ids.shape[1])

    def score(self, text: Input) -> Tensor:
        """Read ``text`` and return each token's negative log-likelihood in nats, ``[T]`` (float32 or more).

        The first token of a stream is not predicted by anything: NaN. For sessions of one row.

        Raises as ``feed``, and ``ValueError`` for a session of several rows.
        """
        if self.batch_size != 1:
            raise ValueError(f"score needs a session of batch_size 1, got {self.batch_size}")
        rows = self._rows(text)
        self._read_pending()
        losses = [torch.zeros(0, device=self.model.device)]
        for ids, hidden, before in self._read(rows):
            if before is None:
                losses.append(torch.full((1,), torch.nan, device=ids.device))
                predicting, targets = hidden[0, :-1], ids[0, 1:]
            else:
                predicting, targets = torch.cat([before, hidden[0, :-1]]), ids[0]
            losses.append(self.losses(predicting, targets))
        return torch.cat(losses)

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihoods ``[T]`` in nats of ``targets [T]``, each after its ``hidden [T, H]``."""
        parts = zip(hidden.split(_SCORED_AT_ONCE), targets.split(_SCORED_AT_ONCE), strict=True)
        return torch.cat(
            [F.cross_entropy(self._streams.logits(part), ids, reduction="none") for part, ids in parts]
        )

    def generate(
        self,
        prompt: Input | None = None,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        generator: torch.Generator | None = None,
    ) -> str | list[str] | list[list[int]]:
        """Read ``prompt``, then continue it, until the end-of-text token or ``max_new_tokens``.

        Returns text (a string for one row, else a list), or lists of ids without a tokenizer; the
        end-of-text token is left out. Whatever was generated belongs to the stream.
        """
        rows: list[list[int]] = [[] for _ in range(self.batch_size)]
        steps = self.stream(prompt, max_new_tokens=max_new_tokens, sampling=sampling, generator=generator)
        for tokens in steps:
            for row, token in zip(rows, tokens.tolist(), strict=True):
                if token >= 0:
                    row.append(token)
        if self.tokenizer is None:
            return rows
        texts = [str(self.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
        return texts[0] if self.batch_size == 1 else texts

    def stream(
        self,
        prompt: Input | None = None,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """As ``generate``, token by token: ``[B]`` ids, -1 in rows that have ended.

        The prompt is read when the first token is asked for. Tokens come on the CPU, each while the device
        reads it already and chooses the next one: ``generator`` is asked a token ahead. Stopping early leaves
        the session in order.

        Raises as ``feed``, and ``ValueError`` when a row has not read anything yet.
        """
        whole("max_new_tokens", max_new_tokens)
        if sampling is not None:
            kind("sampling", sampling, Sampling, "a Sampling")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if prompt is None:
            self._read_pending()
        else:
            self.feed(prompt)
        streams = self._streams
        if 0 in self.tokens:
            raise ValueError("prompt must hold a token for each row that has not read anything, got none")
        logits = streams.logits()
        choose = Chooser(sampling or Sampling(), self.batch_size, logits, generator)
        turn = streams.first_turn(logits, choose)
        for left in reversed(range(max_new_tokens)):
            said = Fetched(turn.said)
            # Chosen, not read: a token is read by the next step, or by the next call.
            if left and said.may(lambda ids: int(ids.max()) >= 0):
                turn = streams.next_turn(turn, choose)
            else:
                streams.leave(turn)
            yield said.get()
            if int(said.get().max()) < 0:
                return

    def snapshot(self) -> Snapshot:
        """A copy of all that the session remembers; ``snapshot().row(1)`` is one of its rows."""
        return self._streams.snapshot()

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from ``snapshot``.

        Raises ``ValueError`` when it is of another batch size or of a model of another shape.
        """
        self._streams.restore(snapshot)

    def fork(self) -> Session:
        """Another session that goes on from here, apart from this one."""
        twin = Session(
            self.model,
            self.tokenizer,
            batch_size=self.batch_size,
            chunk=self.chunk,
            compile=self._streams.compile,
        )
        twin.restore(self.snapshot())
        return twin

    def save(self, path: str | Path) -> None:
        """Write the session to a safetensors file, whole or not at all."""
        from newllm.models.session_file import write_snapshot

        write_snapshot(self.snapshot(), self.model, Path(path))

    def load(self, path: str | Path) -> None:
        """Go on from a file of ``save``.

        Raises ``FileNotFoundError`` where there is none, ``ValueError`` for a damaged file or one of another
        model, naming what differs. The session is as it was then.
        """
        from newllm.models.session_file import read_snapshot

        self.restore(read_snapshot(Path(path), self.model))

    def _rows(self, text: Input) -> list[Tensor]:
        return token_rows(text, self.tokenizer, self.batch_size, self.model.config.vocab_size)

    def _read_pending(self) -> None:
        if max(self.pending) >= 0:
            self.feed([[] for _ in range(self.batch_size)])

    def _behind_pending(self, rows: list[Tensor]) -> list[Tensor]:
        """``rows``, each behind the token that its stream still has to read."""
        return [
            torch.cat([torch.tensor([token] if token >= 0 else [], dtype=torch.int64), row])
            for token, row in zip(self.pending, rows, strict=True)
        ]

    def _read(self, rows: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Read chunk by chunk: ids ``[B, T]``, hidden states after each, hidden states before the first."""
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        real = torch.arange(ids.shape[1]) < lengths[:, None]
        streams, device = self._streams, self.model.device
        for start in range(0, ids.shape[1], self.chunk):
            part = slice(start, start + self.chunk)
            tokens, mask = ids[:, part].to(device), real[:, part].to(device)
            before = streams.hidden.clone() if streams.started else None
            if ids.shape[1] == 1 and before is not None:
                # As a step, for which there may be a graph: what was said last is read so before each turn.
                streams.step(tokens[:, 0], mask[:, 0])
                yield tokens, streams.hidden[:, None], before
            else:
                yield tokens, streams.read(tokens, mask), before
