"""Streams of unlimited length: a model, its state of constant size, and nothing else to keep."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from newllm.models.sampling import RECENT_TOKENS, Sampling, next_token
from newllm.models.senri.modeling import SenriForCausalLM
from newllm.models.session_input import Input, token_rows
from newllm.modules.cache import cache_layer
from newllm.types import InfiniState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Logits of a large vocabulary are made for so many tokens at a time.
_SCORED_AT_ONCE = 256


class Snapshot(NamedTuple):
    """All that a session remembers; keep it as long as you like, restore it as often as you like.

    ``states`` per layer and ``hidden [B, hidden_size]`` after the last token (None before the first),
    ``pending [B]`` tokens that were sampled but not yet read (-1: none), ``recent [B, <= 50]`` tokens (-1:
    none).
    """

    states: tuple[InfiniState | None, ...]
    hidden: Tensor | None
    pending: Tensor
    recent: Tensor


class Session:
    """One stream per row, read and continued call after call.

    The state is of constant size and positions are relative, so a stream may go on for ever. Rows of a
    batch are independent: each stops on its own and is not disturbed by its mates.

    Args:
        model: a ``SenriForCausalLM``.
        tokenizer: needed for text; ids go without.
        batch_size: streams side by side.
        chunk: most tokens of one pass.

    Raises:
        TypeError: for another kind of model. ValueError: for sizes below 1.
    """

    def __init__(
        self,
        model: SenriForCausalLM,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        batch_size: int = 1,
        chunk: int = 1024,
    ) -> None:
        if not isinstance(model, SenriForCausalLM):
            raise TypeError(
                f"model must be a SenriForCausalLM (see newllm.convert), got {type(model).__name__}"
            )
        for name, value in (("batch_size", batch_size), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.chunk = batch_size, chunk
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        device = self.model.device
        self._cache = DynamicCache(config=self.model.config)
        self._hidden: Tensor | None = None
        self._pending = torch.full((self.batch_size,), -1, dtype=torch.int64, device=device)
        self._recent = self._pending[:, None].expand(-1, RECENT_TOKENS)

    @property
    def tokens(self) -> list[int]:
        """Tokens read so far, per row."""
        state = self._states()[0]
        return [0] * self.batch_size if state is None else state.position.tolist()

    @property
    def pending(self) -> list[int]:
        """Per row, the token that was generated last and is read by the next call; -1 where there is none."""
        return list(self._pending.tolist())

    @property
    def state_bytes(self) -> int:
        """Bytes of all layers' states; the same at every length, zero before the first token."""
        return sum(state.nbytes() for state in self._states() if state is not None)

    def feed(self, text: Input) -> None:
        """Read ``text``: a string, token ids, or one of either per row (``[B, T]`` tensors too).

        Raises ``ValueError`` for another number of rows, ids outside the vocabulary, or text without a
        tokenizer; nothing has been read then.
        """
        rows = self._rows(text)
        for _ in self._read(self._behind_pending(rows)):
            pass

    def score(self, text: Input) -> Tensor:
        """Read ``text`` and return each token's negative log-likelihood in nats, ``[T]`` (float32 or more).

        The first token of a stream is not predicted by anything: NaN. For sessions of one row.

        Raises as ``feed``, and ``ValueError`` for a session of several rows.
        """
        if self.batch_size != 1:
            raise ValueError(f"score needs a session of batch_size 1, got {self.batch_size}")
        rows = self._rows(text)
        self._read_pending()
        losses = [torch.zeros(0, device=self._pending.device)]
        for ids, hidden, before in self._read(rows):
            if before is None:
                losses.append(torch.full((1,), torch.nan, device=ids.device))
                predicting, targets = hidden[0, :-1], ids[0, 1:]
            else:
                predicting, targets = torch.cat([before, hidden[0, :-1]]), ids[0]
            parts = zip(predicting.split(_SCORED_AT_ONCE), targets.split(_SCORED_AT_ONCE), strict=True)
            losses += [
                F.cross_entropy(self._logits(part), target, reduction="none") for part, target in parts
            ]
        return torch.cat(losses)

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

        The prompt is read when the first token is asked for. Stopping early leaves the session in order.

        Raises as ``feed``, and ``ValueError`` when a row has not read anything yet.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if prompt is None:
            self._read_pending()
        else:
            self.feed(prompt)
        if self._hidden is None or 0 in self.tokens:
            raise ValueError("prompt must hold a token for each row that has not read anything, got none")
        ends = self._ends()
        active = torch.ones(self.batch_size, dtype=torch.bool, device=self._pending.device)
        for step in range(max_new_tokens):
            logits = self._logits(self._hidden)
            tokens = next_token(logits, self._recent, sampling or Sampling(), generator)
            # Sampled, not read: a token is read by the next step, or by the next turn.
            self._pending = torch.where(active, tokens, self._pending)
            active = active & ~torch.isin(tokens, ends)
            yield torch.where(active, tokens, -1)
            if not active.any():
                return
            if step + 1 < max_new_tokens:
                self._advance(self._pending[:, None], active[:, None])
                self._pending = torch.where(active, -1, self._pending)

    def snapshot(self) -> Snapshot:
        """A copy of all that the session remembers."""
        return _copied(Snapshot(self._states(), self._hidden, self._pending, self._recent))

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from ``snapshot``.

        Raises ``ValueError`` when it is of another batch size or of a model of another shape.
        """
        config = self.model.config
        if len(snapshot.states) != config.num_hidden_layers:
            raise ValueError(
                f"snapshot must hold {config.num_hidden_layers} layers, got {len(snapshot.states)}"
            )
        if len(snapshot.pending) != self.batch_size:
            raise ValueError(f"snapshot must hold {self.batch_size} rows, got {len(snapshot.pending)}")
        ring = config.sliding_window or config.segment
        shape = (self.batch_size, config.num_key_value_heads, ring, config.head_dim)
        for state in snapshot.states:
            if state is not None and state.keys.shape != shape:
                raise ValueError(f"snapshot must hold keys of shape {shape}, got {tuple(state.keys.shape)}")
        self.reset()
        states, self._hidden, self._pending, self._recent = _copied(snapshot)
        for index, state in enumerate(states):
            if state is not None:
                cache_layer(self._cache, index).write(state, int(state.position.max()))

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

    def _states(self) -> tuple[InfiniState | None, ...]:
        layers = range(self.model.config.num_hidden_layers)
        return tuple(cache_layer(self._cache, index).read(self.batch_size) for index in layers)

    def _ends(self) -> Tensor:
        ends = self.model.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        return torch.tensor(ends, dtype=torch.int64, device=self._pending.device)

    def _rows(self, text: Input) -> list[Tensor]:
        return token_rows(text, self.tokenizer, self.batch_size, self.model.config.vocab_size)

    def _read_pending(self) -> None:
        if max(self.pending) >= 0:
            self.feed([[] for _ in range(self.batch_size)])

    def _behind_pending(self, rows: list[Tensor]) -> list[Tensor]:
        """``rows``, each behind the token that its stream still has to read."""
        pending, self._pending = self.pending, torch.full_like(self._pending, -1)
        return [
            torch.cat([torch.tensor([token] if token >= 0 else [], dtype=torch.int64), row])
            for token, row in zip(pending, rows, strict=True)
        ]

    def _read(self, rows: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Read chunk by chunk: ids ``[B, T]``, hidden states after each, hidden states before the first."""
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        real = torch.arange(ids.shape[1]) < lengths[:, None]
        for start in range(0, ids.shape[1], self.chunk):
            part = slice(start, start + self.chunk)
            device = self._pending.device
            tokens, mask, before = ids[:, part].to(device), real[:, part].to(device), self._hidden
            yield tokens, self._advance(tokens, mask), before

    @torch.no_grad()
    def _advance(self, tokens: Tensor, real: Tensor) -> Tensor:
        """Read ``tokens [B, T]`` where they are ``real``; hidden states ``[B, T, hidden_size]``."""
        out = self.model.model(tokens, attention_mask=real, past_key_values=self._cache, use_cache=True)
        hidden: Tensor = out.last_hidden_state
        last = (real.sum(1) - 1).clamp(min=0)
        latest = hidden[torch.arange(len(last), device=last.device), last]
        if self._hidden is not None:
            latest = torch.where(real.any(1)[:, None], latest, self._hidden)
        self._hidden = latest
        self._recent = _latest(self._recent, tokens, real)
        return hidden

    @torch.no_grad()
    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.lm_head(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _latest(recent: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
    """The last of ``recent`` and the real ones of ``tokens``, oldest first."""
    joined = torch.cat([recent, tokens.masked_fill(~real, -1)], 1)
    kept = torch.cat([torch.ones_like(recent, dtype=torch.bool), real], 1)
    order = kept.to(torch.int8).argsort(dim=1, stable=True)
    return joined.gather(1, order)[:, -recent.shape[1] :]


def _copied(snapshot: Snapshot) -> Snapshot:
    return Snapshot(
        tuple(None if state is None else state.map(torch.clone) for state in snapshot.states),
        None if snapshot.hidden is None else snapshot.hidden.clone(),
        snapshot.pending.clone(),
        snapshot.recent.clone(),
    )
